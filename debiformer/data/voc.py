"""Data sets with annotations in PASCAL VOC's XML."""

from math import isfinite, nan
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .boxes import Instance, Record, check_files, check_unique, clean
from .detection import DetectionData


class VocData(DetectionData):
    """Images with boxes in PASCAL VOC's layout: JPEGImages, Annotations and ImageSets/Main; objects marked difficult count as crowds.

    Args:
        root: The folder that holds these three, such as VOC2012 or BCCD.
        train, val, test: Names of the lists in ImageSets/Main, with the name of an image on each line; without a list for it there is no
            test split.
        suffix: How the images' names end.
        options: As for `DetectionData`; there are no masks of instances.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If an annotation is not of this format.
    """

    def __init__(
        self, root: str | Path, train: str = "train", val: str = "val", test: str = "test", suffix: str = ".jpg", **options: Any
    ) -> None:
        root = Path(root)
        found: dict[str, list[tuple[str, ElementTree.Element]]] = {}
        for split, name in {"train": train, "val": val, "test": test}.items():
            listed = root / "ImageSets" / "Main" / f"{name}.txt"
            if listed.is_file():
                stems = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
                check_unique(stems, f"{listed}: images")
                found[split] = [(stem, read_xml(root / "Annotations" / f"{stem}.xml")) for stem in stems]
            elif split != "test":
                raise FileNotFoundError(f"root={root}: no list of images at {listed}")
        names = sorted({text(thing, "name", stem) for rows in found.values() for stem, xml in rows for thing in xml.findall("object")})
        records = {}
        for split, rows in found.items():
            made = [to_record(root / "JPEGImages" / f"{stem}{suffix}", xml, names, number) for number, (stem, xml) in enumerate(rows)]
            check_files(made, f"root={root}, {split}")
            records[split] = clean(made, f"root={root}, {split}")
        super().__init__(records, names, masks=False, **options)


def read_xml(file: Path) -> ElementTree.Element:
    """The root of an XML file."""
    if not file.is_file():
        raise FileNotFoundError(f"no annotation at {file}")
    try:
        return ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{file} is not XML: {error}") from error


def text(element: ElementTree.Element, path: str, where: object) -> str:
    """The text at a path inside an element."""
    found = element.findtext(path)
    if found is None:
        raise ValueError(f"{where}: the annotation has no {path}")
    return found.strip()


def number_in(element: ElementTree.Element, path: str, where: object) -> float:
    """The finite number at a path inside an element."""
    found = text(element, path, where)
    try:
        number = float(found)
    except ValueError:
        number = nan
    if not isfinite(number):
        raise ValueError(f"{where}: the annotation's {path} is {found!r}, not a number")
    return number


def to_record(file: Path, xml: ElementTree.Element, names: list[str], number: int) -> Record:
    """An image's record; VOC counts pixels from 1, and boxes to the last pixel inside."""
    size = (round(number_in(xml, "size/width", file)), round(number_in(xml, "size/height", file)))
    instances = []
    for thing in xml.findall("object"):
        x0, y0, x1, y1 = (number_in(thing, f"bndbox/{side}", file) for side in ("xmin", "ymin", "xmax", "ymax"))
        crowd = thing.findtext("difficult", "0").strip() == "1"
        instances.append(Instance(names.index(text(thing, "name", file)), (x0 - 1, y0 - 1, x1, y1), crowd))
    return Record(file, size, number, instances)
