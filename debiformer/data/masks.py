"""Class masks: how they are read from files, which classes they have, and how they are shown."""

import csv
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..nearest import did_you_mean
from .images import UnreadableImage

IGNORED = 255  # the class of pixels that no loss and no metric counts, as mask files commonly have it

Colour = tuple[int, int, int]


class Classes(NamedTuple):
    """Names of classes in the order of their numbers, and a colour for each."""

    names: list[str]
    palette: list[Colour]


def read_classes(classes: str | Path | Sequence[str]) -> Classes:
    """Classes by name of a known set, from a CSV file with the columns name, red, green and blue, or name alone, or from a list of names.

    Raises:
        ValueError: If there is no such set and no such file, or its content is not as said.
    """
    if not isinstance(classes, str | Path):
        return Classes(list(classes), default_palette(len(classes)))
    known = {file.name.removesuffix(".csv"): file for file in files("debiformer.data").joinpath("classes").iterdir()}
    file = known.get(str(classes)) or Path(classes)
    if not file.is_file():
        raise ValueError(f"classes={str(classes)!r} is no file, and no known set: {did_you_mean(str(classes), known)}")
    needed = f"classes={classes}: the file needs the columns name,red,green,blue with whole numbers, or name alone, as UTF-8 text"
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
        names = [row["name"] for row in rows]
        coloured = bool(rows) and "red" in rows[0]
        palette = [(int(row["red"]), int(row["green"]), int(row["blue"])) for row in rows] if coloured else default_palette(len(rows))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{needed} ({error!r})") from error
    if not rows or any(not 0 <= value <= 255 for colour in palette for value in colour):
        raise ValueError(f"classes={classes}: the file needs a line for each class, with colours from 0 to 255")
    return Classes(names, palette)


def default_palette(classes: int) -> list[Colour]:
    """Colours that are far apart for numbers that are close: PASCAL VOC's, which spreads the bits of a number over the channels."""

    def colour(number: int) -> Colour:
        red, green, blue = (sum((number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))
        return red, green, blue

    return [colour(number) for number in range(1, classes + 1)]  # 0 would be black


def read_mask(path: str | Path, classes: int, first: int = 0, ignored: int = IGNORED) -> Image.Image:
    """A mask as 32-bit numbers of classes from 0, with `IGNORED` where a pixel has none.

    Args:
        path: A picture of one channel, or one with a palette, whose numbers are taken.
        classes: How many classes there are.
        first: What the file calls the first class; smaller numbers are ignored, as ADE20K's 0 is.
        ignored: What the file calls pixels without a class.

    Raises:
        UnreadableImage: If the file is missing or damaged, or a picture in colours.
        ValueError: If it has other numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise UnreadableImage(f"{path}: no such mask")
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged files
        raise UnreadableImage(f"{path}: {error or type(error).__name__}") from error
    if picture.mode not in ("1", "L", "P", "I") and not picture.mode.startswith("I;16"):
        raise UnreadableImage(f"{path}: a mask in {picture.mode} colours; it must be a picture of one channel with the number of a class")
    numbers = np.asarray(picture).astype(np.int32)
    mask = np.where((numbers == ignored) | (numbers < first), IGNORED, numbers - first)
    odd = numbers[(numbers >= first + classes) & (numbers != ignored)]
    if odd.size:
        raise ValueError(
            f"{path}: the mask has the class {odd[0]}, but the {classes} classes are {first} to {first + classes - 1}, and {ignored} is "
            "ignored: mend data.classes, data.first_class or data.ignored_class"
        )
    return Image.fromarray(mask.astype(np.int32))


def paint(mask: NDArray[np.uint8], palette: Sequence[Colour]) -> Image.Image:
    """A mask (H, W) as a picture of one channel that shows its classes in their colours."""
    picture = Image.fromarray(mask, "P")
    picture.putpalette([value for colour in palette for value in colour])
    return picture


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask (H, W) as COCO has it: its `size` and, column by column, the lengths of its runs as text, `counts`."""
    from faster_coco_eval.core import mask as coco

    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


def overlay(image: Image.Image, mask: NDArray[np.uint8], palette: Sequence[Colour], opacity: float = 0.5) -> Image.Image:
    """A mask (H, W) over its image; ignored pixels show the image alone."""
    colours = paint(mask, palette).convert("RGB")
    shown = Image.fromarray(np.where(mask == IGNORED, 0, round(255 * opacity)).astype(np.uint8))
    return Image.composite(colours, image, shown)
