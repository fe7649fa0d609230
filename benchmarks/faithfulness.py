"""How true maps are to the model: python benchmarks/faithfulness.py --checkpoint runs/quickstart/checkpoints/best.ckpt [--images N]

On the quickstart's model and the bundled test crops. Deletion: the places that a map ranks highest are painted over first, with the mean
colour of all crops, and the probability of the class that the model gave should fall fast; insertion: they are uncovered first, and it
should rise fast (Petsiuk et al., BMVC 2018). Both are areas under the curve over the share of places, averaged over the crops; the range
of the mean holds 95 % of 1000 bootstraps. Pointing: a cell of the bundled test fields lies in a corner of a crop of twice its side, each
corner in turn, and the peak of the map should lie in its box or in that of another cell of its class; counted where the model gives the
crop this class. Prints the table, writes results/faithfulness.json,
and draws results/faithfulness.png.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot as plt
from record import RESULTS, save
from torch import Tensor
from torch.nn import functional as F

from debiformer.cli import bench
from debiformer.data.blood_cells import SAMPLE, BloodCells, Box, crop
from debiformer.data.images import eval_transform, read_image
from debiformer.explain import rollout, tracing
from debiformer.explain.grad_cam import class_activation
from debiformer.tasks.prediction import PREPROCESSING, load_classifier

TITLES = ("painted over: lower is better", "uncovered: higher is better")
CELLS = 16  # places on a side
STEPS = 16
COLOURS = ("#999999", "#0072B2", "#56B4E9", "#009E73", "#D55E00")


def at_random(model: Any, x: Tensor, label: int) -> Tensor:
    """Noise, the same for the same class and size: what a map must be better than."""
    return torch.rand(x.shape[2:], generator=torch.Generator().manual_seed(label + int(1e6 * x.abs().mean())))


def by_activation(layer: str, method: str) -> Callable[[Any, Tensor, int], Tensor]:
    """A class activation map."""
    return lambda model, x, label: class_activation(model, x, [label], layer, method)[0]


def by_rollout(model: Any, x: Tensor, label: int) -> Tensor:
    """What reaches the last map."""
    with torch.no_grad(), tracing(model) as traces:
        model(x)
    return rollout(traces)


MAPS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "at random": at_random,
    "Grad-CAM, last stage": by_activation("stages.3", "grad_cam"),
    "Grad-CAM, stage 3": by_activation("stages.2", "grad_cam"),
    "LayerCAM, stage 2": by_activation("stages.1", "layer_cam"),
    "attention rollout": by_rollout,
}


def curves(model: Any, x: Tensor, paint: Tensor, label: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of a class while the most important places are painted over, and while they are uncovered; (STEPS + 1,) each."""
    places = F.interpolate(importance[None, None].float(), size=(CELLS, CELLS), mode="bilinear", antialias=True).flatten()
    rank = places.argsort(descending=True).argsort()
    shares = torch.arange(STEPS + 1) * (CELLS * CELLS // STEPS)
    chosen = (rank < shares[:, None]).view(-1, 1, CELLS, CELLS).float()
    mask = F.interpolate(chosen, size=x.shape[2:], mode="nearest")
    with torch.no_grad():
        out = model(torch.cat([x * (1 - mask) + paint * mask, x * mask + paint * (1 - mask)])).softmax(1)[:, label]
    deletion, insertion = out.chunk(2)
    return deletion, insertion


def fields() -> Iterator[tuple[Any, list[Box]]]:
    """The bundled test fields, with all their cells."""
    content = json.loads((SAMPLE / "fields" / "test.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    cells: dict[int, list[Box]] = {image["id"]: [] for image in content["images"]}
    for cell in content["annotations"]:
        x, y, width, height = cell["bbox"]
        cells[cell["image_id"]].append(Box(names[cell["category_id"]], *map(round, (x, y, x + width, y + height))))
    for image in content["images"]:
        yield read_image(SAMPLE / "fields" / "test" / image["file_name"]), cells[image["id"]]


def in_a_corner(image: Any, box: Box, corner: int) -> Box | None:
    """A square of twice the side of a cell, which lies in one of its corners; None where it is not inside of the image."""
    side = max(box.x1 - box.x0, box.y1 - box.y0)
    left, top = (box.x1 - 2 * side if corner % 2 else box.x0), (box.y1 - 2 * side if corner // 2 else box.y0)
    if left < 0 or top < 0 or left + 2 * side > image.width or top + 2 * side > image.height:
        return None
    return Box(box.label, left, top, left + 2 * side, top + 2 * side)


def pointing(model: Any, transform: Any, classes: list[str]) -> dict[str, tuple[int, int]]:
    """Peaks on a cell of the class, and crops that the model gives the class to, for every map."""
    hits = dict.fromkeys(MAPS, 0)
    asked = 0
    for image, boxes in fields():
        for box, corner in product(boxes, range(4)):
            if (window := in_a_corner(image, box, corner)) is None:
                continue
            x, label = transform(crop(image, window))[None], classes.index(box.label)
            with torch.no_grad():
                if int(model(x).argmax()) != label:
                    continue
            asked += 1
            for name, explain in MAPS.items():
                places = explain(model, x, label)
                row, column = divmod(int(places.argmax()), places.shape[1])
                down, across = ((at + 0.5) / side * (window.x1 - window.x0) for at, side in zip((row, column), places.shape, strict=True))
                px, py = window.x0 + across, window.y0 + down
                hits[name] += any(b.label == box.label and b.x0 <= px <= b.x1 and b.y0 <= py <= b.y1 for b in boxes)
    return {name: (count, asked) for name, count in hits.items()}


def bootstrap(values: Tensor) -> tuple[float, float]:
    """The middle 95 % of the means of resampled values."""
    generator = torch.Generator().manual_seed(0)
    means = values[torch.randint(len(values), (1000, len(values)), generator=generator)].mean(1)
    return means.quantile(0.025).item(), means.quantile(0.975).item()


def main() -> None:
    """Every map."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the quickstart")
    parser.add_argument("--images", type=int, default=200, help="test crops, evenly over the classes' folders")
    options = parser.parse_args()
    task = load_classifier(options.checkpoint)
    model, classes = task.model, task.hparams["class_names"]
    transform = eval_transform(**{name: task.hparams[name] for name in PREPROCESSING})
    data = BloodCells().images("test")
    step = max(len(data) // options.images, 1)
    inputs = [transform(data.read(index)[0])[None] for index in range(0, len(data), step)]
    paint = torch.cat(inputs).mean((0, 2, 3), keepdim=True)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in MAPS}
    for number, x in enumerate(inputs):
        bench.tell(f"crop {number + 1} of {len(inputs)}")
        with torch.no_grad():
            label = int(model(x).argmax())
        for name, explain in MAPS.items():
            found[name].append(curves(model, x, paint, label, explain(model, x, label)))
    hits = pointing(model, transform, classes)
    rows, drawn = [], {}
    for name, pairs in found.items():
        deletion, insertion = (torch.stack(part) for part in zip(*pairs, strict=True))
        drawn[name] = deletion.mean(0).tolist(), insertion.mean(0).tolist()
        row: dict[str, Any] = {"map": name}
        for kind, values in (("deletion", deletion), ("insertion", insertion)):
            areas = torch.trapezoid(values, dim=1) / STEPS
            low, high = bootstrap(areas)
            row |= {kind: round(areas.mean().item(), 3), f"{kind} range": f"{low:.3f} to {high:.3f}"}
        rows.append(row | {"pointing, %": round(100 * hits[name][0] / hits[name][1], 1), "crops pointed at": hits[name][1]})
    print(bench.table(rows))
    print(save("faithfulness", {"crops": len(inputs), "rows": rows, "curves": drawn}, packages=["lightning", "grad-cam"]))
    print(plot(drawn))


def plot(drawn: dict[str, tuple[list[float], list[float]]]) -> Path:
    """Both curves of every map."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for kind, axes in enumerate(panels):
        for (name, pair), colour in zip(drawn.items(), COLOURS, strict=True):
            shares = [100 * i / STEPS for i in range(STEPS + 1)]
            axes.plot(shares, pair[kind], color=colour, label=name, linewidth=2, linestyle="--" if name == "at random" else "-")
        axes.set(
            xlabel="share of the crop, the most important first, %",
            title=TITLES[kind],
        )
    panels[0].set_ylabel("mean probability of the class given")
    panels[1].legend(frameon=False, fontsize=9)
    figure.savefig(RESULTS / "faithfulness.png", dpi=110)
    return RESULTS / "faithfulness.png"


if __name__ == "__main__":
    main()
