"""What every data module does, whatever its task: batch, spread over processes, go on after a restart, pass over what is damaged."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from lightning import LightningDataModule
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..progress import batches_done, limited
from ..seeding import Use, reseed, run_seed
from .images import UnreadableImage, check_normalization
from .sampling import PADDING, Draw, EvaluationSampler, TrainingSampler

Prepare = Callable[
    [Image.Image, Any], tuple[Tensor, Any]
]  # an image and its target as read -> uint8 (3, H, W), and the target as it trains


class ImageList(Protocol):
    """Images with targets that can be read one by one."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a message: its path, or as much as leads to it."""
        ...

    def read(self, index: int) -> tuple[Image.Image, Any]:
        """An RGB image and its target; raises `UnreadableImage`."""
        ...


class Sample(NamedTuple):
    """An image as the loader's processes hand it on."""

    image: Tensor  # uint8 (3, H, W)
    target: Any
    name: str = ""
    damaged: Sequence[str] = ()  # why images that should have been here could not be read


class ImageBatch(NamedTuple):
    """Images with their targets and names, and a message for each file that could not be read."""

    images: Any  # uint8 (B, 3, H, W), or a list of (3, H, W) of different sizes; Lightning's hooks make them float, normalised
    targets: Any  # for classification (B,), int64; what other tasks have, their data modules say
    names: list[str]
    damaged: list[str]


def collate(samples: Sequence[Sample]) -> ImageBatch:
    """Samples of images of one size, with a number as target, to a batch."""
    batch = collate_sizes(samples)
    return batch._replace(images=torch.stack(batch.images), targets=torch.tensor(batch.targets))


def collate_sizes(samples: Sequence[Sample]) -> ImageBatch:
    """Samples to a batch of lists."""
    images, targets, names, damaged = zip(*samples, strict=True)
    return ImageBatch(list(images), list(targets), list(names), [message for messages in damaged for message in messages])


def leave_group(worker: int) -> None:
    """Keep a loading process out of its parent's group, to all of which torchrun sends SIGTERM: the parent ends its update first."""
    os.setpgid(0, 0)


class ReadImages(Dataset[Sample]):
    """The images of a list, read and prepared as a sampler asks for them.

    What is random about an image depends on the seed, the epoch and its index alone. One that cannot be read is passed over: in training
    the next one takes its place, in evaluation one that is not counted.

    Args:
        images: The list.
        prepare: What is done to an image and its target.
        blank: Stands in for an image in evaluation, and is not counted.
        training: Whether images are for training.
    """

    def __init__(self, images: ImageList, prepare: Prepare, blank: Sample, training: bool) -> None:
        self.images, self.prepare, self.blank, self.training, self.seed = images, prepare, blank, training, run_seed()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Sample:
        damaged: list[str] = []
        if draw.image == PADDING:
            return self.blank
        for index in (step % len(self) for step in range(draw.image, draw.image + len(self))):
            try:
                image, target = self.images.read(index)
            except UnreadableImage as error:
                damaged.append(str(error))
                if not self.training:
                    return self.blank._replace(damaged=damaged)
                continue
            if self.training:
                reseed(Use.IMAGE, self.seed, draw.epoch, index, devices=False)
            return Sample(*self.prepare(image, target), self.images.name(index), damaged)
        raise UnreadableImage(f"none of the {len(self)} images can be read; the last: {damaged[-1]}")


class ResumableLoader(DataLoader):
    """A loader that was made to begin where the run goes on: it has no state of its own, and Lightning is told so."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up nothing."""


