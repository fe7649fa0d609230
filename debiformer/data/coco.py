"""Data sets with annotations in COCO's JSON."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .boxes import Instance, Record, check_files, clean
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
        sizes = {image["id"]: (int(image["width"]), int(image["height"])) for image in images}
        for name, rows in {"images": images, "annotations": annotations, "categories": categories}.items():
            check_unique((row["id"] for row in rows), f"{file}: {name}")
        categories = sorted(categories, key=lambda category: category["id"])
        labels = {category["id"]: label for label, category in enumerate(categories)}
        names = [str(category["name"]) for category in categories]
        instances: dict[Any, list[Instance]] = {image["id"]: [] for image in images}
        for row in annotations:
            where = f"{file}: annotation {row['id']}"
            known: dict[str, dict[Any, Any]] = {"image_id": sizes, "category_id": labels}
            for key, ids in known.items():
                if row[key] not in ids:
                    raise ValueError(f"{where} has {key} {row[key]}, which is not in the file")
            x, y, width, height = map(float, row["bbox"])
            mask = check_mask(row.get("segmentation"), sizes[row["image_id"]], where) if masks else None
            instance = Instance(labels[row["category_id"]], (x, y, x + width, y + height), bool(row.get("iscrowd")), row.get("area"), mask)
            instances[row["image_id"]].append(instance)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not in COCO's format: {error!r}") from error
    records = [Record(folder / image["file_name"], sizes[image["id"]], image["id"], instances[image["id"]]) for image in images]
    check_files(records, str(file))
    return clean(records, str(file)), names


def check_unique(ids: Iterable[Any], what: str) -> None:
    """Raise a ValueError that names ids which are there more than once."""
    twice = [str(id) for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{what} with the same id: {', '.join(twice[:5])}{' ...' if len(twice) > 5 else ''}")


def check_mask(mask: Any, size: tuple[int, int], where: str) -> Any:
    """A mask as it is; raises a ValueError if it is none, or a run-length code for an image of another size (width, height)."""
    if isinstance(mask, dict):
        height, width = mask["size"]
        if (width, height) != size:
            raise ValueError(f"{where} has a run-length code for {width}x{height} pixels; its image has {size[0]}x{size[1]}")
    elif not isinstance(mask, list) or not mask or any(len(polygon) < 6 or len(polygon) % 2 for polygon in mask):
        raise ValueError(f"{where} has no mask: polygons must have three corners or more, as x, y, x, y; or set data.masks to false")
    return mask
