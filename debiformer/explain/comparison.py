"""The same query, or the same evidence, in several models side by side."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

from .look import Look
from .path import heat, show, star
from .rollout import rollout

RESIDUAL = 0.2  # of a rollout through a stage: more of it would leave little to see beside the query itself


def attention_side_by_side(looks: Mapping[str, Look], stage: int, block: int | None, x: float, y: float, columns: int = 5) -> Figure:
    """Where the attention of a query ends up in the same layers of several models, averaged over heads; each relative to its peak.

    Args:
        looks: What each model did with the same image, by the name that is shown.
        stage: Stage of the layer, from 1.
        block: Block of the layer in its stage, from 1; None for all blocks of the stage, by rollout.
        x: Pixels of the query from the left of the image.
        y: Pixels from its top.
        columns: Panels in a row, the image among them.

    Raises:
        ValueError: If a model has no such layer, or the image no such place.
    """
    figure, panels = _grid(next(iter(looks.values())), len(looks), columns)
    for axes, (name, look) in zip(panels, looks.items(), strict=False):
        trace = look.trace(stage, block or 1)
        row, column = look.pixel(trace, x, y)
        reached = trace.attention(row, column) if block else rollout(look.stage(stage), trace.one(row, column), residual=RESIDUAL)
        heat(axes, look, look.on_image(reached))
        star(axes, look, trace, row, column)
        axes.set_title(name, fontsize=10)
    where = f"stage {stage}, block {block}" if block else f"the blocks of stage {stage}"
    figure.suptitle(f"What the query ★ hears of in {where}: the brighter, the more", fontsize=11)
    return figure


def evidence_side_by_side(looks: Mapping[str, Look], maps: Mapping[str, Tensor], caption: str, columns: int = 5) -> Figure:
    """Maps (H, W) of several models over the same image, such as their class activation.

    Args:
        looks: What each model did with the image, by the name that is shown.
        maps: The map of each, by the same names.
        caption: What is drawn, in a line.
        columns: Panels in a row, the image among them.

    Raises:
        ValueError: If names differ.
    """
    if looks.keys() != maps.keys():
        raise ValueError(f"maps of {', '.join(maps)} do not go with looks of {', '.join(looks)}")
    figure, panels = _grid(next(iter(looks.values())), len(looks), columns)
    for axes, (name, look) in zip(panels, looks.items(), strict=False):
        heat(axes, look, maps[name])
        axes.set_title(name, fontsize=10)
    figure.suptitle(caption, fontsize=11)
    return figure


def _grid(look: Look, models: int, columns: int) -> tuple[Figure, list]:
    """A figure whose first panel is the image, and the axes of the others."""
    columns = min(columns, models + 1)
    rows = -(-(models + 1) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.6 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    show(panels[0], look.image)
    panels[0].set_title("the image", fontsize=10)
    return figure, panels[1:]