class BaseData(LightningDataModule):
    """Batches of images with their targets; a subclass says what is done to them, and where they come from.

    Batches are `ImageBatch`; by the time that a task of Lightning's sees them, images are float and normalised, and messages about
    damaged files have been written down.

    Args:
        batch_size: Images per batch and process.
        num_workers: Processes that read and augment, for each process that trains; 0 works in that process.
        mean, std: Of the channels, for values in [0, 1].
        max_damaged: Files that may turn out to be damaged, in each process, before the run stops.

    Raises:
        ValueError: If an argument is out of range.
    """

    class_names: list[str]

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 4,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        max_damaged: int = 100,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        for name, value in {"num_workers": num_workers, "max_damaged": max_damaged}.items():
            if value < 0:
                raise ValueError(f"{name}={value} is negative")
        check_normalization(mean, std)
        self.batch_size, self.num_workers, self.max_damaged = batch_size, num_workers, max_damaged
        self.mean, self.std = tuple(mean), tuple(std)
        self.damaged: dict[str, None] = {}  # messages, in the order of their coming
        self.layout: dict[str, int] = {}  # what the place of an image in the run depends on
        self.layout_before: dict[str, int] | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def process(self) -> tuple[int, int]:
        """Rank of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def batches_done(self) -> int:
        """Batches that the run has trained on, in all epochs and before any restart."""
        return batches_done(self.trainer) if self.trainer else 0

    def check_layout(self, **layout: int) -> None:
        """See that a run which goes on has its images laid out in batches as it had before, and that Lightning leaves the loader alone.

        Raises:
            ValueError: If not: its place among them would be another one.
        """
        if self.layout_before is not None and self.layout_before != layout:
            was, now = (
                ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sizes.items()) for sizes in (self.layout_before, layout)
            )
            raise ValueError(f"the run cannot go on with these data: when it was cut off there were {was}; here are {now}")
        if self.trainer:
            if self.trainer.world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
                raise ValueError("the Trainer needs use_distributed_sampler=False: these data share themselves out among the processes")
            if self.trainer.overfit_batches:  # type: ignore[attr-defined]  # the trainer gets it from a connector
                raise ValueError("trainer.overfit_batches does not go with these data: take trainer.limit_train_batches")
        self.layout = layout

    def position(self, batches: int) -> tuple[int, int]:
        """The epoch that the run is in, and the batch of it that comes next, where an epoch has so many batches."""
        return divmod(self.batches_done(), max(limited(batches, self.trainer.limit_train_batches if self.trainer else 1.0), 1))

    def loader_options(self) -> dict[str, Any]:
        """What all loaders have in common."""
        workers = dict(num_workers=self.num_workers, persistent_workers=self.num_workers > 0, worker_init_fn=leave_group)
        return dict(pin_memory=torch.cuda.is_available(), **workers)

    def on_before_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Write down what could not be read.

        Raises:
            RuntimeError: If that is more than `max_damaged` files.
        """
        for message in batch.damaged:
            if message not in self.damaged:
                self.damaged[message] = None
                warnings.warn(f"passed over {message} ({len(self.damaged)} so far)", stacklevel=2)
        if len(self.damaged) > self.max_damaged:
            raise RuntimeError(
                f"more than data.max_damaged={self.max_damaged} files cannot be read, the last: {next(reversed(self.damaged))}; "
                "mend or remove them, or allow more"
            )
        return batch

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Bytes to normalised floats where the model is."""
        images = batch.images
        return batch._replace(images=[self.normalize(image) for image in images] if isinstance(images, list) else self.normalize(images))

    def normalize(self, images: Tensor) -> Tensor:
        """Bytes (..., 3, H, W) to floats as the model takes them."""
        mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (self.mean, self.std))
        images = images.float().div_(255).sub_(mean).div_(std)
        return self.trainer.precision_plugin.convert_input(images) if self.trainer else images  # for models that are in half precision

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers: the damaged files, and what the place in the data depends on."""
        return {"damaged": list(self.damaged), "layout": self.layout}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint remembers."""
        self.damaged, self.layout_before = dict.fromkeys(state_dict["damaged"]), state_dict["layout"]


class IndexedData(BaseData, ABC):
    """Images that can be read in any order."""

    blank: Sample  # stands in for an image in evaluation, and is not counted

    @abstractmethod
    def images(self, split: str) -> ImageList:
        """The images of `train`, `val` or `test`.

        Raises:
            ValueError: If there is no such split.
        """

    def groups(self, images: Any) -> Sequence[int] | None:
        """A number for each image; those in one batch should have the same. None groups nothing."""
        return None

    @abstractmethod
    def prepare(self, training: bool) -> Prepare:
        """What is done to an image and its target."""

    @abstractmethod
    def collate(self, training: bool) -> Callable[[Sequence[Sample]], ImageBatch]:
        """What makes a batch of samples."""

    def has(self, split: str) -> bool:
        """Whether there are images of `train`, `val` or `test`."""
        try:
            self.images(split)
        except ValueError:
            return False
        return True

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, all of one size; after a restart, those that the run had not yet seen."""
        images = self.images("train")
        rank, world_size = self.process()
        sampler = TrainingSampler(len(images), self.batch_size, run_seed(), rank, world_size, self.groups(images))
        self.check_layout(images=len(images), images_per_batch=sampler.batch_size * world_size)
        sampler.go_on(*self.position(sampler.batches))
        return self._loader(images, sampler, training=True)

    def val_dataloader(self) -> DataLoader:
        """All validation images in order."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        """All test images in order; raises ValueError if there are none."""
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader:
        images = self.images(split)
        return self._loader(images, EvaluationSampler(len(images), *self.process()), training=False)

    def _loader(self, images: ImageList, sampler: TrainingSampler | EvaluationSampler, training: bool) -> DataLoader:
        batch_size = sampler.batch_size if isinstance(sampler, TrainingSampler) else self.batch_size
        read = ReadImages(images, self.prepare(training), self.blank, training)
        options = self.loader_options() | {"collate_fn": self.collate(training)}
        return ResumableLoader(read, batch_size, sampler=sampler, **options)  # type: ignore[arg-type]  # typed for indices
