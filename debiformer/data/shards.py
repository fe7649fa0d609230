"""Images in tar shards, as WebDataset writes them: read from end to end, local or remote, in an order that seed and epoch settle."""

import io
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..seeding import Use, reseed, run_seed, seed_from
from .base import ResumableLoader, Sample, collate
from .classification import ImageData
from .images import SUFFIXES, UnreadableImage, decode_image

PAUSES = (0, 1, 5, 30)  # seconds before each attempt to open a shard
Raw = dict[str, Any]  # of one image: its files by suffix, and __key__ and __url__


class TarShards(ImageData):
    """Shards with `KEY.jpg` (or another image) and `KEY.cls`, its target as text, for each image.

    A shard is read by one process of the run: there must be as many as processes that load images. Each process shuffles blocks of
    images in memory. Where the shards of a process hold fewer images than its share of the epoch, it begins them again.

    Args:
        train, val: Paths or URLs, in which braces count: `data/train-{0000..1281}.tar`, `https://host/val-{00..49}.tar`, `pipe:COMMAND`.
        train_images, val_images: How many images they hold.
        class_names: Names in the order of the targets, or a text file with one on each line.
        block: Images that a process holds in memory to shuffle them.
        options: As for `ImageData`.

    Raises:
        ModuleNotFoundError: If `webdataset` is not installed.
        FileNotFoundError: If a shard on disk, or the file of class names, is missing.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        train: str,
        val: str,
        train_images: int,
        val_images: int,
        class_names: list[str] | str,
        block: int = 2000,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        try:
            from webdataset.shardlists import expand_urls
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('tar shards take another package: pip install "debiformer[data]"') from error
        for name, value in {"train_images": train_images, "val_images": val_images, "block": block}.items():
            if value < 1:
                raise ValueError(f"{name}={value} is not positive")
        self.shards = {"train": list(expand_urls(train)), "val": list(expand_urls(val))}
        self.counts, self.block = {"train": train_images, "val": val_images}, block
        for split, urls in self.shards.items():
            missing = [url for url in urls if ":" not in url and not Path(url).is_file()]
            if missing:
                raise FileNotFoundError(f"{split}: no such shard: {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}")
        self.class_names = Path(class_names).read_text().split("\n") if isinstance(class_names, str) else class_names
        self.class_names = [name.strip() for name in self.class_names if name.strip()]

    def train_dataloader(self) -> DataLoader:
        """Batches of one size; after a restart, those that the run had not yet seen."""
        rank, world_size = self.process()
        batches = self.counts["train"] // (self.batch_size * world_size)
        if not batches:
            raise ValueError(f"train_images={self.counts['train']} do not fill a batch of {self.batch_size} on {world_size} processes")
        readers = max(self.num_workers, 1) * world_size
        if len(self.shards["train"]) < readers:
            few = f"{len(self.shards['train'])} shards cannot be spread over {readers} processes that load"
            raise ValueError(f"{few}: lower data.num_workers, or make more shards")
        sizes = dict(images=self.counts["train"], images_per_batch=self.batch_size * world_size)
        self.check_layout(**sizes, shards=len(self.shards["train"]), processes=world_size, loading_processes_of_each=self.num_workers)
        position = self.position(batches)
        return self._loader(TrainingStream(self, batches, position, rank, world_size))

    def val_dataloader(self) -> DataLoader:
        """All validation images."""
        return self._loader(EvaluationStream(self, *self.process()))

    def test_dataloader(self) -> DataLoader:
        """Raises a ValueError: there are none."""
        raise ValueError("tar shards are to train and to validate on: give data.val the shards to test on, and run validate")

    def _loader(self, stream: "Stream") -> DataLoader:
        return ResumableLoader(stream, self.batch_size, collate_fn=collate, **self.loader_options())


class Stream(IterableDataset[Sample]):
    """What both streams share: the shards of a data module, and reading them."""

    def __init__(self, data: TarShards, split: str, transform: Callable[[Image.Image], Any], rank: int, world_size: int) -> None:
        self.urls, self.images = data.shards[split], data.counts[split]
        self.transform, self.blank, self.batch_size, self.classes = transform, data.blank, data.batch_size, data.num_classes
        self.rank, self.world_size, self.seed = rank, world_size, run_seed()
        self.workers = max(data.num_workers, 1)

    def read(self, urls: list[str], damaged: list[str]) -> Iterator[Raw]:
        """The raw images of shards, one after the other; what cannot be read of a shard is passed over, with a message in `damaged`.

        Raises:
            OSError: If nothing can be read of a shard, after some attempts: it is not there, or the network is down.
        """
        for url in urls:
            yield from self._read_shard(url, damaged)

    def _read_shard(self, url: str, damaged: list[str]) -> Iterator[Raw]:
        from webdataset.tariterators import tarfile_samples

        errors: list[str] = []

        def note(error: Exception) -> bool:
            errors.append(" ".join(map(str, error.args)))
            return True

        for pause in PAUSES:
            time.sleep(pause)
            errors.clear()
            found = False
            for raw in tarfile_samples([{"url": url}], handler=note):
                found = True
                yield raw
            if found or not errors:
                damaged += errors
                return
        raise OSError(f"shard {url} cannot be opened, in {len(PAUSES)} attempts: {errors[-1]}")

    def decode(self, raw: Raw) -> tuple[Image.Image, int]:
        """Image and target; raises UnreadableImage, and a ValueError for a target that is no class."""
        name = name_of(raw)
        suffix = next((key for key in raw if f".{key.rpartition('.')[2]}" in SUFFIXES), None)
        if suffix is None or "cls" not in raw:
            raise UnreadableImage(f"{name} has the files {', '.join(key for key in raw if not key.startswith('__'))}: no image, or no cls")
        label = raw["cls"].decode().strip()
        if not label.isdigit() or int(label) >= self.classes:
            raise ValueError(f"{name}: the target {label!r} is not one of the {self.classes} classes, 0 to {self.classes - 1}")
        return decode_image(io.BytesIO(raw[suffix]), name), int(label)


def name_of(raw: Raw) -> str:
    """Shard and key."""
    return f"{raw['__url__']}: {raw['__key__']}"


class TrainingStream(Stream):
    """Images for one process of a run, epoch after epoch: each pass is the next one.

    Batch b of an epoch comes from loading process b modulo their number, whose shards and whose blocks depend on seed, epoch and that
    number. A place in the stream is one image of the shards; where it cannot be read, the next that can stands in. A run that goes on
    in mid-epoch reads the shards of that epoch from their beginning, without decoding what it has seen.
    """

    def __init__(self, data: TarShards, batches: int, position: tuple[int, int], rank: int, world_size: int) -> None:
        super().__init__(data, "train", data.augment, rank, world_size)
        self.batches, self.block, (self.epoch, self.first) = batches, data.block, position

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        epoch, first, self.epoch, self.first = self.epoch, self.first, self.epoch + 1, 0
        worker = ((info.id if info else 0) + first) % self.workers  # the loader begins with its first process, wherever the epoch does
        begin, end = (self.batch_size * len(range(worker, batch, self.workers)) for batch in (first, self.batches))
        slot = self.rank * self.workers + worker
        order = torch.randperm(len(self.urls), generator=torch.Generator().manual_seed(seed_from(Use.ORDER, self.seed, epoch))).tolist()
        damaged: list[str] = []
        mine = [self.urls[index] for index in order[slot :: self.world_size * self.workers]]
        waiting: list[int] = []  # places whose image is still to be found
        for place, raw in enumerate(self._shuffled(mine, (epoch, slot), begin, damaged), begin):
            waiting.append(place)
            try:
                image, target = self.decode(raw)
            except UnreadableImage as error:
                damaged.append(str(error))
                continue
            for late in waiting:
                if late == end:
                    return
                reseed(Use.IMAGE, self.seed, epoch, slot, late, devices=False)
                yield Sample(self.transform(image), target, name_of(raw), damaged.copy())
                damaged.clear()  # which the reader goes on to fill
            waiting = []

    def _shuffled(self, urls: list[str], key: tuple[int, int], begin: int, damaged: list[str]) -> Iterator[Raw]:
        """The images of shards from place `begin` on, without end: read again and again, in blocks that are shuffled one by one."""
        place = 0
        while True:
            raws = self.read(urls, damaged)
            start_of_pass = place
            while block := list(islice(raws, self.block)):
                if place + len(block) > begin:
                    order = torch.randperm(
                        len(block), generator=torch.Generator().manual_seed(seed_from(Use.ORDER, self.seed, *key, place))
                    )
                    yield from (block[index] for index in order.tolist()[max(begin - place, 0) :])
                place += len(block)
            if place == start_of_pass:
                raise UnreadableImage(f"no image can be read from {', '.join(urls[:3])}{describe(damaged)}")


class EvaluationStream(Stream):
    """Every image once: each loading process of the run reads all shards and decodes its share.

    Shares are filled up to whole batches, as many on every process, with images that are not counted.
    """

    def __init__(self, data: TarShards, rank: int, world_size: int) -> None:
        super().__init__(data, "val", data.evaluate, rank, world_size)
        self.readers = world_size * self.workers
        self.share = -(-self.images // (self.readers * self.batch_size)) * self.batch_size

    def __len__(self) -> int:
        return self.share * self.workers

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        slot = self.rank * self.workers + (info.id if info else 0)
        damaged: list[str] = []
        found = given = 0
        for found, raw in enumerate(self.read(self.urls, damaged), 1):
            if (found - 1) % self.readers != slot or found > self.images:
                continue
            given += 1
            try:
                image, target = self.decode(raw)
                yield Sample(self.transform(image), target, name_of(raw), damaged.copy())
            except UnreadableImage as error:
                yield self.blank._replace(damaged=[*damaged, str(error)])
            damaged.clear()
        if found != self.images:
            raise ValueError(f"val_images={self.images}, but {self.urls[0]} and the like hold {found} images{describe(damaged)}")
        for _ in range(self.share - given):
            yield self.blank


def describe(damaged: list[str]) -> str:
    """What could not be read, for the end of a message."""
    return f"; not readable: {'; '.join(damaged[:3])}" if damaged else ""
