"""Data modules for detection and instance segmentation: how images and their boxes are changed for training."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from .base import ImageBatch, IndexedData, Prepare, Sample, collate_sizes
from .boxes import ImagesWithBoxes, Record, Target
from .images import color_changes


class DetectionData(IndexedData):
    """Batches of images of any size with boxes; a subclass reads the records of each split.

    A batch holds lists of images (3, H, W) and of targets: boxes (N, 4) in pixels x0, y0, x1, y1, labels (N,) from 0, and masks (N, H, W)
    if wanted; those for evaluation also crowd (N,), area (N,) and the id of the image. What stands in for an image that cannot be read has
    the target None.

    Args:
        records: Of each split.
        class_names: In the order of the labels.
        masks: Whether targets have masks of instances.
        keep_empty: Train on images without boxes too.
        hflip, vflip: Probability of flips for training.
        distortion: Strength of changes in colour for training, as for `TrainingCrops`; 0 leaves them out.
        options: As for `BaseData`.

    Raises:
        ValueError: If an argument is out of range, or a class has no box to train on.
    """

    def __init__(
        self,
        records: dict[str, list[Record]],
        class_names: list[str],
        masks: bool = False,
        keep_empty: bool = False,
        hflip: float = 0.5,
        vflip: float = 0.0,
        distortion: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, share in {"hflip": hflip, "vflip": vflip, "distortion": distortion}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is not in [0, 1]")
        self.class_names, self.masks = class_names, masks
        self.change = TrainingChanges(hflip, vflip, distortion)
        self.blank = Sample(torch.zeros(3, 32, 32, dtype=torch.uint8), None)
        empty = [split for split, part in records.items() if not part]
        if empty:
            raise ValueError(f"the split {empty[0]} has no images")
        seen = {instance.label for record in records["train"] for instance in record.instances if not instance.crowd}
        lacking = [name for label, name in enumerate(class_names) if label not in seen]
        if lacking:
            raise ValueError(f"no box to train on of {', '.join(lacking[:5])}{' and more' if len(lacking) > 5 else ''}: take these out")
        train = [record for record in records["train"] if keep_empty or any(not instance.crowd for instance in record.instances)]
        self.splits = {split: ImagesWithBoxes(train if split == "train" else part, masks) for split, part in records.items()}

    def images(self, split: str) -> ImagesWithBoxes:
        """The images of a split; raises ValueError where there is none."""
        if split not in self.splits:
            raise ValueError(f"these data have no split {split}, but {', '.join(self.splits)}")
        return self.splits[split]

    def groups(self, images: Any) -> Sequence[int] | None:
        """Wide images, and high ones: a batch is padded to the largest of both sides."""
        return [int(record.size[0] < record.size[1]) for record in images.records]

    def prepare(self, training: bool) -> Prepare:
        """Flips and colours for training; for evaluation, all as it is."""
        return self.change if training else to_tensors

    def collate(self, training: bool) -> Callable[[Sequence[Sample]], ImageBatch]:
        """Images are of any size."""
        return collate_sizes


class TrainingChanges:
    """Flips an image with its boxes and masks, and changes its colours; crowds are left out of the target."""

    def __init__(self, hflip: float, vflip: float, distortion: float) -> None:
        self.hflip, self.vflip, self.distort = hflip, vflip, color_changes(distortion)

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        """An image and its target to tensors."""
        kept = ~target["crowd"]
        boxes = target["boxes"][kept]
        masks = target["masks"][kept] if "masks" in target else None
        if random.random() < self.hflip:
            image, boxes = ImageOps.mirror(image), (boxes * [-1, 1, -1, 1] + [image.width, 0, image.width, 0])[:, [2, 1, 0, 3]]
            masks = None if masks is None else masks[:, :, ::-1]
        if random.random() < self.vflip:
            image, boxes = ImageOps.flip(image), (boxes * [1, -1, 1, -1] + [0, image.height, 0, image.height])[:, [0, 3, 2, 1]]
            masks = None if masks is None else masks[:, ::-1]
        changed = {"boxes": torch.from_numpy(np.array(boxes, dtype=np.float32)), "labels": torch.from_numpy(target["labels"][kept])}
        if masks is not None:
            changed["masks"] = torch.from_numpy(masks.copy())
        return self.distort(pil_to_tensor(image)), changed


def to_tensors(image: Image.Image, target: Target) -> tuple[Tensor, Target]:
    """An image and its target as they are."""
    return pil_to_tensor(image), {name: torch.as_tensor(value) for name, value in target.items()}
