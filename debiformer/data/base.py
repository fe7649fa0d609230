"""What every image data module does, wherever its images are: augment, batch, spread over processes, pass over what is damaged."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple, Protocol, Self

import torch
from lightning import LightningDataModule
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..progress import batches_done, limited
from ..seeding import Use, reseed, run_seed
from .images import UnreadableImage, check_preprocessing, train_transform
from .sampling import PADDING, Draw, EvaluationSampler, TrainingSampler

IGNORED = -1  # the target of what stands in for an image: no loss and no metric counts it


class ImageList(Protocol):
    """Labelled images that can be read one by one."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a message: its path, or as much as leads to it."""
        ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An RGB image and its target; raises `UnreadableImage`."""
        ...


class Sample(NamedTuple):
    """An image as the loader's processes hand it on."""

    image: Tensor  # uint8 (3, H, W)
    target: int
    name: str
    damaged: list[str]  # why images that should have been here could not be read


class ImageBatch(NamedTuple):
    """Images with their targets and names, and a message for each file that could not be read."""

    images: Tensor  # uint8 (B, 3, H, W); Lightning's hooks make them float, normalised
    targets: Tensor  # (B,), int64
    names: list[str]
    damaged: list[str]


def blank(size: tuple[int, int], name: str = "", damaged: Sequence[str] = ()) -> Sample:
    """Stands in for an image in evaluation, and is not counted."""
    return Sample(torch.zeros(3, *size, dtype=torch.uint8), IGNORED, name, list(damaged))


def collate(samples: Sequence[Sample]) -> ImageBatch:
    """Samples to a batch."""
    images, targets, names, damaged = zip(*samples, strict=True)
    return ImageBatch(torch.stack(images), torch.tensor(targets), list(names), [message for messages in damaged for message in messages])


def leave_group(worker: int) -> None:
    """Keep a loading process out of its parent's group, to all of which torchrun sends SIGTERM: the parent ends its update first."""
    os.setpgid(0, 0)


class ReadImages(Dataset[Sample]):
    """The images of a list, read and transformed as a sampler asks for them.

    What is random about an image depends on the seed, the epoch and its index alone. One that cannot be read is passed over: in training
    the next one takes its place, in evaluation a black image that is not counted.
    """

    def __init__(self, images: ImageList, transform: Callable[[Image.Image], Any], size: tuple[int, int], training: bool) -> None:
        self.images, self.transform, self.size, self.training, self.seed = images, transform, size, training, run_seed()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Sample:
        damaged: list[str] = []
        if draw.image == PADDING:
            return blank(self.size)
        for index in (step % len(self) for step in range(draw.image, draw.image + len(self))):
            try:
                image, target = self.images.read(index)
            except UnreadableImage as error:
                damaged.append(str(error))
                if not self.training:
                    return blank(self.size, self.images.name(index), damaged)
                continue
            if self.training:
                reseed(Use.IMAGE, self.seed, draw.epoch, index, devices=False)
            return Sample(self.transform(image), target, self.images.name(index), damaged)
        raise UnreadableImage(f"none of the {len(self)} images can be read; the last: {damaged[-1]}")


class ResumableLoader(DataLoader):
    """A loader that was made to begin where the run goes on: it has no state of its own, and Lightning is told so."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up nothing."""


