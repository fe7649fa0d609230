"""What validate and test do with a checkpoint: scores on the screen and in files, later labels of ImageNet, a sweep of sizes and crops."""

from itertools import product
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.table import Table
from rich.text import Text
from torch import nn

from ..data.classification import ImageData, IndexedImages
from ..data.imagenet_labels import ImageNetV2, RealLabels
from ..tasks.classification import ClassificationTask, ClassScore
from ..tasks.evaluation import RealAccuracy, Scores, evaluate, model_at
from ..tasks.prediction import PREPROCESSING, read_hyperparameters
from .reporting import Job, can_draw, save, show, speed, write

Size = tuple[int, int]  # height and width in pixels
LISTED = 50  # classes up to which the screen shows all; of more, the WORST
WORST = 20
DRAWN = 2000  # classes up to which a confusion matrix is drawn


def add_arguments(parser: LightningArgumentParser, command: str) -> None:
    """Add the options of validate or test."""
    several = "several are evaluated one after the other, with the same weights"
    parser.add_argument("--sweep.input_size", nargs="+", type=PositiveInt, default=[], metavar="PIXELS", help=f"Input sizes: {several}.")
    parser.add_argument("--sweep.crop_pct", nargs="+", type=PositiveFloat, default=[], metavar="SHARE", help=f"Centre crops: {several}.")
    if command == "validate":
        parser.add_argument("--real", type=str | None, metavar="FILE", help="ReaL labels of ImageNet's validation images: real.json.")
        parser.add_argument("--v2", type=str | None, metavar="FOLDER", help="Images of ImageNet-V2 to validate on as well.")


def report(trainer: Trainer, task: ClassificationTask, data: LightningDataModule, command: str, options: Any, settings: dict) -> None:
    """Evaluate, and show and write what was found; every process of a run must take part.

    Args:
        trainer, task, data: Which evaluates what on which images.
        command: validate or test.
        options: Those of `add_arguments`, and `ckpt_path`.
        settings: What the record says of the data.

    Raises:
        FileNotFoundError: If the file or the folder of ImageNet's later labels is missing.
        PermissionError: If the output folder cannot be written.
        ValueError: If options, data and checkpoint do not fit.
    """
    job = Job.of(trainer, task, data, command, options)
    real, v2 = options.get("real"), options.get("v2")
    sizes, crops = options.sweep.input_size, options.sweep.crop_pct
    if (sizes or crops) and (real or v2):
        raise ValueError("--sweep goes without --real and --v2: give them together with the size and crop that the sweep finds best")
    if (sizes or crops or real or v2) and not isinstance(data, ImageData):
        raise ValueError(f"--sweep, --real and --v2 need one of the data modules of debiformer.data, not {type(data).__name__}")
    job.check()
    if sizes or crops:
        _sweep(job, [(size, size) for size in sizes], crops, settings)
    else:
        _evaluate(job, real, v2, settings)


