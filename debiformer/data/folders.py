"""Images in one folder per class, and ImageNet as it is handed out."""

import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .classification import IndexedImages
from .images import is_image, looked_for, read_image

SPLITS = ("train", "val", "test")


class LabelledFiles:
    """Image files with their targets.

    A million `Path`s would take half a gigabyte in every loading process, since counting references copies them; an array is shared.
    """

    def __init__(self, paths: Sequence[Path | bytes], targets: Sequence[int]) -> None:
        self.names = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.targets = np.array(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        """The path."""
        return os.fsdecode(self.names[index].item())

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image and its target; raises `UnreadableImage`."""
        return read_image(self.name(index)), int(self.targets[index])


def find_classes(folder: Path) -> list[str]:
    """Sorted names of the class folders; hidden ones do not count.

    Raises:
        FileNotFoundError: If there are none.
        PermissionError: If the folder cannot be read.
    """
    try:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except PermissionError as error:
        raise PermissionError(f"{folder} cannot be read by this user: {error.strerror}") from error
    if not classes:
        raise FileNotFoundError(f"{folder} holds no class folders: put the images of each class in a folder of its own")
    return classes


def files_of_classes(folder: Path, class_names: list[str]) -> LabelledFiles:
    """The images of class folders, nested ones too, sorted within each class.

    Raises:
        ValueError: If a class has no images.
        PermissionError: If a folder cannot be read.
    """
    paths: list[Path] = []
    targets: list[int] = []
    empty = []
    for target, name in enumerate(class_names):
        found = sorted(_images_below(folder / name))
        if not found:
            empty.append(name)
        paths += found
        targets += [target] * len(found)
    if empty:
        raise ValueError(f"{folder}: no images of {', '.join(empty)}; looked for files named {looked_for()}; add some or remove the folder")
    return LabelledFiles(paths, targets)


def _images_below(folder: Path) -> Iterable[Path]:
    def refuse(error: OSError) -> None:
        raise PermissionError(f"{error.filename} cannot be read by this user: {error.strerror}") from error

    for parent, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        yield from (Path(parent, name) for name in names if is_image(name))


class ImageFolders(IndexedImages):
    """Images in class folders: `root/train/CLASS/*`, `root/val/CLASS/*` and perhaps `root/test/CLASS/*`, or only `root/CLASS/*`.

    Args:
        root: The folder.
        val_fraction: Share of each class that validates where `root` holds class folders only; evenly spread over the sorted files.
        options: As for `ImageData`.

    Raises:
        FileNotFoundError: If a folder is missing, or holds no class folders.
        PermissionError: If a folder cannot be read.
        ValueError: If a class has no images or is missing from a split, or an argument is out of range.
    """

    def __init__(self, root: str | Path, val_fraction: float = 0.2, **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} is not between 0 and 1")
        if not self.root.is_dir():
            raise FileNotFoundError(f"root={self.root}: no such folder")
        splits = [split for split in SPLITS if (self.root / split).is_dir()]
        self.class_names = find_classes(self.root / "train" if "train" in splits else self.root)
        if splits:
            self.splits = self._open(splits)
        else:
            self.splits = split_evenly(files_of_classes(self.root, self.class_names), self.class_names, val_fraction)

    def _open(self, splits: list[str]) -> dict[str, LabelledFiles]:
        for split in ("train", "val"):
            if split not in splits:
                raise FileNotFoundError(
                    f"root={self.root} holds {', '.join(splits)} but no folder {split}: make one, with a folder per class"
                )
        for split in splits:
            odd = sorted(set(find_classes(self.root / split)) ^ set(self.class_names))
            if odd:
                raise ValueError(
                    f"{self.root / split} and {self.root / 'train'} must hold the same class folders, but {', '.join(odd)} is in one only"
                )
        return {split: files_of_classes(self.root / split, self.class_names) for split in splits}

    def images(self, split: str) -> LabelledFiles:
        """The files of a split; raises ValueError where there is none."""
        if split not in self.splits:
            raise ValueError(f"root={self.root} has no folder {split}: make one, with a folder per class")
        return self.splits[split]


def split_evenly(files: LabelledFiles, class_names: list[str], val_fraction: float) -> dict[str, LabelledFiles]:
    """Training and validation files: of each class, `val_fraction` validate, evenly spread.

    Raises:
        ValueError: If a class would be left out of either.
    """
    chosen: dict[str, list[int]] = {"train": [], "val": []}
    for target, group in groupby(range(len(files)), key=files.targets.__getitem__):
        members, name = list(group), class_names[target]
        validates = [int((rank + 1) * val_fraction) > int(rank * val_fraction) for rank in range(len(members))]
        if not any(validates) or all(validates):
            few = f"{name}: {len(members)} images cannot be split by val_fraction={val_fraction}"
            raise ValueError(f"{few}; add some, or make folders train and val")
        for index, held_out in zip(members, validates, strict=True):
            chosen["val" if held_out else "train"].append(index)
    return {split: LabelledFiles(files.names[rows].tolist(), files.targets[rows].tolist()) for split, rows in chosen.items()}
