"""What validate and test show of a segmentation: mean IoU and accuracies, every class, pictures with their masks."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from rich.table import Table
from rich.text import Text

from ..data.images import read_image
from ..data.masks import overlay
from ..tasks.evaluation import Stopwatch, run
from ..tasks.segmentation import SegmentationTask
from .reporting import Job, show, speed, write

SIDE_BY_SIDE = 1600  # pixels that pictures side by side are at most wide


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
    job.check()
    stopwatch, pictures = Stopwatch(), Pictures(options.pictures, job.folder / "pictures", task.hparams["palette"])
    found = run(trainer, task, data, command, stopwatch, pictures)
    if not trainer.is_global_zero:
        return
    scores = {name.partition("/")[2]: value for name, value in found.items()}
    inference = {name: task.hparams[name] for name in ("short_side", "long_side", "window", "stride", "scales", "flip")}
    speeds = {"forward_speed": stopwatch.forward_speed, "whole_speed": stopwatch.whole_speed}
    record = job.record(settings) | {"backbone": task.hparams["backbone"], "head": task.hparams["head"], "inference": inference}
    record |= {"scores": scores | speeds, "classes": [score._asdict() for score in task.class_scores]}
    table = Table(title=job.heading, title_justify="left", show_header=False)
    for name, value in {"mIoU": scores["miou"], "mAcc": scores["macc"], "aAcc": scores["aacc"]}.items():
        table.add_row(name, f"{value:.4f}")
    table.add_row("images/s of the model", speed(stopwatch.forward_speed))
    table.add_row("images/s, reading included", speed(stopwatch.whole_speed))
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


class Pictures(Callback):
    """Draws the first images of an evaluation: as they are, with the mask that was found, and with the one that was given.

    Args:
        count: How many.
        folder: Where to.
        palette: Colours of the classes.

    Attributes:
        written: The files.
    """

    def __init__(self, count: int, folder: Path, palette: list[tuple[int, int, int]]) -> None:
        self.count, self.folder, self.palette = count, folder, palette
        self.written: list[Path] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw what is still to be drawn."""
        if not trainer.is_global_zero:
            return
        for name, found, given in zip(batch.names, outputs["classes"], batch.targets, strict=True):
            if len(self.written) == self.count:
                return
            if name:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.written.append(self.folder / f"{len(self.written)}_{Path(name).stem}.jpg")
                masks = [mask.cpu().numpy().astype(np.uint8) for mask in (found, given)]
                side_by_side(read_image(name), masks, self.palette).save(self.written[-1], quality=90)

    on_test_batch_end = on_validation_batch_end


def side_by_side(image: Image.Image, masks: list[np.ndarray], palette: list[tuple[int, int, int]]) -> Image.Image:
    """An image, and the same with each mask over it, in a row."""
    pictures = [image, *(overlay(image, mask, palette) for mask in masks)]
    row = Image.new("RGB", (len(pictures) * image.width, image.height))
    for index, picture in enumerate(pictures):
        row.paste(picture, (index * image.width, 0))
    row.thumbnail((SIDE_BY_SIDE, SIDE_BY_SIDE))
    return row
