"""Figures: points, routes and attention drawn over the image that they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL.Image import Image, Resampling

from .attention import RoutingTrace, Trace

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#E69F00", "#0072B2", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#F0E442", "#000000")
QUERY: dict[str, Any] = dict(marker="*", markersize=15, markerfacecolor="#F0E442", markeredgecolor="black", linestyle="none")


@dataclass
class Example:
    """An image, what a model said of it, and where its layers looked.

    Attributes:
        image: The image as the model saw it, before normalisation.
        title: A line above it.
        points: A deformable layer, for its points.
        routing: A bi-level routing layer, for the routes of the query.
        attention: A layer, for the attention of the query; a deformable layer composes both levels.
        query: The query (x, y), as fractions of the image from 0 to 1.
    """

    image: Image
    title: str
    points: Trace
    routing: RoutingTrace
    attention: Trace
    query: tuple[float, float] = (0.4, 0.4)


def pixel(trace: Trace, query: tuple[float, float]) -> tuple[int, int]:
    """Row and column of the pixel of a layer's map that lies at (x, y), fractions of the image."""
    (height, width), (x, y) = trace.size, query
    return min(int(y * height), height - 1), min(int(x * width), width - 1)


def show(axes: Axes, image: Image, fade: float = 0.0) -> None:
    """The image without ticks, washed out by `fade` from 0 to 1."""
    pixels = np.asarray(image.convert("RGB")) / 255
    axes.imshow(pixels * (1 - fade) + fade, extent=(0, 1, 1, 0), aspect=image.height / image.width, interpolation="bicubic")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_points(axes: Axes, image: Image, trace: Trace) -> None:
    """Where the deformed points moved from their cell centres; the larger a point, the more the pixels listen to it."""
    show(axes, image, fade=0.15)
    points, start = (p.float().cpu() for p in trace.points())
    padded, size = getattr(trace, "padded", trace.size), trace.size
    weights = trace.importance().float().cpu()
    stretch = np.array([padded[1] / size[1], padded[0] / size[0]])  # points span the padded map
    heard = weights / weights.max()
    groups, rows, cols, _ = points.shape
    for group in range(groups):
        for i in range(rows):
            for j in range(cols):
                (x0, y0), (x1, y1) = (((p[group, i, j].numpy() + 1) / 2) * stretch for p in (start, points))
                axes.plot([x0, x1], [y0, y1], color="white", linewidth=2.2, zorder=2)
                axes.plot([x0, x1], [y0, y1], color=COLOURS[group % len(COLOURS)], linewidth=1.2, zorder=3)
                axes.scatter(
                    x1, y1, s=20 + 130 * heard[i, j], color=COLOURS[group % len(COLOURS)], edgecolor="white", linewidth=0.9, zorder=4
                )
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)


def draw_routes(axes: Axes, image: Image, trace: RoutingTrace, query: tuple[float, float]) -> None:
    """The query, its own region in outline, and the regions that this is routed to; everything else is washed out."""
    row, column = pixel(trace, query)
    (height, width), (h, w), cols = trace.size, trace.region_size, trace.region_grid[1]
    large = image.convert("RGB").resize((width * 32, height * 32), Resampling.BICUBIC)
    pixels = np.asarray(large) / 255
    shown = 0.3 * pixels + 0.7
    boxes = {region: (region % cols * w, region // cols * h) for region in (*trace.routes(row, column), trace.region(row, column))}
    for region in trace.routes(row, column):
        x, y = boxes[region]
        window = (slice(y * 32, (y + h) * 32), slice(x * 32, (x + w) * 32))
        shown[window] = pixels[window]
    axes.imshow(shown, extent=(0, 1, 1, 0), interpolation="bicubic")
    for region, (x, y) in boxes.items():
        own = region == trace.region(row, column)
        style: dict[str, Any] = (
            dict(edgecolor="black", linewidth=1.5, linestyle=(0, (2, 2))) if own else dict(edgecolor=COLOURS[1], linewidth=2.2)
        )
        axes.add_patch(Rectangle((x / width, y / height), w / width, h / height, fill=False, zorder=3 if own else 2, **style))
    mark_query(axes, trace, query)


def draw_attention(axes: Axes, image: Image, trace: Trace, query: tuple[float, float]) -> None:
    """The attention of the query to every pixel of the map, over the image in grey."""
    show(axes, image.convert("L"), fade=0.25)
    weights = trace.attention(*pixel(trace, query)).float().cpu().numpy()
    axes.imshow(weights / weights.max(), cmap="inferno", alpha=0.62, extent=(0, 1, 1, 0), interpolation="bicubic", vmin=0)
    mark_query(axes, trace, query)


def mark_query(axes: Axes, trace: Trace, query: tuple[float, float]) -> None:
    """A star on the pixel of the map that the query falls on, and the axes cut to the image."""
    row, column = pixel(trace, query)
    axes.plot((column + 0.5) / trace.size[1], (row + 0.5) / trace.size[0], **QUERY)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])


def draw_detections(axes: Axes, image: Image, boxes: Sequence[tuple], labels: Sequence[str], colours: dict[str, str]) -> None:
    """Boxes (label, x0, y0, x1, y1) in the colour of the label given to each; a wrong one is crossed out."""
    axes.imshow(np.asarray(image.convert("RGB")), interpolation="bicubic")
    for (truth, x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=3))
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colours[label], linewidth=1.8))
        if label != truth:
            axes.plot([x0, x1, x0, x1], [y0, y1, np.nan, np.nan], color="black", linewidth=1.2)
            axes.plot([x0, x1], [y1, y0], color="black", linewidth=1.2)
            axes.text((x0 + x1) / 2, max(y0 - 4, 14), f"is {truth}", ha="center", fontsize=8, color="black")
    axes.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])


def overview(
    image: Image, boxes: Sequence[tuple], labels: Sequence[str], examples: Sequence[Example], colours: dict[str, str], title: str
) -> Figure:
    """A whole image with every cell labelled, and for each example what the model looked at.

    Args:
        image: The whole image.
        boxes: Its cells, (true label, x0, y0, x1, y1) in pixels.
        labels: The label given to each.
        examples: One row of pictures each.
        colours: A colour for each label.
        title: The headline.
    """
    rows = len(examples)
    figure = plt.figure(figsize=(17, 2.15 * rows + 1.2), layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold")
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.0, 1.12))
    left, right = panels
    axes = left.subplots()
    draw_detections(axes, image, boxes, labels, colours)
    axes.set_title("Every labelled cell of a test image, by prediction", fontsize=11)
    for label, colour in colours.items():
        axes.plot([], [], color=colour, linewidth=4, label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=len(colours), frameon=False, fontsize=11)
    grid = right.subplots(rows, 4, squeeze=False)
    heads = (
        "cell",
        "points, moved from their cells\nlarger: listened to more",
        "routed regions\nof the query ★",
        "attention\nof the query ★",
    )
    for row, example in zip(grid, examples, strict=True):
        show(row[0], example.image)
        row[0].set_ylabel(example.title, fontsize=11)
        draw_points(row[1], example.image, example.points)
        draw_routes(row[2], example.image, example.routing, example.query)
        draw_attention(row[3], example.image, example.attention, example.query)
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=11)
    return figure