class ImageData(LightningDataModule):
    """Batches of labelled images; a subclass says where they come from, and gives the loaders.

    Batches are `ImageBatch`; by the time that a task of Lightning's sees them, images are float and normalised, and messages about
    damaged files have been written down.

    Args:
        input_size: Pixels of a square, or (height, width).
        batch_size: Images per batch and process.
        num_workers: Processes that read and augment, for each process that trains; 0 works in that process.
        mean, std, crop_pct, interpolation: As for `eval_transform`.
        scale, ratio: Area and aspect of the random crops for training, as shares of the image's.
        hflip, vflip: Probability of flips for training.
        color_jitter: Strength of changes in brightness, contrast and saturation; unused where `auto_augment` is given.
        auto_augment: A policy in timm's notation, such as rand-m9-mstd0.5-inc1.
        re_prob: Probability of random erasing.
        max_damaged: Files that may turn out to be damaged, in each process, before the run stops.

    Raises:
        ValueError: If an argument is out of range.
    """

    class_names: list[str]

    def __init__(
        self,
        input_size: int | tuple[int, int] = 224,
        batch_size: int = 64,
        num_workers: int = 4,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        crop_pct: float = 0.875,
        interpolation: str = "bicubic",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float = 0.4,
        auto_augment: str | None = None,
        re_prob: float = 0.0,
        max_damaged: int = 100,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        for name, value in {"num_workers": num_workers, "max_damaged": max_damaged}.items():
            if value < 0:
                raise ValueError(f"{name}={value} is negative")
        if not 0 <= re_prob <= 1:
            raise ValueError(f"re_prob={re_prob} is not in [0, 1]")
        self.batch_size, self.num_workers, self.max_damaged = batch_size, num_workers, max_damaged
        self.mean, self.std, self.interpolation, self.re_prob = tuple(mean), tuple(std), interpolation, re_prob
        self._evaluate_at(input_size, crop_pct)
        self.augment = train_transform(
            self.input_size[1:],
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            vflip=vflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            interpolation=interpolation,
            mean=self.mean,  # fills what RandAugment leaves bare
            use_prefetcher=True,  # pixels stay bytes: they are normalised where the model is, a quarter of the traffic
        )
        self.damaged: dict[str, None] = {}  # messages, in the order of their coming
        self.layout: dict[str, int] = {}  # what the place of an image in the run depends on
        self.layout_before: dict[str, int] | None = None

    def evaluated_at(self, input_size: int | tuple[int, int], crop_pct: float) -> Self:
        """The same images for evaluation at another size and crop; files are not looked for again.

        Raises:
            ValueError: If one of the two is out of range.
        """
        other = copy(self)
        other._evaluate_at(input_size, crop_pct)
        return other

    def _evaluate_at(self, input_size: int | tuple[int, int], crop_pct: float) -> None:
        self.input_size = check_preprocessing(input_size, self.mean, self.std, crop_pct, self.interpolation)
        self.crop_pct = crop_pct
        self.evaluate = create_transform(self.input_size[1:], crop_pct=crop_pct, interpolation=self.interpolation, use_prefetcher=True)

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
        return dict(collate_fn=collate, pin_memory=torch.cuda.is_available(), **workers)

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
        """Bytes to normalised floats where the model is, and random erasing in training."""
        shape = (1, 3, 1, 1)
        mean, std = (torch.tensor(value, device=batch.images.device).view(shape) for value in (self.mean, self.std))
        images = batch.images.float().div_(255).sub_(mean).div_(std)
        if self.re_prob and self.trainer and self.trainer.training:
            reseed(Use.ERASING, run_seed(), self.trainer.global_rank, self.batches_done())
            RandomErasing(self.re_prob, mode="pixel", device=images.device)(images)
        if self.trainer:
            images = self.trainer.precision_plugin.convert_input(images)  # for models that are in half precision themselves
        return batch._replace(images=images)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint remembers: the damaged files, and what the place in the data depends on."""
        return {"damaged": list(self.damaged), "layout": self.layout}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint remembers."""
        self.damaged, self.layout_before = dict.fromkeys(state_dict["damaged"]), state_dict["layout"]


class IndexedImages(ImageData, ABC):
    """Images that can be read in any order."""

    @abstractmethod
    def images(self, split: str) -> ImageList:
        """The images of `train`, `val` or `test`.

        Raises:
            ValueError: If there is no such split.
        """

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
        sampler = TrainingSampler(len(images), self.batch_size, run_seed(), rank, world_size)
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
        transform = self.augment if training else self.evaluate
        read = ReadImages(images, transform, self.input_size[1:], training)
        return ResumableLoader(read, batch_size, sampler=sampler, **self.loader_options())  # type: ignore[arg-type]  # typed for indices
