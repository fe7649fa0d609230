"""Images with a mask of classes, in folders: ADE20K, Cityscapes, CamVid and the like; how they are cropped and changed for training."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from .base import ImageBatch, IndexedData, Prepare, Sample, collate_sizes
from .images import UnreadableImage, color_changes, find_images, read_image
from .masks import IGNORED, read_classes, read_mask

SPLITS = ("train", "val", "test")
ATTEMPTS = 10  # at a crop in which no class takes too much


class ImagesWithMasks:
    """Pairs of an image and its mask."""

    def __init__(self, images: Sequence[Path], masks: Sequence[Path], classes: int, first: int, ignored: int) -> None:
        self.images, self.masks = (np.array([str(path).encode() for path in paths], dtype=np.bytes_) for paths in (images, masks))
        self.classes, self.first, self.ignored = classes, first, ignored

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The path of the image."""
        return self.images[index].decode()

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """An image, and the numbers of its classes; raises UnreadableImage if one cannot be read, or their sizes differ."""
        image, mask = read_image(self.name(index)), read_mask(self.masks[index].decode(), self.classes, self.first, self.ignored)
        if image.size != mask.size:
            raise UnreadableImage(
                f"{self.masks[index].decode()}: the mask has {mask.width}x{mask.height} pixels, its image {image.width}x{image.height}"
            )
        return image, mask


class TrainingCrops:
    """Scales an image and its mask at random, cuts a crop out, flips it, and changes its colours: as both papers train on ADE20K.

    Args:
        crop_size: Height and width of a crop; what an image lacks is filled up, and ignored.
        short_side, long_side: Pixels at scale 1: of the shorter side, unless the longer would have more than `long_side`.
        scale: Range of the random scale.
        max_class_share: Share of the labelled pixels that one class may take, where one of ten crops allows it.
        hflip: Probability of a flip.
        distortion: Strength of the changes in brightness, contrast, saturation and hue; at 1, up to an eighth, a half, a half and a tenth.
        fill: Colour of what is filled up.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        short_side: int,
        long_side: int,
        scale: tuple[float, float],
        max_class_share: float,
        hflip: float,
        distortion: float,
        fill: tuple[int, int, int],
    ) -> None:
        self.crop_size, self.short_side, self.long_side, self.scale = crop_size, short_side, long_side, scale
        self.max_class_share, self.hflip, self.fill = max_class_share, hflip, fill
        self.distort = color_changes(distortion)

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
        """An image and its mask to a crop (3, H, W) and its classes (H, W), int16."""
        factor = scale_to(image.size, self.short_side, self.long_side) * random.uniform(*self.scale)
        width, height = (max(round(side * factor), 1) for side in image.size)
        crop = min(height, self.crop_size[0]), min(width, self.crop_size[1])
        for _ in range(ATTEMPTS):
            top, left = (random.randint(0, whole - part) for whole, part in zip((height, width), crop, strict=True))
            # Pixels that the crop leaves out need not be computed: the box is the crop in the image as it is.
            across, down = image.width / width, image.height / height
            box = (left * across, top * down, (left + crop[1]) * across, (top + crop[0]) * down)
            labels = np.asarray(mask.resize(crop[::-1], Image.Resampling.NEAREST, box))
            if largest_share(labels) <= self.max_class_share:
                break
        pixels = image.resize(crop[::-1], Image.Resampling.BILINEAR, box)
        if random.random() < self.hflip:
            pixels, labels = ImageOps.mirror(pixels), labels[:, ::-1]
        below, right = self.crop_size[0] - crop[0], self.crop_size[1] - crop[1]
        filled = ImageOps.expand(to_pil_image(self.distort(pil_to_tensor(pixels))), (0, 0, right, below), self.fill)
        classes = np.pad(labels, ((0, below), (0, right)), constant_values=IGNORED)
        return pil_to_tensor(filled), torch.from_numpy(classes.astype(np.int16))


def scale_to(size: tuple[int, int], short_side: int | None, long_side: int | None) -> float:
    """The factor that gives an image's shorter side `short_side` pixels, unless its longer one would have more than `long_side`."""
    limits = [side / wanted(size) for side, wanted in ((short_side, min), (long_side, max)) if side is not None]
    return min(limits, default=1.0)


