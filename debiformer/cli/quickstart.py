"""Command quickstart: train, test and explain a small DeBiFormer on the bundled blood cells, on a CPU in about two minutes."""

import argparse
import sys
import time
from itertools import count
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from ..data.blood_cells import SAMPLE, LinearBaseline, crop, linear_baseline, whole_images
from ..data.images import eval_transform, read_image
from ..explain import RoutingTrace, tracing
from ..explain.figures import COLOURS, Example, overview
from ..tasks.classification import ClassificationTask, ClassScore
from ..tasks.prediction import PREPROCESSING, load_classifier, predict
from . import training

RUNS = Path("runs")
SHOWN = 1  # of the bundled whole images


def run(arguments: list[str]) -> int:
    """Train, test, compare, draw; the run lies in runs/quickstart, or in quickstart-2 and so on where that exists."""
    parser = argparse.ArgumentParser(prog="debiformer quickstart", description=__doc__, epilog="Other options go to debiformer fit.")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data (default 0)")
    options, rest = parser.parse_known_args(arguments)
    name = next(n for i in count(1) if not (RUNS / (n := "quickstart" if i == 1 else f"quickstart-{i}")).exists())
    console = Console(file=sys.stdout)
    console.print("Training on crops of blood cells; the crops of the test come from other images.\n")
    started = time.perf_counter()
    # A CPU even where there is an accelerator: a model this small gains nothing, and the run is the same everywhere.
    line = [
        "--config=blood_cells",
        f"--name={name}",
        f"--seed_everything={options.seed}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_model_summary=false",
    ]
    cli = training.run("fit", [*line, f"--trainer.default_root_dir={RUNS}", *rest])
    seconds = time.perf_counter() - started
    task = load_classifier(cli.folder / "checkpoints" / "best.ckpt")
    (scores,) = cli.trainer.test(task, datamodule=cli.datamodule, verbose=False)
    print_comparison(console, task, scores["test/balanced_acc"], linear_baseline(), seconds)
    figure = cli.folder / "quickstart.png"
    draw(task, figure, seconds)
    next_steps(console, cli.folder, figure)
    return 0


def print_comparison(console: Console, task: ClassificationTask, balanced: float, linear: LinearBaseline, seconds: float) -> None:
    """Accuracy of each class beside that of a linear classifier on the raw pixels of the same crops."""
    scores: list[ClassScore] = task.class_scores
    table = Table(title=f"Test crops labelled rightly ({seconds:.0f} s of training)", title_justify="left")
    table.add_column("class")
    for heading in ("crops", "linear on raw pixels", task.hparams["model"]):
        table.add_column(heading, justify="right")
    for score in scores:
        table.add_row(score.name, str(score.images), f"{linear.class_accuracy[score.name]:.3f}", f"{score.recall:.3f}")
    table.add_section()
    table.add_row("balanced (mean)", str(sum(s.images for s in scores)), f"{linear.balanced_accuracy:.3f}", f"{balanced:.3f}")
    console.print(table)


def draw(task: ClassificationTask, path: Path, seconds: float) -> None:
    """One figure: every cell of a whole test image with its prediction, and for one cell of each class where the model looked."""
    matplotlib.use("agg")
    file, boxes = whole_images()[SHOWN]
    image = read_image(file)
    transform = eval_transform(**{name: task.hparams[name] for name in PREPROCESSING})
    crops = [crop(image, box) for box in boxes]
    guesses = [prediction.guesses[0] for prediction in predict(task, ((file, cell) for cell in crops), transform)]
    examples = []
    for name in task.hparams["class_names"]:
        largest = max((i for i, box in enumerate(boxes) if box.label == name), key=lambda i: boxes[i].x1 - boxes[i].x0)
        title = f"{name}\n{guesses[largest].probability:.0%} {guesses[largest].label}"
        examples.append(explain(task, transform(crops[largest]), title))
    labels = [guess.label for guess in guesses]
    right = sum(label == box.label for label, box in zip(labels, boxes, strict=True))
    headline = f"{task.hparams['model']} after {seconds:.0f} s of training on a CPU"
    title = f"{headline}: {right} of {len(boxes)} cells of an unseen image labelled rightly"
    colours = dict(zip(task.hparams["class_names"], COLOURS, strict=False))
    overview(image, boxes, labels, examples, colours, title).savefig(path, dpi=110)


@torch.no_grad()
def explain(task: ClassificationTask, pixels: torch.Tensor, title: str) -> Example:
    """Where the first two stages of the model look in an input (3, H, W)."""
    with tracing(task.model) as traces:
        task(pixels[None].to(task.device))
    mean, std = (torch.tensor(task.hparams[name]).view(3, 1, 1) for name in ("mean", "std"))
    seen = ((pixels * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    routed, deformable = (traces[name] for name in ("stages.1.blocks.0.mixer", "stages.0.blocks.1.mixer"))
    assert isinstance(routed, RoutingTrace)
    return Example(Image.fromarray(seen), title, points=deformable, routing=routed, attention=deformable)


def next_steps(console: Console, folder: Path, figure: Path) -> None:
    """What to look at and what to try."""
    best = folder / "checkpoints" / "best.ckpt"
    console.print(f"\nLook at   {figure}", soft_wrap=True)
    console.print("\nNext:", soft_wrap=True)
    for command in (
        f"debiformer app {best}",
        f"debiformer predict --checkpoint {best} {SAMPLE / 'test' / 'wbc'}",
        "debiformer fit --config image_folder --data.root YOUR_FOLDER_OF_CLASS_FOLDERS",
        "debiformer models",
    ):
        console.print(f"  {command}", soft_wrap=True, highlight=False)
