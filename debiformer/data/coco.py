"""Data sets with annotations in COCO's JSON."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

from .boxes import Instance, Record, check_files, check_unique, clean
from .detection import DetectionData


class CocoData(DetectionData):
    """Images with annotations in COCO's format: boxes, and masks as polygons or run-length codes.

    Args:
        root: Folder of the data set.
        images: Folders with the images, in `root`; {split} stands for a split.
        annotations: Files with the annotations, in `root`.
        train, val, test: What folders and files call the splits; without a file of annotations for it there is no test split.
        masks: Whether masks are read, for instance segmentation.
        options: As for `DetectionData`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If annotations contradict themselves: ids given twice or pointing nowhere, codes of another size than their image.
    """

    def __init__(
        self,
        root: str | Path,
        images: str = "{split}2017",
        annotations: str = "annotations/instances_{split}2017.json",
        train: str = "train",
        val: str = "val",
        test: str = "test",
        masks: bool = False,
        **options: Any,
    ) -> None:
        root = Path(root)
        records, names = {}, {}
        for split, name in {"train": train, "val": val, "test": test}.items():
            file = root / annotations.format(split=name)
            if split != "test" or file.is_file():
                records[split], names[split] = read_coco(file, root / images.format(split=name), masks)
                if names[split] != names["train"]:
                    raise ValueError(f"{file} has the classes {names[split]}, the split {train} has {names['train']}")
        super().__init__(records, names["train"], masks=masks, **options)


def read_coco(file: Path, folder: Path, masks: bool) -> tuple[list[Record], list[str]]:
    """The records of a file of annotations for images in a folder, and the names of its classes by category id.

    Raises:
        FileNotFoundError: If the file or an image is missing.
        ValueError: If the file is not JSON of this format, or contradicts itself.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no annotations at {file}")
    try:
        content = json.loads(file.read_bytes())
        images, annotations, categories = (content[key] for key in ("images", "annotations", "categories"))
        sizes = {image["id"]: to_size(image, file) for image in images}
        for name, rows in {"images": images, "annotations": annotations, "categories": categories}.items():
            check_unique((row["id"] for row in rows), f"{file}: {name}")
        categories = sorted(categories, key=lambda category: category["id"])
        labels = {category["id"]: label for label, category in enumerate(categories)}
        names = [str(category["name"]) for category in categories]
        instances: dict[Any, list[Instance]] = {image["id"]: [] for image in images}
        for row in annotations:
            where = f"{file}: annotation {row['id']}"
            try:
                instance = to_instance(row, sizes, labels, masks)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error if type(error) is ValueError else repr(error)}") from error
            instances[row["image_id"]].append(instance)
        records = [Record(folder / image["file_name"], sizes[image["id"]], image["id"], instances[image["id"]]) for image in images]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not in COCO's format: {error!r}") from error
    check_files(records, str(file))
    return clean(records, str(file)), names


def to_size(image: dict[str, Any], file: Path) -> tuple[int, int]:
    """Width and height of an image's row."""
    width, height = image["width"], image["height"]
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        raise ValueError(f"{file}: image {image['id']} has {width!r}x{height!r} pixels")
    return width, height


def to_instance(row: dict[str, Any], sizes: dict[Any, tuple[int, int]], labels: dict[Any, int], masks: bool) -> Instance:
    """An annotation's row as an instance; raises whatever says what is wrong with it."""
    known: dict[str, dict[Any, Any]] = {"image_id": sizes, "category_id": labels}
    for key, ids in known.items():
        if row[key] not in ids:
            raise ValueError(f"{key} {row[key]} is not in the file")
    if not isinstance(row["bbox"], list) or len(row["bbox"]) != 4:
        raise ValueError(f"bbox {row['bbox']} is not x, y, width and height")
    x, y, width, height = map(float, row["bbox"])
    if not all(map(isfinite, (x, y, width, height))):
        raise ValueError(f"bbox {row['bbox']} is not finite")
    mask = check_mask(row.get("segmentation"), sizes[row["image_id"]]) if masks else None
    return Instance(labels[row["category_id"]], (x, y, x + width, y + height), bool(row.get("iscrowd")), row.get("area"), mask)


def check_mask(mask: Any, size: tuple[int, int]) -> Any:
    """A mask as it is; raises a ValueError if it is none, or a run-length code for an image of another size (width, height)."""
    if isinstance(mask, dict):
        height, width = mask["size"]
        counts = mask["counts"]
        if (width, height) != size:
            raise ValueError(f"a run-length code for {width}x{height} pixels; its image has {size[0]}x{size[1]}")
        if isinstance(counts, list) and sum(counts) != height * width:
            raise ValueError(f"a run-length code of {sum(counts)} pixels; its image has {height * width}")
    elif not isinstance(mask, list) or not mask or any(len(polygon) < 6 or len(polygon) % 2 for polygon in mask):
        raise ValueError("no mask: polygons must have three corners or more, as x, y, x, y; or set data.masks to false")
    elif not all(isinstance(number, int | float) and isfinite(number) for polygon in mask for number in polygon):
        raise ValueError("a polygon of what are no numbers")
    return mask
