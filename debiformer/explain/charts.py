"""Charts of an evaluation: which classes are taken for which, and what size and crop do to the accuracy."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure

NUMBERED = 15  # classes up to which every cell tells its number
NAMED = 60  # classes up to which every row and column has its name


def confusion(counts: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """A confusion matrix, each row as shares of the images of its class; a class without images stays grey.

    Args:
        counts: Images by class (rows) and by the label given to them (columns).
        class_names: Names of rows and columns.
        title: The headline.
    """
    classes = len(class_names)
    images = counts.sum(1, keepdims=True)
    shares = np.divide(counts, images, out=np.full(counts.shape, np.nan), where=images > 0)
    side = min(max(4.5, 0.9 * classes if classes <= NUMBERED else 0.24 * classes), 13)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    norm = Normalize(0, 1) if classes <= NUMBERED else PowerNorm(0.4, 0, 1)  # small shares must be seen, where no number tells them
    cells = axes.imshow(shares, cmap="Blues", norm=norm)
    figure.colorbar(cells, ax=axes, shrink=0.8, label="share of the images of a class")
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="label given", ylabel="class")
    if classes <= NAMED:
        axes.set_xticks(range(classes), class_names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(range(classes), class_names, parse_math=False)
    if classes <= NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if images[row]:
                share = shares[row, column]
                axes.text(column, row, f"{share:.1%}\n{count}", ha="center", va="center", color="white" if share > 0.5 else "black")
    return figure


def sweep(accuracy: dict[tuple[tuple[int, int], float], float], title: str) -> Figure:
    """Accuracy over input sizes, a line for each crop; over crops where there is one size.

    Args:
        accuracy: By input size, (height, width) in pixels, and the share that the crop keeps.
        title: The headline.
    """
    sizes, crops = (sorted(set(values)) for values in zip(*accuracy, strict=True))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    if len(sizes) > 1:
        for crop in crops:
            axes.plot(range(len(sizes)), [accuracy[size, crop] for size in sizes], marker="o", label=f"{crop:g}")
        axes.set_xticks(range(len(sizes)), [f"{height}x{width}" for height, width in sizes])
        axes.legend(title="crop")
        axes.set_xlabel("input size")
    else:
        axes.plot(range(len(crops)), [accuracy[sizes[0], crop] for crop in crops], marker="o")
        axes.set_xticks(range(len(crops)), [f"{crop:g}" for crop in crops])
        axes.set_xlabel("crop")
    axes.set_title(title, parse_math=False)
    axes.set_ylabel("top-1 accuracy")
    axes.grid(alpha=0.3)
    return figure
