"""Images on disk: reading any file that Pillow opens, finding files, and folders of class folders as a data module."""

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import compress, groupby
from operator import not_
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import DatasetFolder

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
SPLITS = ("train", "val", "test")


class UnreadableImage(ValueError):
    """A file that is not a whole, readable image; the message names it and the reason."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, upright.

    The EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled from 0..65535 to 0..255, and of an animation
    the first frame is taken.

    Raises:
        UnreadableImage: If the file is missing, empty, cut short, not an image, or of more pixels than Pillow deems safe.
    """
    path = Path(path)
    if not path.is_file():
        raise UnreadableImage(f"{path}: {'is a folder, not an image' if path.is_dir() else 'no such file'}")
    if not path.stat().st_size:
        raise UnreadableImage(f"{path}: the file is empty")
    try:
        with Image.open(path) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(f"{path}: not an image, or in a format that Pillow cannot read") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged files
        raise UnreadableImage(f"{path}: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    wide = image.convert("F")
    low, high = cast(tuple[float, float], wide.getextrema())
    if image.mode == "F" or low < 0 or high > 65535:  # Pillow also opens some 16-bit files in its 32-bit mode
        raise ValueError(f"{image.mode!r} pixels from {low:g} to {high:g} have no agreed range: convert the file to 8 or 16 bits")
    return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")  # convert() cuts the fraction off


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """All images among `paths`: files as given, whatever their suffix; folders searched recursively by suffix, in sorted order.

    Raises:
        FileNotFoundError: If a path does not exist, or nothing is found.
    """
    given = [Path(path) for path in paths]
    missing = [str(path) for path in given if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no such file or folder: {', '.join(missing)}")
    found = [file for path in given for file in (_images_in(path) if path.is_dir() else [path])]
    if not found:
        raise FileNotFoundError(f"no images in {', '.join(map(str, given))}: looked for files named {_looked_for()}")
    return found


def _images_in(folder: Path) -> list[Path]:
    files = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(file for file in files if _is_image(file))


def _is_image(file: str | Path) -> bool:
    """By name; hidden files are what systems leave behind, such as macOS's ._photo.jpg."""
    name = os.path.basename(file)
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _looked_for() -> str:
    return " ".join(f"*{suffix}" for suffix in SUFFIXES)


def eval_transform(
    input_size: int | Sequence[int],
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
) -> Callable[[Image.Image], Tensor]:
    """The transform for evaluation and prediction, from an image to (3, H, W): resize, centre crop, normalise.

    Args:
        input_size: Pixels of a square, (H, W) or (3, H, W).
        mean, std: Of the channels, for values in [0, 1].
        crop_pct: Share of the resized image's shorter side that the crop keeps, in (0, 1].
        interpolation: nearest, bilinear, bicubic or lanczos.

    Raises:
        ValueError: If an argument is out of range.
    """
    _, height, width = _check_preprocessing(input_size, mean, std, crop_pct, interpolation)
    return create_transform((height, width), mean=tuple(mean), std=tuple(std), crop_pct=crop_pct, interpolation=interpolation)


def _check_preprocessing(
    input_size: int | Sequence[int], mean: Sequence[float], std: Sequence[float], crop_pct: float, interpolation: str
) -> tuple[int, int, int]:
    """The input size as (3, H, W)."""
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)[-2:]
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"input_size={input_size} is not a number of pixels, nor (height, width)")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean={mean} and std={std} must be three numbers each, those of std above 0")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct} is not in (0, 1]")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
    return (3, *size)


