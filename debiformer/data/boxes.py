"""Images with boxes, and with masks of instances: what a record of an image holds, how it is checked and read."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .images import UnreadableImage, read_image

Target = dict[str, Any]


class Instance(NamedTuple):
    """One object of an image."""

    label: int
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the image
    crowd: bool = False  # a group that is not told apart, or an object too hard to judge: neither trained on nor counted
    area: float | None = None  # in pixels, of the mask where there is one; None takes the box's
    mask: Any = None  # polygons, or a run-length code, as COCO has them


class Record(NamedTuple):
    """An image and its objects."""

    file: Path
    size: tuple[int, int]  # width and height in pixels
    id: int  # of the image in its data set
    instances: list[Instance]


def clean(records: Iterable[Record], source: str) -> list[Record]:
    """Records with boxes cut off at the borders of their image; those without area inside it are left out, with one warning for all."""
    cleaned, odd = [], []
    for record in records:
        kept = []
        for instance in record.instances:
            box = inside(instance.box, record.size)
            if box[2] - box[0] < 1 or box[3] - box[1] < 1:
                corners = ", ".join(f"{value:g}" for value in instance.box)
                odd.append(f"{record.file.name}: ({corners}) in {record.size[0]}x{record.size[1]} pixels")
            else:
                kept.append(instance._replace(box=box))
        cleaned.append(record._replace(instances=kept))
    if odd:
        shown = "; ".join(odd[:3]) + ("; ..." if len(odd) > 3 else "")
        warnings.warn(
            f"{source}: left out {len(odd)} boxes (x0, y0, x1, y1) of less than a pixel inside their image: {shown}", stacklevel=2
        )
    return cleaned


def inside(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box cut off at the borders of an image of some width and height."""
    (x0, y0, x1, y1), (width, height) = box, size
    return min(max(x0, 0.0), width), min(max(y0, 0.0), height), min(max(x1, 0.0), width), min(max(y1, 0.0), height)


def check_files(records: Sequence[Record], source: str) -> None:
    """Raise a FileNotFoundError that counts the files which are not there; each folder is listed once."""
    listed = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in {record.file.parent for record in records}}
    missing = [record.file for record in records if record.file.name not in listed[record.file.parent]]
    if missing:
        raise FileNotFoundError(f"{source}: {len(missing)} of {len(records)} images are missing, such as {missing[0]}")


def check_unique(ids: Iterable[Any], what: str) -> None:
    """Raise a ValueError that names ids which are there more than once."""
    twice = [str(id) for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{what} with the same id: {', '.join(twice[:5])}{' ...' if len(twice) > 5 else ''}")


class ImagesWithBoxes:
    """Images with targets: boxes (N, 4) float32 in pixels x0, y0, x1, y1, labels (N,), crowd (N,) and area (N,), id and, if wanted, masks
    (N, H, W) uint8.
    """

    def __init__(self, records: Sequence[Record], masks: bool) -> None:
        self.records, self.masks = list(records), masks

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """The path of the image."""
        return str(self.records[index].file)

    def read(self, index: int) -> tuple[Image.Image, Target]:
        """An image and its target; raises UnreadableImage if it cannot be read, or is of another size than its record says."""
        record = self.records[index]
        image = read_image(record.file)
        if image.size != record.size:
            raise UnreadableImage(
                f"{record.file}: the image has {image.width}x{image.height} pixels, its boxes are for {record.size[0]}x{record.size[1]}"
            )
        of = record.instances
        boxes = np.array([instance.box for instance in of], dtype=np.float32).reshape(-1, 4)
        areas = [(x1 - x0) * (y1 - y0) if instance.area is None else instance.area for instance in of for x0, y0, x1, y1 in [instance.box]]
        target = {
            "boxes": boxes,
            "labels": np.array([instance.label for instance in of], dtype=np.int64),
            "crowd": np.array([instance.crowd for instance in of], dtype=bool),
            "area": np.array(areas, dtype=np.float32),
            "id": record.id,
        }
        if self.masks:
            try:
                target["masks"] = decode_masks([instance.mask for instance in of], record.size)
            except Exception as error:  # whatever the decoder of run-length codes raises
                raise UnreadableImage(f"{record.file}: its masks cannot be decoded: {error}") from error
        return image, target


def decode_masks(masks: Sequence[Any], size: tuple[int, int]) -> np.ndarray:
    """Polygons and run-length codes to masks (N, H, W), uint8."""
    from faster_coco_eval.core import mask as coco

    width, height = size
    decoded = [np.zeros((0, height, width), dtype=np.uint8)]
    for mask in masks:
        codes = coco.frPyObjects(mask, height, width) if isinstance(mask, list) or isinstance(mask["counts"], list) else mask
        decoded.append(coco.decode(coco.merge(codes) if isinstance(codes, list) else codes).reshape(height, width)[None])
    return np.concatenate(decoded)
