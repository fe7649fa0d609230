"""What validate and test show of a detector: average precision as COCO counts it, every class, pictures with their boxes."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from rich.table import Table
from rich.text import Text

from ..data.masks import default_palette
from ..explain.boxes import draw
from ..models.detector import Boxes
from ..tasks.detection import DetectionTask
from .reporting import Job, Pictures, add_speeds, show, write

ROWS = {"map": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP small", "ap_medium": "AP medium", "ap_large": "AP large"}


def add_arguments(parser: LightningArgumentParser, command: str) -> None:
    """Add the options of validate or test."""
    parser.add_argument("--pictures", type=int, default=4, help="Images to draw with what was found and given (default 4).")
    parser.add_argument("--min_score", type=float, default=0.5, help="Least score of what is drawn (default 0.5).")


def report(trainer: Trainer, task: DetectionTask, data: LightningDataModule, command: str, options: Any, settings: dict) -> None:
    """Evaluate, and show and write what was found; every process of a run must take part.

    Args:
        trainer, task, data: Which evaluates what on which images.
        command: validate or test.
        options: Those of `add_arguments`, and `ckpt_path`.
        settings: What the record says of the data.

    Raises:
        PermissionError: If the output folder cannot be written.
    """
    job = Job.of(trainer, task, data, command, options)
    pictures = Detections(options.pictures, job.folder / "pictures", options.min_score, task.hparams["class_names"])
    scores = job.evaluate(pictures)
    if not trainer.is_global_zero:
        return
    record = job.record(settings) | {name: task.hparams[name] for name in ("backbone", "detector", "short_side", "long_side")}
    record |= {"scores": scores, "classes": [score._asdict() for score in task.class_scores]}
    masks = "mask_map" in scores
    table = Table("", "boxes", *(["masks"] if masks else []), title=job.heading, title_justify="left")
    for name, shown in ROWS.items():
        table.add_row(shown, *(precision(scores[f"{prefix}{name}"]) for prefix in ("", "mask_")[: 1 + masks]))
    add_speeds(table, scores)
    show(table)
    classes = Table("class", "AP of boxes", *(["AP of masks"] if masks else []), title="per class", title_justify="left")
    for score in task.class_scores:
        classes.add_row(Text(score.name), *(precision(value) for value in score[1:] if value is not None))
    show(classes)
    write(record, job.folder / "metrics.json")
    for file in pictures.written:
        print(f"written  {file}")


def precision(value: float) -> str:
    """An average precision for the screen; - where the data has nothing of the kind."""
    return "-" if value < 0 else f"{value:.4f}"


class Detections(Pictures):
    """What was found with at least `min_score` on the left, what was given on the right; `names` are those of the classes."""

    def __init__(self, count: int, folder: Path, min_score: float, names: list[str]) -> None:
        super().__init__(count, folder)
        self.min_score, self.names, self.palette = min_score, names, default_palette(len(names))

    def draw(self, image: Image.Image, found: Boxes, given: Boxes) -> list[Image.Image]:
        """The two pictures."""
        kept = {name: value[found["scores"] >= self.min_score].cpu() for name, value in found.items()}
        told_apart = ~given["crowd"].cpu()
        right: Boxes = {name: given[name].cpu()[told_apart] for name in ("boxes", "labels", "masks") if name in given}
        if "masks" in right:
            right["masks"] = right["masks"][:, None]
        return [draw(image, boxes, self.names, self.palette) for boxes in (kept, right)]