class ClassFolders(DatasetFolder):
    """Images in one folder per class, (3, H, W) and target; nested folders count, hidden ones do not.

    Raises:
        FileNotFoundError: If `root` holds no class folders.
        ValueError: If a class has no images.
    """

    def __init__(self, root: Path, transform: Callable[[Image.Image], Tensor]) -> None:
        super().__init__(str(root), read_image, transform=transform, is_valid_file=_is_image, allow_empty=True)
        empty = sorted(set(range(len(self.classes))) - set(self.targets))
        if empty:
            names = ", ".join(self.classes[index] for index in empty)
            raise ValueError(f"{root}: no images of {names}; looked for files named {_looked_for()}; add some or remove the folder")

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Sorted names of the class folders, and their targets."""
        classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith("."))
        if not classes:
            raise FileNotFoundError(f"{directory} holds no class folders: put the images of each class in a folder of its own")
        return classes, {name: index for index, name in enumerate(classes)}


class ImageFolders(LightningDataModule):
    """Images in class folders: `root/train/CLASS/*`, `root/val/CLASS/*` and perhaps `root/test/CLASS/*`, or only `root/CLASS/*`.

    Batches are images (B, 3, H, W), normalised, and targets (B,), indices into `class_names`.

    Args:
        root: The folder.
        input_size: Pixels of a square, or (height, width).
        batch_size: Images per batch.
        num_workers: Processes that read and augment; 0 works in the main process.
        val_fraction: Share of each class that validates where `root` holds class folders only; evenly spread over the sorted files.
        mean, std, crop_pct, interpolation: As for `eval_transform`.
        scale, ratio: Area and aspect of the random crops for training, as shares of the image's.
        hflip, vflip: Probability of flips for training.
        color_jitter: Strength of changes in brightness, contrast and saturation; unused where `auto_augment` is given.
        auto_augment: A policy in timm's notation, such as rand-m9-mstd0.5-inc1.
        re_prob: Probability of random erasing.

    Raises:
        FileNotFoundError: If a folder is missing, or holds no class folders.
        ValueError: If a class has no images or is missing from a split, or an argument is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        input_size: int | tuple[int, int] = 224,
        batch_size: int = 64,
        num_workers: int = 4,
        val_fraction: float = 0.2,
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
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is negative")
        self.root, self.batch_size, self.num_workers = Path(root), batch_size, num_workers
        self.input_size = _check_preprocessing(input_size, mean, std, crop_pct, interpolation)
        self.mean, self.std, self.crop_pct, self.interpolation = tuple(mean), tuple(std), crop_pct, interpolation
        evaluate = eval_transform(self.input_size, mean, std, crop_pct, interpolation)
        augment = create_transform(
            self.input_size,
            is_training=True,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            vflip=vflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            interpolation=interpolation,
            mean=self.mean,
            std=self.std,
            re_prob=re_prob,
            re_mode="pixel",
        )
        self.datasets = self._open(augment, evaluate, val_fraction)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def _open(self, augment: Callable, evaluate: Callable, val_fraction: float) -> dict[str, Dataset]:
        if not self.root.is_dir():
            raise FileNotFoundError(f"root={self.root}: no such folder")
        present = [split for split in SPLITS if (self.root / split).is_dir()]
        if not present:
            return self._split(augment, evaluate, val_fraction)
        for split in ("train", "val"):
            if split not in present:
                raise FileNotFoundError(
                    f"root={self.root} holds {', '.join(present)} but no folder {split}: make one, with a folder per class"
                )
        datasets = {split: ClassFolders(self.root / split, augment if split == "train" else evaluate) for split in present}
        self.class_names = datasets["train"].classes
        for split, dataset in datasets.items():
            odd = sorted(set(dataset.classes) ^ set(self.class_names))
            if odd:
                raise ValueError(
                    f"{self.root / split} and {self.root / 'train'} must hold the same class folders, but {', '.join(odd)} is in one only"
                )
        return dict(datasets)

    def _split(self, augment: Callable, evaluate: Callable, val_fraction: float) -> dict[str, Dataset]:
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} is not between 0 and 1")
        training, validation = ClassFolders(self.root, augment), ClassFolders(self.root, evaluate)
        self.class_names = training.classes
        indices: dict[str, list[int]] = {"train": [], "val": []}
        for target, members in groupby(range(len(training)), key=training.targets.__getitem__):
            files = list(members)
            validates = [int((rank + 1) * val_fraction) > int(rank * val_fraction) for rank in range(len(files))]
            if not any(validates) or all(validates):
                few = f"{self.root / self.class_names[target]}: {len(files)} images cannot be split by val_fraction={val_fraction}"
                raise ValueError(f"{few}; add some, or make folders train and val")
            indices["val"] += compress(files, validates)
            indices["train"] += compress(files, map(not_, validates))
        return {"train": Subset(training, indices["train"]), "val": Subset(validation, indices["val"])}

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, all of one size unless there are fewer images than that."""
        return self._loader("train", shuffle=True, drop_last=len(self.datasets["train"]) > self.batch_size)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        """All validation images in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """All test images in order; raises ValueError if there are none."""
        if "test" not in self.datasets:
            raise ValueError(f"root={self.root} has no folder test: make one, with a folder per class")
        return self._loader("test")

    def _loader(self, split: str, shuffle: bool = False, drop_last: bool = False) -> DataLoader:
        return DataLoader(
            self.datasets[split],
            self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
