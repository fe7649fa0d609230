"""Labelled images: how they are augmented for training, and resized and cropped for evaluation."""

from abc import ABC
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, Self

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from ..seeding import Use, reseed, run_seed
from .base import BaseData, ImageBatch, IndexedData, Prepare, Sample, collate
from .images import check_preprocessing, train_transform

IGNORED = -1  # the target of what stands in for an image: no loss and no metric counts it


class ImageData(BaseData):
    """Batches of labelled images; a subclass says where they come from, and gives the loaders.

    Args:
        input_size: Pixels of a square, or (height, width).
        batch_size, num_workers, max_damaged: As for `BaseData`.
        mean, std, crop_pct, interpolation: As for `eval_transform`.
        scale, ratio: Area and aspect of the random crops for training, as shares of the image's.
        hflip, vflip: Probability of flips for training.
        color_jitter: Strength of changes in brightness, contrast and saturation; unused where `auto_augment` is given.
        auto_augment: A policy in timm's notation, such as rand-m9-mstd0.5-inc1.
        re_prob: Probability of random erasing.

    Raises:
        ValueError: If an argument is out of range.
    """

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
        super().__init__(batch_size, num_workers, mean, std, max_damaged)
        if not 0 <= re_prob <= 1:
            raise ValueError(f"re_prob={re_prob} is not in [0, 1]")
        self.interpolation, self.re_prob = interpolation, re_prob
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
        self.blank = Sample(torch.zeros(self.input_size, dtype=torch.uint8), IGNORED)

    def prepare(self, training: bool) -> Prepare:
        """What is done to an image; its label stays."""
        return partial(_prepare, self.augment if training else self.evaluate)

    def collate(self, training: bool) -> Callable[[Sequence[Sample]], ImageBatch]:
        """Images are all of one size."""
        return collate

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Bytes to normalised floats where the model is, and random erasing in training."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.re_prob and self.trainer and self.trainer.training:
            reseed(Use.ERASING, run_seed(), self.trainer.global_rank, self.batches_done())
            RandomErasing(self.re_prob, mode="pixel", device=batch.images.device)(batch.images)
        return batch


def _prepare(transform: Callable[[Image.Image], Any], image: Image.Image, label: int) -> tuple[Tensor, int]:
    return transform(image), label


class IndexedImages(ImageData, IndexedData, ABC):
    """Labelled images that can be read in any order."""
