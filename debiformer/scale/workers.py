"""A worker: predicts the images of a part and writes its file, part after part, on one device."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from PIL import Image

from ..data.images import UnreadableImage, shown
from .findings import Finder, Labels
from .memory import BatchSize, batch_size
from .reading import Item, ahead, load, read
from .sources import Part
from .storage import Output, PartFile

PAUSES = (0, 5, 60)  # seconds before each attempt at a part
ORDINARY = (256, 256)  # pixels of an image that any model takes
READERS = 4  # threads that fetch and decode, at least: they wait for disks and networks most of the time


class Setting(NamedTuple):
    """What workers are given: how images become rows, where the rows go, and what a worker may use."""

    finder: Finder
    schema: pa.Schema
    output: str
    column: str
    device: str
    cpus: int
    memory: int  # bytes of a CPU worker's share; a GPU knows its own
    batch: int | None  # images, or None for as many as fit


class Report(NamedTuple):
    """What became of a part; `problem` is what kept it from being done, in which case it has no file."""

    number: int
    images: int
    errors: int
    batch: str
    problem: str | None


class Worker:
    """Called with parts, one at a time, by Ray Data: what stays between them is the model.

    Args:
        setting: What it is given.

    Raises:
        MemoryError: If not even one image fits into the memory.
    """

    def __init__(self, setting: Setting) -> None:
        torch.set_num_threads(setting.cpus)
        self.setting, self.finder, self.output = setting, setting.finder, Output(setting.output)
        self.finder.task.to(setting.device)
        self.batch = self._batch()
        self.images = self.batch.images  # of a batch, which may turn out to be too many
        self.readers = max(READERS, 2 * setting.cpus)
        self.pool = ThreadPoolExecutor(self.readers)

    def _batch(self) -> BatchSize:
        if not isinstance(self.finder, Labels):
            return BatchSize(1, "images keep their sizes")
        if self.setting.batch is not None:
            return BatchSize(self.setting.batch, "as asked for")
        image = self.finder.example()
        memory = torch.cuda.mem_get_info()[0] if image.is_cuda else self.setting.memory
        return batch_size(self.finder.forward, image[0], memory)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Predict a part, given and reported as the fields of `Part` and `Report`."""
        part, problem = Part(**row), ""
        for pause in PAUSES:
            time.sleep(pause)
            try:
                images, errors = self.predict(part)
                return Report(part.number, images, errors, f"{self.batch.images} ({self.batch.reason})", None)._asdict()
            except OSError as error:
                problem = str(error)
        return Report(part.number, 0, 0, "", f"{problem} ({len(PAUSES)} attempts)")._asdict()

    def predict(self, part: Part) -> tuple[int, int]:
        """Write the file of a part; how many rows it has, and how many of them hold an error.

        Raises:
            OSError: If something cannot be read or written that another attempt may.
        """
        images = errors = 0
        most = max(self.readers, 2 * self.images)
        with PartFile(self.output, part.number, self.setting.schema) as file:
            prepared = ahead(self.pool, self.prepare, read(part, self.setting.column), most)
            for rows in self.rows(prepared):
                file.write(rows)
                images += len(rows)
                errors += sum(row["error"] is not None for row in rows)
        return images, errors

    def prepare(self, item: Item) -> tuple[str, Any]:
        """An item's name, and what the finder makes of its image, or why there is none."""
        try:
            return item.name, self.finder.prepare(load(item))
        except UnreadableImage as error:
            return item.name, error

    def rows(self, prepared: Iterator[tuple[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """The rows of images, a batch at a time."""
        while batch := list(islice(prepared, self.images)):
            found = iter(self.find([made for _, made in batch if not isinstance(made, UnreadableImage)]))
            yield [
                {"path": shown(name), "error": str(made).removeprefix(f"{name}: ")}
                if isinstance(made, UnreadableImage)
                else {"path": shown(name), "error": None} | next(found)
                for name, made in batch
            ]

    def find(self, prepared: Sequence[Any]) -> list[dict[str, Any]]:
        """Rows of images; where the memory does not suffice, half as many at a time, from then on.

        Raises:
            RuntimeError, ValueError: If the model fails for an ordinary image too.
        """
        if not prepared:
            return []
        try:
            return self.finder.find(prepared)
        except torch.AcceleratorError:  # of the device, not of an image
            raise
        except (RuntimeError, ValueError) as error:
            too_much = isinstance(error, torch.OutOfMemoryError)
            if not too_much and (len(prepared) > 1 or self.finder.together):
                raise
            reason = str(error).splitlines()[0]
        torch.cuda.empty_cache()
        if len(prepared) == 1:  # the model cannot take an image of this size, unless it takes none
            self.finder.find([self.finder.prepare(Image.new("RGB", ORDINARY))])
            return [{"error": reason}]
        half = (len(prepared) + 1) // 2
        self.images = min(self.images, half)
        return self.find(prepared[:half]) + self.find(prepared[half:])