def largest_share(labels: np.ndarray) -> float:
    """The share of the labelled pixels that the commonest class takes; 1 where there are none."""
    counts = np.unique(labels[labels != IGNORED], return_counts=True)[1]
    return counts.max() / counts.sum() if counts.size else 1.0


def as_they_are(image: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
    """An image (3, H, W) and its classes (H, W): what evaluation needs, which compares at the size of the file."""
    return pil_to_tensor(image), torch.from_numpy(np.array(mask, dtype=np.int16))


def collate_crops(samples: Sequence[Sample]) -> ImageBatch:
    """Crops to a batch with targets (B, H, W), int16."""
    batch = collate_sizes(samples)
    return batch._replace(images=torch.stack(batch.images), targets=torch.stack(batch.targets))


class ImageMaskFolders(IndexedData):
    """Images in one folder and a mask for each in another, by the same path but for its end.

    Batches for training hold crops (B, 3, H, W) and their classes (B, H, W); those for evaluation lists of whole images (3, H, W) and of
    their masks (H, W), of any size. Pixels of the class 255 are not counted.

    Args:
        root: Folder of the data set.
        classes: Name of a known set (ade20k, cityscapes, camvid), a CSV file with the columns name, red, green and blue, or names.
        images, masks: Folders in `root`; {split} stands for a split.
        image_suffix, mask_suffix: How names end, such as _leftImg8bit.png and _gtFine_labelTrainIds.png; what is before is the same.
            An empty `image_suffix` stands for the suffix of any image.
        train, val, test: What the folders call the splits.
        first_class: What the files call the first class; smaller numbers are ignored.
        ignored_class: What the files call pixels without a class.
        crop_size: Pixels of a square, or (height, width), of the crops for training.
        short_side, long_side: Pixels at scale 1: of the shorter side, unless the longer would have more than `long_side`.
        scale, max_class_share, hflip, distortion: As for `TrainingCrops`.
        options: As for `BaseData`.

    A folder for test without any mask is no test split: benchmarks keep these masks to themselves.

    Raises:
        FileNotFoundError: If a folder or a mask is missing.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        classes: str | list[str],
        images: str = "images/{split}",
        masks: str = "masks/{split}",
        image_suffix: str = "",
        mask_suffix: str = ".png",
        train: str = "train",
        val: str = "val",
        test: str = "test",
        first_class: int = 0,
        ignored_class: int = IGNORED,
        crop_size: int | tuple[int, int] = 512,
        short_side: int = 512,
        long_side: int = 2048,
        scale: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        hflip: float = 0.5,
        distortion: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        if min(self.crop_size) < 1:
            raise ValueError(f"crop_size={crop_size} is not a number of pixels, nor (height, width)")
        for name, side in {"short_side": short_side, "long_side": long_side}.items():
            if side < 1:
                raise ValueError(f"{name}={side} is not a number of pixels")
        if long_side < short_side:
            raise ValueError(f"long_side={long_side} is less than short_side={short_side}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale={scale} is not a range of factors above 0")
        for name, share in {"max_class_share": max_class_share, "hflip": hflip, "distortion": distortion}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is not in [0, 1]")
        self.short_side, self.long_side = short_side, long_side
        fill = (round(255 * self.mean[0]), round(255 * self.mean[1]), round(255 * self.mean[2]))
        crops = TrainingCrops(self.crop_size, short_side, long_side, scale, max_class_share, hflip, distortion, fill)
        self.crops = crops
        self.class_names, self.palette = read_classes(classes)
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"classes={classes} has a name more than once")
        if len(self.class_names) > IGNORED:
            raise ValueError(f"classes={classes} are {len(self.class_names)}; masks tell no more than {IGNORED} apart")
        self.root = Path(root)
        self.blank = Sample(torch.zeros(3, 32, 32, dtype=torch.uint8), torch.full((32, 32), IGNORED, dtype=torch.int16))
        self.splits: dict[str, ImagesWithMasks] = {}
        names = dict(zip(SPLITS, (train, val, test), strict=True))
        for split, name in names.items():
            folder, of_masks = (self.root / pattern.format(split=name) for pattern in (images, masks))
            if not folder.is_dir():
                if split == "test":
                    continue
                raise FileNotFoundError(f"root={root}: no folder {folder}: name the folders with data.images, data.train and data.val")
            files = [file for file in find_images([folder]) if file.name.endswith(image_suffix)]
            paths = [of_masks / file.relative_to(folder).parent / (stem(file, image_suffix) + mask_suffix) for file in files]
            lacking = [str(path) for path in paths if not path.is_file()]
            if split == "test" and files and len(lacking) == len(files):  # a benchmark that keeps these masks to itself
                continue
            shared = [str(path) for path, count in Counter(paths).items() if count > 1]
            if shared:
                raise ValueError(f"root={root}: two images or more have the mask {shared[0]}: rename them")
            if lacking or not files:
                what = f"{len(lacking)} of {len(files)} images have no mask, such as {lacking[0]}" if lacking else f"{folder} has no images"
                raise FileNotFoundError(
                    f"root={root}, split {split}: {what}: name folders and endings with data.masks, data.image_suffix, data.mask_suffix"
                )
            self.splits[split] = ImagesWithMasks(files, paths, len(self.class_names), first_class, ignored_class)

    def images(self, split: str) -> ImagesWithMasks:
        """The pairs of a split; raises ValueError where there is none."""
        if split not in self.splits:
            raise ValueError(f"root={self.root} has no split {split}, but {', '.join(self.splits)}")
        return self.splits[split]

    def prepare(self, training: bool) -> Prepare:
        """Crops for training; for evaluation, all as it is."""
        return self.crops if training else as_they_are

    def collate(self, training: bool) -> Callable[[Sequence[Sample]], ImageBatch]:
        """Crops have one size, images have not."""
        return collate_crops if training else collate_sizes


def stem(file: Path, suffix: str) -> str:
    """The name without its end."""
    return file.name.removesuffix(suffix) if suffix else file.stem


class ADE20K(ImageMaskFolders):
    """ADE20K's scene parsing benchmark as it is handed out: ADEChallengeData2016 with 150 classes, and 0 for everything else.

    Args:
        root: The folder ADEChallengeData2016.
        options: As for `ImageMaskFolders`.
    """

    def __init__(self, root: str | Path, **options: Any) -> None:
        super().__init__(
            root, "ade20k", masks="annotations/{split}", train="training", val="validation", test="testing", first_class=1, **options
        )


class Cityscapes(ImageMaskFolders):
    """Cityscapes with masks of train ids, which its own scripts make: 19 classes.

    Args:
        root: The folder that holds leftImg8bit and gtFine.
        short_side: As for `ImageMaskFolders`.
        options: As for `ImageMaskFolders`.
    """

    def __init__(self, root: str | Path, short_side: int = 1024, **options: Any) -> None:
        super().__init__(
            root,
            "cityscapes",
            images="leftImg8bit/{split}",
            masks="gtFine/{split}",
            image_suffix="_leftImg8bit.png",
            mask_suffix="_gtFine_labelTrainIds.png",
            short_side=short_side,
            **options,
        )


class CamVid(ImageMaskFolders):
    """CamVid in 360x480 pixels and 11 classes, as SegNet's authors prepared it: 11 for everything else.

    Args:
        root: The folder that holds images and annotations.
        masks, crop_size, short_side: As for `ImageMaskFolders`.
        options: As for `ImageMaskFolders`.
    """

    def __init__(
        self,
        root: str | Path,
        masks: str = "annotations/{split}",
        crop_size: int | tuple[int, int] = 352,
        short_side: int = 360,
        **options: Any,
    ) -> None:
        super().__init__(root, "camvid", masks=masks, ignored_class=11, crop_size=crop_size, short_side=short_side, **options)
