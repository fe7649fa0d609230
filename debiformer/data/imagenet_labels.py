"""What was labelled anew for ImageNet-1K: the validation images (ReaL), and new images of the same classes (V2)."""

import json
from pathlib import Path
from typing import Any

from .classification import IndexedImages
from .folders import LabelledFiles, files_of_classes, find_classes
from .imagenet import NUMBERED


class RealLabels:
    """Labels of "Are we done with ImageNet?": for each validation image all classes that it shows, or none where people did not agree.

    Args:
        file: Their `real.json`, a list of class indices for each of the images ILSVRC2012_val_00000001, ILSVRC2012_val_00000002, ...
        num_classes: How many classes there are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such list, or is of another number of classes.
    """

    def __init__(self, file: str | Path, num_classes: int) -> None:
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"real={file}: no such file")
        try:
            labels = json.loads(self.file.read_text())
        except ValueError as error:  # of JSON, or of UTF-8
            raise ValueError(f"real={file} is not JSON: {error}") from error
        if not _is_list(labels, list) or not all(_is_list(classes, int) for classes in labels):
            raise ValueError(f"real={file} is not a list of lists of class indices, one for each validation image")
        named = {label for classes in labels for label in classes}
        if not named or min(named) < 0 or max(named) != num_classes - 1:
            range_ = f"classes {min(named)} to {max(named)}" if named else "no class"
            raise ValueError(f"real={file} names {range_}, the model has the classes 0 to {num_classes - 1}: it is of other data")
        self.labels = [frozenset(classes) for classes in labels]

    def of(self, name: str) -> frozenset[int]:
        """The classes of a validation image, by its path or another name that tells its number.

        Raises:
            ValueError: If the name has no number, or the file no labels for it.
        """
        found = NUMBERED.search(name)
        if found is None:
            raise ValueError(
                f"validation image {name} has no number in its name, like ILSVRC2012_val_00000001: real={self.file} goes by it"
            )
        if not 1 <= int(found[1]) <= len(self.labels):
            raise ValueError(f"real={self.file} labels {len(self.labels)} images, the data have {name}: it is cut short, or of other data")
        return self.labels[int(found[1]) - 1]


def _is_list(value: Any, of: type) -> bool:
    return isinstance(value, list) and all(type(item) is of for item in value)


class ImageNetV2(IndexedImages):
    """Images in folders that are named 0, 1, 2, ... after the indices of their classes, to validate on.

    Args:
        root: The folder, such as imagenetv2-matched-frequency-format-val.
        class_names: Names in the order of the indices.
        options: As for `ImageData`.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing in it.
        PermissionError: If a folder cannot be read.
        ValueError: If the folders' names are not the indices of the classes, a class has no images, or an argument is out of range.
    """

    def __init__(self, root: str | Path, class_names: list[str], **options: Any) -> None:
        super().__init__(**options)
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"v2={root}: no such folder")
        self.class_names = class_names
        folders = find_classes(root)
        odd = [name for name in folders if not name.isdecimal()]
        if odd:
            raise ValueError(f"v2={root}: folder {odd[0]} is not named after the index of a class, 0 to {len(class_names) - 1}")
        folders.sort(key=int)
        if [int(name) for name in folders] != list(range(len(class_names))):
            found = f"{len(folders)} class folders, {folders[0]} to {folders[-1]}"
            raise ValueError(f"v2={root} has {found}; the model has the classes 0 to {len(class_names) - 1}")
        self.files = files_of_classes(root, folders)

    def images(self, split: str) -> LabelledFiles:
        """The files, as split val; raises ValueError for another."""
        if split != "val":
            raise ValueError(f"ImageNet-V2 has no split {split}: it is for validation")
        return self.files