def described(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """What was evaluated, for the record."""
    hparams = job.task.hparams
    return job.record(settings) | {"model": hparams["model"], "preprocessing": {name: hparams[name] for name in PREPROCESSING}}


def model_for(job: Job, size: Size) -> nn.Module:
    """The task's model for images of a size; raises ValueError if it takes none of it."""
    return model_at(job.task, size, tuple(read_hyperparameters(job.checkpoint)["input_size"][1:]))


def _evaluate(job: Job, real: str | None, v2: str | None, settings: dict[str, Any]) -> None:
    trainer, task, data, command, checkpoint, folder = job
    accuracy = RealAccuracy(real_labels(real, data).of) if real else None
    later = v2_images(v2, data) if v2 else None
    task.model = model_for(job, task.hparams["input_size"][1:])
    found = evaluate(trainer, task, data, command, *([accuracy] if accuracy else []))
    on_later = evaluate(trainer, task, later, command).scores if later else None
    if not trainer.is_global_zero:
        return
    record = described(job, settings) | {"scores": found.scores._asdict()}
    rows = summary(found.scores)
    if accuracy:
        record["real"] = {"file": real, "top1": accuracy.top1, "images": accuracy.images}
        rows.append(("top-1 by the ReaL labels", f"{accuracy.top1:.4f} of {accuracy.images} images"))
    if on_later:
        record["v2"] = {"folder": v2, **on_later._asdict()}
        rows.append(("top-1 on ImageNet-V2", f"{on_later.top1:.4f} of {on_later.images} images"))
    names = task.hparams["class_names"]
    cells = [(row, column, int(found.confusion[row, column])) for row, column in found.confusion.nonzero().tolist()]
    record["classes"] = [score._asdict() for score in found.classes]
    record["confusion"] = [{"class": names[row], "label": names[column], "images": count} for row, column, count in cells]
    table = Table(title=job.heading, title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    show(table)
    print_class_scores(found.classes)
    write(record, folder / "metrics.json")
    if len(names) > DRAWN:
        print(f"no confusion.png: {len(names)} classes are more than a figure shows")
    elif can_draw("confusion.png"):
        from ..explain.charts import confusion

        save(confusion(found.confusion.numpy(), names, f"{command}: {checkpoint}"), folder / "confusion.png")


def _sweep(job: Job, sizes: list[Size], crops: list[float], settings: dict[str, Any]) -> None:
    trainer, task, data, command, checkpoint, folder = job
    sizes, crops = sizes or [data.input_size[1:]], crops or [data.crop_pct]
    combinations = list(dict.fromkeys(product(sizes, crops)))
    at = [data.evaluated_at(*combination) for combination in combinations]  # all errors before all work
    models = {size: model_for(job, size) for size in sizes}
    found: dict[tuple[Size, float], Scores] = {}
    for (size, crop), images in zip(combinations, at, strict=True):
        task.model = models[size]
        found[size, crop] = evaluate(trainer, task, images, command).scores
    if not trainer.is_global_zero:
        return
    record = described(job, settings)
    del record["preprocessing"]["input_size"], record["preprocessing"]["crop_pct"]
    record["sweep"] = [{"input_size": size, "crop_pct": crop, **scores._asdict()} for (size, crop), scores in found.items()]
    table = Table("size", "crop", title=job.heading, title_justify="left")
    for column in ("top-1", "ece", "images/s of the model"):
        table.add_column(column, justify="right")
    for (size, crop), scores in found.items():
        table.add_row(f"{size[0]}x{size[1]}", f"{crop:g}", f"{scores.top1:.4f}", f"{scores.ece:.4f}", speed(scores.forward_speed))
    show(table)
    write(record, folder / "sweep.json")
    if can_draw("sweep.png"):
        from ..explain.charts import sweep

        save(sweep({key: scores.top1 for key, scores in found.items()}, f"{command}: {checkpoint}"), folder / "sweep.png")


def real_labels(file: str, data: ImageData) -> RealLabels:
    """The ReaL labels of a data module's validation images; raises what `RealLabels` and its `of` raise."""
    labels = RealLabels(file, data.num_classes)
    if isinstance(data, IndexedImages):  # a stream tells its names as it comes
        images = data.images("val")
        for index in range(len(images)):
            labels.of(images.name(index))
    return labels


def v2_images(folder: str, data: ImageData) -> ImageNetV2:
    """ImageNet-V2, prepared and loaded as a data module does with its own images."""
    options = {name: getattr(data, name) for name in ("batch_size", "num_workers", "max_damaged", *PREPROCESSING)}
    return ImageNetV2(folder, data.class_names, **options)


def summary(scores: Scores) -> list[tuple[str, str]]:
    """Names and values for the screen."""
    shares = {
        "top-1": scores.top1,
        "top-5": scores.top5,
        "balanced accuracy": scores.balanced_accuracy,
        "expected calibration error": scores.ece,
        "loss": scores.loss,
    }
    return [
        *((name, f"{value:.4f}") for name, value in shares.items() if value is not None),
        ("images", str(scores.images)),
        ("images/s of the model", speed(scores.forward_speed)),
        ("images/s, reading included", speed(scores.whole_speed)),
    ]


def print_class_scores(scores: list[ClassScore]) -> None:
    """Print recall and precision of every class; of the worst only, where classes are many."""
    title, shown = "per class", scores
    if len(scores) > LISTED:
        shown = sorted((score for score in scores if score.images), key=lambda score: score.recall)[:WORST]
        title = f"per class: the {len(shown)} with the lowest recall of {len(scores)}; metrics.json has all"
    table = Table("class", title=title, title_justify="left")
    for column in ("images", "recall", "precision"):
        table.add_column(column, justify="right")
    for score in shown:
        table.add_row(Text(score.name), str(score.images), f"{score.recall:.4f}", f"{score.precision:.4f}")
    show(table)
