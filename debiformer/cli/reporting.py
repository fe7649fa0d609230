"""What evaluation has to show, on the screen and in files, whatever the task."""

import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torchmetrics
from lightning.pytorch import Callback, Trainer
from PIL import Image
from rich.console import Console
from rich.table import Table

from ..data.images import read_image
from ..tasks.checkpointing import versions
from ..tasks.evaluation import Stopwatch, evaluation_folder, run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


WIDEST = 1600  # pixels of a row of pictures


class Job(NamedTuple):
    """What is to be evaluated, and where to."""

    trainer: Trainer
    task: Any
    data: Any  # one of our data modules, or another one that tells its classes and preprocessing
    command: str  # validate or test
    checkpoint: Path
    folder: Path  # of what is written

    @classmethod
    def of(cls, trainer: Trainer, task: Any, data: Any, command: str, options: Any) -> "Job":
        """A job with the folder that the command line asks for."""
        checkpoint = Path(options.ckpt_path)
        return cls(trainer, task, data, command, checkpoint, Path(options.output or evaluation_folder(checkpoint) / command))

    def check(self) -> None:
        """Raise a PermissionError where the folder cannot be written."""
        if self.trainer.is_global_zero:
            check_folder(self.folder)

    def record(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What was evaluated, how and where, for a file that may be read years later."""
        return {
            "command": self.command,
            "checkpoint": str(self.checkpoint),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions() | {"torchmetrics": torchmetrics.__version__},
            "device": device_name(self.trainer.strategy.root_device),
            "processes": self.trainer.world_size,
            "precision": self.trainer.precision,
            "data": settings,
        }

    def evaluate(self, pictures: "Pictures") -> dict[str, Any]:
        """Evaluate and draw; scores by name, and speeds in images per second. Every process of a run must take part.

        Raises:
            PermissionError: If the folder cannot be written.
        """
        self.check()
        stopwatch = Stopwatch()
        found = run(self.trainer, self.task, self.data, self.command, stopwatch, pictures)
        scores = {name.partition("/")[2]: value for name, value in found.items()}
        return scores | {"forward_speed": stopwatch.forward_speed, "whole_speed": stopwatch.whole_speed}

    @property
    def heading(self) -> str:
        """What was done where, for the screen."""
        processes = f", {self.trainer.world_size} processes" if self.trainer.world_size > 1 else ""
        return f"{self.command} on {device_name(self.trainer.strategy.root_device)}{processes}"


class Pictures(Callback):
    """Draws the first images of an evaluation with what was found and what was given; a subclass says how.

    Args:
        count: How many.
        folder: Where to.

    Attributes:
        written: The files.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        self.written: list[Path] = []

    def draw(self, image: Image.Image, found: Any, given: Any) -> list[Image.Image]:
        """The pictures that stand side by side."""
        raise NotImplementedError

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw what is still to be drawn; what stands in for an image that could not be read is left out."""
        if not trainer.is_global_zero:
            return
        for name, found, given in zip(batch.names, outputs["found"], batch.targets, strict=True):
            if len(self.written) == self.count:
                return
            if not name:
                continue
            self.folder.mkdir(parents=True, exist_ok=True)
            self.written.append(self.folder / f"{len(self.written)}_{Path(name).stem}.jpg")
            in_a_row(self.draw(read_image(name), found, given)).save(self.written[-1], quality=90)

    on_test_batch_end = on_validation_batch_end


def in_a_row(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, made smaller where they would be very wide."""
    width, height = pictures[0].size
    row = Image.new("RGB", (len(pictures) * width, height))
    for index, picture in enumerate(pictures):
        row.paste(picture, (index * width, 0))
    row.thumbnail((WIDEST, WIDEST))
    return row


def check_folder(folder: Path) -> None:
    """Make a folder that can be written, or raise a PermissionError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(f"the folder {folder} cannot be written ({error.strerror}): name another with --output") from error


def device_name(device: torch.device) -> str:
    """What a speed was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"a CPU with {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type


def speed(images_per_second: float | None) -> str:
    """A speed for the screen."""
    return "-" if images_per_second is None else f"{images_per_second:.1f}"


def add_speeds(table: Table, scores: dict[str, Any]) -> None:
    """Add the speeds that `Job.evaluate` found to a table of scores."""
    table.add_row("images/s of the model", speed(scores["forward_speed"]))
    table.add_row("images/s, reading included", speed(scores["whole_speed"]))


def show(table: Table) -> None:
    """Print a table."""
    Console(file=sys.stdout).print(table)


def write(record: dict[str, Any], file: Path) -> None:
    """Write a record as JSON, in which what is not a number, such as the precision of a label never given, is null."""
    file.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")
    print(f"written  {file}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def can_draw(name: str) -> bool:
    """Whether figures can be drawn; says what to do where they cannot."""
    if find_spec("matplotlib") is None:
        print(f'no {name}: figures take matplotlib: pip install "debiformer[explain]"')
        return False
    return True


def save(figure: "Figure", file: Path) -> None:
    """Write a figure."""
    figure.savefig(file, dpi=110)
    print(f"written  {file}")
