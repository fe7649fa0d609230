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

from ..data.blood_cells import LinearBaseline, crop, linear_baseline, whole_images
from ..data.images import eval_transform, read_image
from ..explain import tracing
from ..explain.figures import COLOURS, Example, overview
from ..tasks.classification import ClassificationTask, ClassScore
from ..tasks.prediction import PREPROCESSING, load_classifier, predict
from . import training

SHOWN = 1  # of the bundled whole images


def run(arguments: list[str]) -> int:
    """Train, test, compare, draw; the run lies in runs/quickstart, or in quickstart-2 and so on where that exists."""
    options = parse(arguments)
    console = Console(file=sys.stdout)
    name = next(n for i in count(1) if not Path("runs", n := "quickstart" if i == 1 else f"quickstart-{i}").exists())
    console.print("Training debiformer_nano on 1595 crops of blood cells; the test crops come from 72 other images.\n")
    started = time.perf_counter()
    fit = [f"--config={options.recipe}", f"--name={name}", f"--seed_everything={options.seed}", *options.rest]
    cli = training.run("fit", fit)
    seconds = time.perf_counter() - started
    task = load_classifier(cli.folder / "checkpoints" / "best.ckpt")
    (scores,) = cli.trainer.test(task, datamodule=cli.datamodule, verbose=False)
    print_comparison(console, task.class_scores, scores["test/balanced_acc"], linear_baseline(), seconds)
    figure = cli.folder / "quickstart.png"
    draw(task, figure, seconds)
    next_steps(console, cli.folder, figure)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of quickstart."""
    parser = argparse.ArgumentParser(prog="debiformer quickstart", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data (default 0)")
    parser.add_argument("--recipe", default="blood_cells", help="recipe to train with (default blood_cells)")
    options, rest = parser.parse_known_args(arguments)
    options.rest = rest
    return options


def print_comparison(console: Console, scores: list[ClassScore], balanced: float, linear: LinearBaseline, seconds: float) -> None:
    """Accuracy of each class beside that of a linear classifier on the raw pixels of the same crops."""
    table = Table(title=f"Test crops labelled rightly ({seconds:.0f} s of training)", title_justify="left")
    table.add_column("class")
    for heading in ("crops", "linear on raw pixels", "debiformer_nano"):
        table.add_column(heading, justify="right")
    for score in scores:
        table.add_row(score.name, str(score.images), f"{linear.class_accuracy[score.name]:.3f}", f"{score.recall:.3f}")
    table.add_section()
    table.add_row("balanced (mean)", str(sum(s.images for s in scores)), f"{linear.balanced_accuracy:.3f}", f"{balanced:.3f}")
    console.print(table)


def draw(task: ClassificationTask, path: Path, seconds: float) -> None:
    """One figure: every cell of a whole test image with its prediction, and for one cell of each class where the model looked."""
    matplotlib.use("agg")
    names = task.hparams["class_names"]
    file, boxes = whole_images()[SHOWN]
    image = read_image(file)
    transform = eval_transform(**{name: task.hparams[name] for name in PREPROCESSING})
    crops = [crop(image, box) for box in boxes]
    guesses = [p.guesses[0] for p in predict(task, ((file, c) for c in crops), transform)]
    largest = {b.label: i for i, b in sorted(enumerate(boxes), key=lambda ib: (ib[1].x1 - ib[1].x0) * (ib[1].y1 - ib[1].y0))}
    examples = [
        explain(task, transform(crops[largest[name]]), f"{name}\n{guesses[largest[name]].probability:.0%} {guesses[largest[name]].label}")
        for name in names
    ]
    right = sum(g.label == b.label for g, b in zip(guesses, boxes, strict=True))
    title = f"debiformer_nano after {seconds:.0f} s of training on a CPU: {right} of {len(boxes)} cells of an unseen image labelled rightly"
    figure = overview(image, boxes, [g.label for g in guesses], examples, dict(zip(names, COLOURS, strict=False)), title)
    figure.savefig(path, dpi=110)


@torch.no_grad()
def explain(task: ClassificationTask, pixels: torch.Tensor, title: str) -> Example:
    """Where the first two stages of the model look in an input (3, H, W)."""
    with tracing(task.model) as traces:
        task(pixels[None].to(task.device))
    mean, std = (torch.tensor(task.hparams[name]).view(3, 1, 1) for name in ("mean", "std"))
    seen = ((pixels * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    routed, deformable = (traces[name] for name in ("stages.1.blocks.0.mixer", "stages.0.blocks.1.mixer"))
    return Example(Image.fromarray(seen), title, points=deformable, routing=routed, attention=deformable)


def next_steps(console: Console, folder: Path, figure: Path) -> None:
    """What to look at and what to try."""
    best = folder / "checkpoints" / "best.ckpt"
    sample = whole_images()[0][0].parents[1] / "test" / "wbc"
    console.print(f"\nLook at   {figure}", soft_wrap=True)
    console.print("\nNext:", soft_wrap=True)
    for command in (
        f"debiformer predict --checkpoint {best} {sample}",
        "debiformer fit --config image_folder --data.root YOUR_FOLDER_OF_CLASS_FOLDERS",
        "debiformer models",
        "python -c \"import debiformer, timm; print(timm.create_model('debiformer_tiny', features_only=True).feature_info.channels())\"",
    ):
        console.print(f"  {command}", soft_wrap=True, highlight=False)
