"""ImageNet-1K in the layout that it is handed out in: validation images in one folder, and a list of their labels."""

import re
from pathlib import Path
from typing import Any

from .classification import IndexedImages
from .folders import LabelledFiles, files_of_classes, find_classes
from .images import find_images

NUMBERED = re.compile(r"ILSVRC2012_val_(\d+)")  # names of the validation images
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


class ImageNet(IndexedImages):
    """`root/train/WNID/*`, and the validation images in `root/val`, unsorted, with a list that labels them.

    Args:
        root: The folder.
        val_list: What labels the validation images: the devkit's folder `ILSVRC2012_devkit_t12`, Kaggle's `LOC_val_solution.csv`, or a
            text file with the name and the class, or its index, of one image per line.
        options: As for `ImageData`.

    Raises:
        FileNotFoundError: If a folder or the list is missing.
        PermissionError: If a folder cannot be read.
        ValueError: If a class has no images, the list leaves an image out, or names a class that training lacks.
        ModuleNotFoundError: If the devkit is to be read and SciPy is not installed.
    """

    def __init__(self, root: str | Path, val_list: str | Path, **options: Any) -> None:
        super().__init__(**options)
        root, val_list = Path(root), Path(val_list)
        for folder in (root / "train", root / "val"):
            if not folder.is_dir():
                raise FileNotFoundError(f"root={root} holds no folder {folder.name}")
        self.class_names = find_classes(root / "train")
        paths = find_images([root / "val"])
        self.splits = {
            "train": files_of_classes(root / "train", self.class_names),
            "val": LabelledFiles(paths, read_labels(val_list, paths, self.class_names)),
        }

    def images(self, split: str) -> LabelledFiles:
        """The files of train or val; raises ValueError for test, whose labels are not public."""
        if split not in self.splits:
            raise ValueError(f"ImageNet has no labelled images for split={split!r}: use val")
        return self.splits[split]


def read_labels(file: Path, paths: list[Path], class_names: list[str]) -> list[int]:
    """Targets of image files, from the devkit's folder or a list; see `ImageNet`.

    Raises:
        FileNotFoundError: If there is no such list.
        ValueError: If it does not fit the images or the classes.
    """
    if file.is_dir():
        return _from_devkit(file / "data", paths, class_names)
    if not file.is_file():
        raise FileNotFoundError(f"val_list={file}: no such file or folder")
    targets = {name: index for index, name in enumerate(class_names)}
    labels: dict[str, int] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words or words[0] == "ImageId":
            continue
        label = words[1] if len(words) > 1 else ""
        index = targets.get(label, int(label) if label.isdigit() else -1)
        if not 0 <= index < len(class_names):
            raise ValueError(f"{file}, line {number}: {label!r} is neither a class of root/train nor an index below {len(class_names)}")
        labels[Path(words[0]).stem] = index
    left_out = [path.name for path in paths if path.stem not in labels]
    if left_out:
        raise ValueError(f"{file} leaves out {len(left_out)} of {len(paths)} validation images, the first {left_out[0]}")
    return [labels[path.stem] for path in paths]


def _from_devkit(data: Path, paths: list[Path], class_names: list[str]) -> list[int]:
    """The devkit numbers its classes in an order of its own, which only a MATLAB file tells."""
    truth, meta = data / GROUND_TRUTH, data / "meta.mat"
    for file in (truth, meta):
        if not file.is_file():
            raise FileNotFoundError(f"val_list={data.parent} is not the devkit: there is no {file}")
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('reading the devkit takes SciPy: pip install "debiformer[data]"') from error
    wnids = {int(synset[0]): str(synset[1]) for synset in loadmat(meta, squeeze_me=True)["synsets"]}
    numbers = [int(line) for line in truth.read_text().split()]
    if len(numbers) != len(paths):
        raise ValueError(f"{truth} labels {len(numbers)} images, root/val holds {len(paths)}")
    places = [_number(path, len(numbers)) - 1 for path in paths]
    targets = {name: index for index, name in enumerate(class_names)}
    unknown = sorted({wnids.get(number, str(number)) for number in numbers} - set(targets))
    if unknown:
        raise ValueError(f"{truth} names classes that root/train lacks: {', '.join(unknown[:5])}")
    return [targets[wnids[numbers[place]]] for place in places]


def _number(path: Path, most: int) -> int:
    found = NUMBERED.search(path.name)
    if found is None or not 1 <= int(found[1]) <= most:
        raise ValueError(
            f"{path} has no number from 1 to {most} in its name, like ILSVRC2012_val_00000001.JPEG: the devkit's labels go by it"
        )
    return int(found[1])
