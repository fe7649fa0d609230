"""Time and peak memory from 224 to 2048 square, a fresh process for each point: python benchmarks/scaling.py

One image, inference, float32. The region grid of ours and the twin's is 7 up to 448 pixels, 8 up to 640 and 16 beyond, so that regions of
the first stage keep 64 to 1024 tokens; ConvNeXt-T, which has no attention, shows what growing with the number of pixels looks like. A line
ends where the memory of the machine or LIMIT seconds would not suffice. Times of different processes are not alternated: read them as a
trend. --plot draws the figure again from the saved results.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import memory
from fresh import call
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from record import RESULTS, save

from debiformer.cli import bench

SIZES = (224, 320, 448, 640, 896, 1280, 1664, 2048)
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "scaling.png"
LIMIT = 60.0
START = 30.0  # seconds that a fresh process may take to get ready
MODELS = {  # name in the figure: model, form, colour of Okabe and Ito's palette, marker
    "plain twin": ("debiformer_tiny", "twin", "#D55E00", "s"),
    "DeBiFormer-T": ("debiformer_tiny", "ours", "#0072B2", "o"),
    "ConvNeXt-T": ("convnext_tiny", "ours", "#595959", "^"),
}


def region_grid(size: int) -> int:
    """The grid for square images of this size."""
    return 7 if size <= 448 else 8 if size <= 640 else 16


def sweep(name: str, sizes: list[int], device: str, threads: int) -> list[dict[str, Any]]:
    """One model at growing sizes, until it does not fit or takes too long."""
    model, form, *_ = MODELS[name]
    rows: list[dict[str, Any]] = []
    for size in sizes:
        bench.tell(f"{name} at {size}")
        grid = {"region_grid": region_grid(size)} if model.startswith("debiformer") else {}
        case = dict(model=model, form=form, size=[size, size], device=device, threads=threads, repeats=5) | grid
        found = call(memory.__file__, case, seconds=START + LIMIT)
        if found is None:
            break
        rows.append({"model": name, "size": size, "grid": grid.get("region_grid", ""), **found})
        if found["s"] > LIMIT:
            break
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """The figure of the README, two panels on logarithmic axes."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), layout="constrained")
    for axis, key, title, scale in zip(axes, ("s", "MB"), ("seconds per image", "peak extra memory, GB"), (1, 1e-3), strict=True):
        for name, (_, _, colour, marker) in MODELS.items():
            points = [(row["size"], scale * row[key]) for row in rows if row["model"] == name]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.8, label=name)
        axis.set(xscale="log", yscale="log", title=title, xlabel="image height and width, pixels")
        axis.xaxis.set_major_locator(FixedLocator([224, 448, 896, 2048]))
        axis.xaxis.set_minor_locator(NullLocator())
        for numbers in (axis.xaxis, axis.yaxis):
            numbers.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    """Sweep all models, or draw again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", action="store_true", help="draw the figure from the saved results")
    options = parser.parse_args()
    if options.plot:
        return plot(json.loads((RESULTS / "scaling.json").read_text())["results"])
    rows = [row for name in MODELS for row in sweep(name, options.sizes, options.device, options.threads)]
    print(bench.table(rows))
    if options.device != "cpu":
        print(save("scaling_gpu", rows, options.device))
        return None
    print(save("scaling", rows))
    return plot(rows)


if __name__ == "__main__":
    main()
