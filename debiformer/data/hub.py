"""Data sets that other libraries hold: Hugging Face's, and whatever timm can read."""

import io
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from .classification import IndexedImages
from .images import decode_image


class HuggingFaceImages(IndexedImages):
    """A data set of Hugging Face's `datasets`: from the hub, a folder of files, or a folder that `save_to_disk` wrote.

    Args:
        path: Name on the hub, or a folder.
        name: Configuration, where the data set has several.
        image_column, label_column: Features that hold the image and its class.
        train_split, val_split, test_split: What the data set calls its splits.
        options: As for `ImageData`.

    Raises:
        ModuleNotFoundError: If `datasets` is not installed.
        ValueError: If a split or a column is missing, or the labels are no classes.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('data sets of Hugging Face take more packages: pip install "debiformer[data]"') from error
        saved = (Path(path) / "dataset_dict.json").is_file()
        found = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, name)
        self.path, self.image_column, self.label_column = path, image_column, label_column
        self.split_names = {"train": train_split, "val": val_split, "test": test_split}
        for split in (train_split, val_split):
            if split not in found:
                raise ValueError(f"{path} has no split {split!r} but {', '.join(found)}: name them with train_split and val_split")
        features = found[train_split].features
        for column in (image_column, label_column):
            if column not in features:
                raise ValueError(f"{path} has no column {column!r} but {', '.join(features)}: name them with image_column and label_column")
        if not isinstance(features[label_column], datasets.ClassLabel):
            raise ValueError(f"{path}: column {label_column!r} holds {features[label_column]}, not a ClassLabel")
        self.class_names = list(features[label_column].names)
        for split in {train_split, val_split, *({test_split} & set(found))}:
            labels = set(found[split][label_column])
            odd = labels - set(range(len(self.class_names)))
            if odd:
                raise ValueError(
                    f"{path}, split {split}: labels {', '.join(map(str, odd))} are none of the {len(self.class_names)} classes"
                )
            if split == train_split and len(labels) < len(self.class_names):
                empty = [name for index, name in enumerate(self.class_names) if index not in labels]
                raise ValueError(f"{path}, split {split}: no images of {', '.join(empty[:5])}")
        self.splits = {split: part.cast_column(image_column, datasets.Image(decode=False)) for split, part in found.items()}

    def images(self, split: str) -> "_Rows":
        """The rows of a split; raises ValueError where there is none."""
        name = self.split_names[split]
        if name not in self.splits:
            raise ValueError(f"{self.path} has no split {name!r} but {', '.join(self.splits)}: name it with {split}_split")
        return _Rows(self.splits[name], self.image_column, self.label_column, f"{self.path}, {name}")


class _Rows:
    """Rows of a Hugging Face data set."""

    def __init__(self, part: Any, image_column: str, label_column: str, source: str) -> None:
        self.part, self.image_column, self.label_column, self.source = part, image_column, label_column, source

    def __len__(self) -> int:
        return len(self.part)

    def name(self, index: int) -> str:
        return f"{self.source}, row {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        row = self.part[index]
        image = row[self.image_column]
        file = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
        return decode_image(file, self.name(index)), row[self.label_column]


class TimmImages(IndexedImages):
    """What `timm.data.create_dataset` can read: a tar file of class folders, a folder, or one of torchvision's data sets.

    Args:
        train_root: Folder or tar file to train on.
        val_root: Folder or tar file to validate on; left out, `train_root`, of which timm then takes another split.
        reader: timm's name of the data set or reader, such as torch/cifar10; empty for folders and tar files.
        train_split, val_split: What the data set calls its splits.
        options: As for `ImageData`.

    Raises:
        FileNotFoundError: If a folder or file is missing.
        ValueError: If timm would read it as a stream, or the splits have different classes.
    """

    def __init__(
        self,
        train_root: str | Path,
        val_root: str | Path | None = None,
        reader: str = "",
        train_split: str = "train",
        val_split: str = "validation",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        roots = {"train": Path(train_root), "val": Path(val_root or train_root)}
        for split, root in roots.items():
            if not root.exists():
                raise FileNotFoundError(f"{split}_root={root}: no such file or folder")
        names = {"train": train_split, "val": val_split}
        found = {split: create_dataset(reader, root=str(root), split=names[split]) for split, root in roots.items()}
        for dataset in found.values():
            if isinstance(dataset, IterableDataset):
                raise ValueError(f"reader={reader!r} is a stream: use debiformer.data.shards.TarShards")
        self.splits = {split: _Indexed(dataset, str(roots[split])) for split, dataset in found.items()}
        self.class_names = self.splits["train"].class_names
        if self.splits["val"].class_names != self.class_names:
            odd = sorted(set(self.class_names) ^ set(self.splits["val"].class_names))
            raise ValueError(f"{roots['train']} and {roots['val']} must hold the same classes, but {', '.join(odd)} is in one only")

    def images(self, split: str) -> "_Indexed":
        """The images of train or val; raises ValueError for test."""
        if split not in self.splits:
            raise ValueError("these data have no split test: give val_root the images to test on, and run validate")
        return self.splits[split]


class _Indexed:
    """A data set of timm's, by index: with a reader, or torchvision's that hands out images."""

    def __init__(self, dataset: Any, source: str) -> None:
        self.dataset, self.source = dataset, source
        self.reader = getattr(dataset, "reader", None)
        holder = self.reader or dataset
        numbered = (
            holder.class_name_to_idx if hasattr(holder, "class_name_to_idx") else holder.class_to_idx
        )  # timm's tar reader, all others
        self.class_names = sorted(numbered, key=numbered.__getitem__)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.source}: {self.reader.filename(index)}" if self.reader else f"{self.source}, image {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        if self.reader:
            file, target, *_ = self.reader[index]
            return decode_image(file, self.name(index)), int(target)
        image, target = self.dataset[index]
        return image.convert("RGB"), int(target)
