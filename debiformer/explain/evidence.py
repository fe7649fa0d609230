"""What speaks for what a model found in an image, and what reaches its last map at all: as arrays and as figures."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..nearest import did_you_mean
from .path import Panel, heat, show
from .views import View

FINE = 4  # pixels of a side of a map, for its activation to tell one place from another


class UnknownClass(ValueError):
    """A class that a model does not know."""


@dataclass
class Evidence:
    """A map over one image, from 0 to 1.

    Attributes:
        name: What the activation speaks for, in words.
        method: How it was found, one of `METHODS` of class activation.
        activation: Where the evidence for it lies (H, W).
    """

    name: str
    method: str
    activation: Tensor


def evidence(view: View, x: float, y: float, label: str | None = None, method: str = "grad_cam", stage: int | None = None) -> Evidence:
    """The evidence for what a model found in an image; for dense tasks, for what it found at (x, y), pixels of the image as seen.

    Args:
        view: The image through the model.
        x: Pixels from the left.
        y: Pixels from the top.
        label: Another class to look for.
        method: Of class activation.
        stage: Whose map is weighed, from 1; where it is None, the last one with at least 4x4 pixels.

    Raises:
        NothingFound: If a detector has found nothing.
        UnknownClass: If there is no such class.
        ValueError: If there is no such method or stage.
    """
    if label is not None and label not in view.labels:
        raise UnknownClass(f"class {label}: the model knows no such class; {did_you_mean(label, view.labels)}")
    name, target = view.target(x, y, None if label is None else view.labels.index(label))
    stage = finest_enough(view) if stage is None else stage
    activation = view.activation(target, method, stage)
    name += f"; by the {'x'.join(map(str, view.look.trace(stage, 1).size))} map of stage {stage}"
    return Evidence(name, method, activation)


def finest_enough(view: View) -> int:
    """The last stage whose map has at least `FINE` pixels on each side; the first one where none has."""
    return max((stage for (stage, _), trace in view.look.traces.items() if min(trace.size) >= FINE), default=1)


def evidence_panels(view: View, found: Evidence) -> list[Panel]:
    """The evidence and the rollout over the image in grey."""
    method = found.method.replace("_", " ")

    def activation(axes: Axes) -> None:
        heat(axes, view.look, found.activation)

    def reached(axes: Axes) -> None:
        heat(axes, view.look, view.look.reached)

    return [
        Panel(
            f"{method}: the evidence for\n{found.name}",
            f"Evidence for {found.name}: where it is bright, the picture speaks for it ({method}).",
            activation,
        ),
        Panel(
            "attention rollout: what reaches\nthe last map from where",
            "Rollout: from where something can reach the model's last map, through the attention of all layers.",
            reached,
        ),
    ]


def evidence_figure(view: View, found: Evidence) -> Figure:
    """The image, its class activation map, and what reaches the last map."""
    figure = Figure(figsize=(9.3, 3.7), layout="constrained")
    first, *others = figure.subplots(1, 3)
    show(first, view.look.image)
    first.set_title("the image as the model saw it", fontsize=10)
    for axes, panel in zip(others, evidence_panels(view, found), strict=True):
        panel.draw(axes)
        axes.set_title(panel.title, fontsize=10, parse_math=False)
    return figure


def arrays(
    view: View, stage: int, block: int, x: float, y: float, head: int | None, found: Evidence | None = None
) -> dict[str, np.ndarray]:
    """What the figures of a query at (x, y), pixels of the image as seen, are drawn from.

    Raises:
        ValueError: If there is no such layer, head or place.
    """
    trace = view.look.trace(stage, block)
    pixel = view.look.pixel(trace, x, y)
    values = {"attention": trace.attention(*pixel, head=head), "rollout": view.look.reached}
    if found is not None:
        values[found.method] = found.activation
    if trace.has_points:
        points, start = trace.points()
        values |= {"points": points, "reference_points": start, "heard": trace.heard(*pixel, head=head)}
    return {name: value.float().cpu().numpy() for name, value in values.items()}
