"""Make the bundled sample of blood cells from the BCCD data set: python scripts/make_blood_cells.py BCCD_DIR

Every crop is a square on the longer side of a cell's box, moved inside the image where it sticks out and resized to 80 pixels: the
size of the cell, which alone would nearly tell the class, is gone. The fields are whole images at half their size, with their boxes.
The same input gives the same bytes.
"""

import json
import shutil
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

from debiformer.data.blood_cells import SAMPLE, Box, crop
from debiformer.data.folders import SPLITS

CLASSES = {"Platelets": "platelet", "RBC": "rbc", "WBC": "wbc"}
# The same field as BloodImage_00038 of the training list at another focus, and the only such pair: their thumbnails correlate by 0.97,
# those of any other two images by 0.64 at most.
SAME_FIELD = "BloodImage_00037"
JPEG_QUALITY = 90
MIN_SIDE = 8
RED_CELLS_PER_IMAGE = 6  # of 11 on average; keeps the sample under 5 MB
WHOLE_IMAGES = 6
FIELDS = {"train": 100, "val": 30, "test": 30}  # images at half their size
FIELD_QUALITY = 70


def read_splits(bccd: Path) -> dict[str, list[str]]:
    """Image names of each of the set's own lists; `trainval`, the union of two, is not used.

    Raises:
        ValueError: If an image is in two lists.
    """
    splits = {split: (bccd / "ImageSets" / "Main" / f"{split}.txt").read_text().split() for split in SPLITS}
    repeated = [name for name, count in Counter(chain.from_iterable(splits.values())).items() if count > 1]
    if repeated:
        raise ValueError(f"{bccd}/ImageSets/Main lists {', '.join(repeated)} more than once: its cells would be in two splits")
    return {split: sorted(name for name in names if name != SAME_FIELD) for split, names in splits.items()}


def read_boxes(annotation: Path) -> list[Box]:
    """All boxes of an image, good or bad, in the order of the file."""
    boxes = []
    for cell in ElementTree.parse(annotation).getroot().iter("object"):
        corners = [int(cell.findtext(f"bndbox/{corner}", "")) for corner in ("xmin", "ymin", "xmax", "ymax")]
        boxes.append(Box(CLASSES[cell.findtext("name", "")], *corners))
    return boxes


def is_usable(box: Box, image: Image.Image) -> bool:
    """Whether a box lies in the image and is not degenerate."""
    inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= image.width and box.y1 <= image.height
    return inside and min(box.x1 - box.x0, box.y1 - box.y0) >= MIN_SIDE


def make_crops(bccd: Path, split: str, names: list[str]) -> tuple[Counter[str], int]:
    """Write the crops of one split; returns the count of each class and that of the boxes left out."""
    written: Counter[str] = Counter()
    unusable = 0
    for name in names:
        image = Image.open(bccd / "JPEGImages" / f"{name}.jpg").convert("RGB")
        here: Counter[str] = Counter()
        for index, box in enumerate(read_boxes(bccd / "Annotations" / f"{name}.xml")):
            if not is_usable(box, image):
                unusable += 1
                print(f"left out: {split} {name} {box}")
            elif box.label != "rbc" or here["rbc"] < RED_CELLS_PER_IMAGE:
                here[box.label] += 1
                file = SAMPLE / split / box.label / f"{name}_{index:02}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                crop(image, box).save(file, quality=JPEG_QUALITY, optimize=True)
        written += here
    return written, unusable


def make_fields(bccd: Path, split: str, names: list[str]) -> None:
    """Write images of one split at half their size, and their usable boxes in COCO's format."""
    folder, images, annotations = SAMPLE / "fields", [], []
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, 1):
        image = Image.open(bccd / "JPEGImages" / f"{name}.jpg").convert("RGB")
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
        half.save(folder / split / f"{name}.jpg", quality=FIELD_QUALITY, optimize=True)
        images.append(dict(id=number, file_name=f"{name}.jpg", width=half.width, height=half.height))
        for box in filter(lambda box: is_usable(box, image), read_boxes(bccd / "Annotations" / f"{name}.xml")):
            x, y, width, height = box.x0 / 2, box.y0 / 2, (box.x1 - box.x0) / 2, (box.y1 - box.y0) / 2
            label = list(CLASSES.values()).index(box.label) + 1
            row = dict(
                id=len(annotations) + 1, image_id=number, category_id=label, bbox=[x, y, width, height], area=width * height, iscrowd=0
            )
            annotations.append(row)
    categories = [dict(id=number, name=name) for number, name in enumerate(CLASSES.values(), 1)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (folder / f"{split}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


def copy_whole_images(bccd: Path, names: list[str]) -> None:
    """Copy the first test images that show all classes, and write their usable boxes."""
    folder = SAMPLE / "whole"
    folder.mkdir()
    boxes: dict[str, list[Box]] = {}
    for name in names:
        source = bccd / "JPEGImages" / f"{name}.jpg"
        usable = [box for box in read_boxes(bccd / "Annotations" / f"{name}.xml") if is_usable(box, Image.open(source))]
        if {box.label for box in usable} == set(CLASSES.values()) and len(boxes) < WHOLE_IMAGES:
            shutil.copyfile(source, folder / source.name)
            boxes[source.name] = usable
    lines = [f'"{name}": {json.dumps([box._asdict() for box in cells])}' for name, cells in boxes.items()]
    (folder / "boxes.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Replace the sample and print what is in it."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "ImageSets" / "Main").is_dir():
        sys.exit("usage: make_blood_cells.py BCCD_DIR, the folder that holds Annotations, ImageSets and JPEGImages")
    bccd = Path(sys.argv[1])
    splits = read_splits(bccd)
    for folder in (*SPLITS, "fields", "whole"):
        shutil.rmtree(SAMPLE / folder, ignore_errors=True)
    rows = [(split, len(names), *make_crops(bccd, split, names)) for split, names in splits.items()]
    for split, names in splits.items():
        make_fields(bccd, split, names[: FIELDS[split]])
    copy_whole_images(bccd, splits["test"])

    print(f"{'':6}{'images':>8}{''.join(f'{label:>10}' for label in CLASSES.values())}{'left out':>10}{'kB':>8}")
    for folder, images, written, unusable in rows:
        counts = "".join(f"{written[label]:10}" for label in CLASSES.values())
        print(f"{folder:6}{images:8}{counts}{unusable:10}{kilobytes(SAMPLE / folder):8.0f}")
    print(f"{'fields':6}{sum(FIELDS.values()):8}{kilobytes(SAMPLE / 'fields'):48.0f}")
    print(f"{'whole':6}{WHOLE_IMAGES:8}{kilobytes(SAMPLE / 'whole'):48.0f}")
    print(f"{'all':6}{kilobytes(SAMPLE):56.0f}")


def kilobytes(folder: Path) -> float:
    """Size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1000


if __name__ == "__main__":
    main()
