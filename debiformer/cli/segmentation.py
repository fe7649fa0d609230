"""What validate and test show of a segmentation: mean IoU and accuracies, every class, pictures with their masks."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..data.masks import overlay
from ..tasks.segmentation import SegmentationTask
from .reporting import Job, Pictures, add_speeds, show, write


def add_arguments(parser: LightningArgumentParser, command: str) -> None:
    """Add the options of validate or test."""
    parser.add_argument("--pictures", type=int, default=4, help="Images to draw with the masks found and given (default 4).")


def report(trainer: Trainer, task: SegmentationTask, data: LightningDataModule, command: str, options: Any, settings: dict) -> None:
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
    pictures = Masks(options.pictures, job.folder / "pictures", task.hparams["palette"])
    scores = job.evaluate(pictures)
    if not trainer.is_global_zero:
        return
    inference = {name: task.hparams[name] for name in ("short_side", "long_side", "window", "stride", "scales", "flip")}
    record = job.record(settings) | {"backbone": task.hparams["backbone"], "head": task.hparams["head"], "inference": inference}
    record |= {"scores": scores, "classes": [score._asdict() for score in task.class_scores]}
    table = Table(title=job.heading, title_justify="left", show_header=False)
    for name, value in {"mIoU": scores["miou"], "mAcc": scores["macc"], "aAcc": scores["aacc"]}.items():
        table.add_row(name, f"{value:.4f}")
    add_speeds(table, scores)
    show(table)
    classes = Table("class", title="per class", title_justify="left")
    for column in ("pixels", "IoU", "accuracy"):
        classes.add_column(column, justify="right")
    for score in task.class_scores:
        classes.add_row(Text(score.name), str(score.pixels), f"{score.iou:.4f}", f"{score.accuracy:.4f}")
    show(classes)
    write(record, job.folder / "metrics.json")
    for file in pictures.written:
        print(f"written  {file}")


class Masks(Pictures):
    """An image as it is, with the mask that was found, and with the one that was given; `palette` has the colours of the classes."""

    def __init__(self, count: int, folder: Path, palette: list[tuple[int, int, int]]) -> None:
        super().__init__(count, folder)
        self.palette = palette

    def draw(self, image: Image.Image, found: Tensor, given: Tensor) -> list[Image.Image]:
        """The three pictures."""
        return [image, *(overlay(image, mask.cpu().numpy().astype(np.uint8), self.palette) for mask in (found, given))]
