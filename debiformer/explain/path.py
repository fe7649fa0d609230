"""The path of one query, from its pixel through points and regions to the pixels that it hears of in the end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .attention import RoutingTrace, Trace
from .figures import COLOURS, QUERY, show
from .look import Look

# For readers who have not read the papers.
STAR = "The star is the pixel that you ask about; the layer sees it as part of the square."
POINTS = "The pixel listens to these points, which moved to where there is something to see: the larger, the more."
REGIONS = "It looks into a few regions of the image only: bright ones answer its own region (dashed) well, the outlined ones are taken."
AGENTS_REGIONS = "Each point looks into a few regions: bright ones answer those of the dashed region well, the outlined ones are taken."
ENDS = "What the pixel takes in the end, and from where: the brighter, the more."


class Panel(NamedTuple):
    """One picture of several: a short title, a sentence for readers who are new to it, and what draws it on axes."""

    title: str
    sentence: str
    draw: Callable[[Axes], None]


def path_panels(look: Look, stage: int, block: int, x: float, y: float, head: int | None = None) -> list[Panel]:
    """How a query at (x, y), in pixels of the image, reaches other pixels in a layer, a panel for each step.

    Args:
        look: What the model did with the image.
        stage: Stage of the layer, from 1.
        block: Block of the layer in its stage, from 1.
        x: Pixels from the left of the image.
        y: Pixels from its top.
        head: One attention head, from 0, or all averaged.

    Raises:
        ValueError: If there is no such layer, head or place.
    """
    trace = look.trace(stage, block)
    row, column = look.pixel(trace, x, y)
    points, regions = trace.has_points, isinstance(trace, RoutingTrace)
    steps: list[tuple[str, str, Callable[..., None]]] = [("the query ★, and its pixel of the map", STAR, draw_query)]
    if points:
        steps.append(("the points that it listens to:\nthe larger, the more", POINTS, draw_heard))
    if points and regions:
        steps.append(("regions that the agents of its\nown region are routed to", AGENTS_REGIONS, draw_regions))
    elif regions:
        steps.append(("regions that it is routed to", REGIONS, draw_regions))
    through = ",\nthrough all points" if points else ""
    steps.append((f"where its attention ends up{through}", ENDS, draw_reached))

    def drawn(draw: Callable[..., None]) -> Callable[[Axes], None]:
        def on(axes: Axes) -> None:
            draw(axes, look, trace, row, column, head)
            axes.plot(x / look.image.width, y / look.image.height, **QUERY)
            axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])

        return on

    return [Panel(title, sentence, drawn(draw)) for title, sentence, draw in steps]


def path_figure(look: Look, stage: int, block: int, x: float, y: float, head: int | None = None) -> Figure:
    """The panels of `path_panels` side by side, whose arguments and errors it has."""
    panels = path_panels(look, stage, block, x, y, head)
    trace = look.trace(stage, block)
    figure = Figure(figsize=(3.1 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel.draw(axes)
        axes.set_title(panel.title, fontsize=10)
    of = "all heads averaged" if head is None else f"head {head}"
    keys = {
        "points of a colour share an offset group": trace.has_points,
        "dashed: its own region; yellow: regions that answer it well": isinstance(trace, RoutingTrace),
        "brightness is relative to the brightest": True,
    }
    figure.supxlabel("; ".join(key for key, shown in keys.items() if shown), fontsize=9)
    figure.suptitle(f"Stage {stage}, block {block}: {type(trace.layer).__name__}, {of}", fontsize=11, fontweight="bold")
    return figure


def draw_query(axes: Axes, look: Look, trace: Trace, row: int, column: int, head: int | None) -> None:
    """The image, and the pixel of the map that the query falls on."""
    show(axes, look.image)
    down, across = (side * share for side, share in zip(trace.size, look.covered, strict=True))
    for colour, width in (("white", 2.4), ("black", 1.2)):
        pixel = Rectangle((column / across, row / down), 1 / across, 1 / down, fill=False, edgecolor=colour, linewidth=width)
        axes.add_patch(pixel)


def draw_heard(axes: Axes, look: Look, trace: Trace, row: int, column: int, head: int | None) -> None:
    """Points where they were sampled, as large as the attention that the query pays to each."""
    show(axes, look.image, fade=0.35)
    weights = trace.heard(row, column, head=head).float().cpu()
    points = trace.points()[0].float().cpu()
    padded = getattr(trace, "padded", trace.size)
    stretch = torch.tensor([p / s / c for p, s, c in zip(padded[::-1], trace.size[::-1], look.covered[::-1], strict=True)])
    places = (points + 1) / 2 * stretch
    share = (weights / weights.max()).flatten()
    for group, at in enumerate(places.flatten(1, 2)):
        colour = COLOURS[group % len(COLOURS)]
        look_of: dict[str, Any] = dict(color=colour, edgecolor="white", linewidth=0.8, alpha=0.9, zorder=3, clip_on=False)
        axes.scatter(at[:, 0], at[:, 1], s=(8 + 150 * share).numpy(), **look_of)
    axes.set(xlim=(0, 1), ylim=(1, 0))


def draw_regions(axes: Axes, look: Look, trace: Trace, row: int, column: int, head: int | None) -> None:
    """Routed regions in outline, over how well every region answers; the query's own is dashed."""
    assert isinstance(trace, RoutingTrace)
    show(axes, look.image.convert("L"), fade=0.45)
    affinities = trace.affinities(row, column).float().cpu().numpy()
    (height, width), (h, w), cols = trace.size, trace.region_size, trace.region_grid[1]
    across, down = width * look.covered[1], height * look.covered[0]
    rows = trace.region_grid[0]
    extent = (0, cols * w / across, rows * h / down, 0)
    axes.imshow(affinities, cmap="cividis", alpha=0.45, extent=extent, aspect=axes.get_aspect(), interpolation="nearest")
    for region in (*trace.routes(row, column), trace.region(row, column)):
        own = region == trace.region(row, column)
        style: dict[str, Any] = (
            dict(edgecolor="black", linewidth=1.6, linestyle=(0, (2, 2))) if own else dict(edgecolor=COLOURS[0], linewidth=2.2)
        )
        corner = (region % cols * w / across, region // cols * h / down)
        axes.add_patch(Rectangle(corner, w / across, h / down, fill=False, zorder=3 if own else 2, **style))
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])


def draw_reached(axes: Axes, look: Look, trace: Trace, row: int, column: int, head: int | None) -> None:
    """The attention of the query to every pixel, all levels composed, over the image in grey."""
    weights = look.on_image(trace.attention(row, column, head=head))
    heat(axes, look, weights)
    if not weights.any():
        axes.text(0.5, 0.5, "all of it is\non padding", ha="center", va="center", fontsize=11, color="white")


def heat(axes: Axes, look: Look, weights: Tensor) -> None:
    """Weights (H, W) over the image in grey, relative to their peak."""
    show(axes, look.image.convert("L"), fade=0.25)
    values = weights.float().cpu().numpy()
    relative = values / max(values.max(), np.finfo(np.float32).tiny)
    axes.imshow(relative, cmap="inferno", alpha=0.62, extent=(0, 1, 1, 0), aspect=axes.get_aspect(), interpolation="bicubic")


def star(axes: Axes, look: Look, trace: Trace, row: int, column: int) -> None:
    """A star on the query's pixel of the map."""
    down, across = (side * share for side, share in zip(trace.size, look.covered, strict=True))
    axes.plot((column + 0.5) / across, (row + 0.5) / down, **QUERY)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
