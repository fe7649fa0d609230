"""Command predict with a checkpoint of detection: boxes in COCO's format, and masks where the detector gives them."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from ..data.images import shown
from ..data.masks import default_palette, run_lengths
from ..explain.boxes import draw
from ..models.detector import Boxes
from ..tasks.detection import DetectionTask
from ..tasks.prediction import load_task
from .pictures import each, find, parser_for, write
from .reporting import check_folder


def run(arguments: list[str]) -> int:
    """Write what is found in each image; 1 if not one image could be read, else 0.

    Raises:
        FileNotFoundError: If the checkpoint or an image is missing.
        PermissionError: If the output folder cannot be written.
        ValueError: If an argument or the checkpoint will not do.
    """
    options = parse(arguments)
    names = find(options.images)
    task = load_task(DetectionTask, options.checkpoint, options.device)
    check_folder(options.output)
    classes = task.hparams["class_names"]
    palette = default_palette(len(classes))
    images: list[dict[str, Any]] = []
    with (options.output / "detections.json").open("w", encoding="utf-8") as file:
        file.write('{"annotations": [')  # one after the other: they need not fit into memory
        count = 0
        for path, name, image in each(names):
            found = task.detect(task.normalized(image), options.min_score)
            images.append(dict(id=len(images) + 1, file_name=shown(path), width=image.width, height=image.height))
            for row in rows(found, len(images)):
                count += 1
                file.write(("\n" if count == 1 else ",\n") + json.dumps({"id": count} | row))
            if options.draw:
                write(draw(image, found, classes, palette), options.output / "pictures", name, ".jpg")
        categories = [dict(id=number, name=name) for number, name in enumerate(classes, 1)]
        file.write(f'\n],\n"images": {json.dumps(images)},\n"categories": {json.dumps(categories)}}}\n')
    print(f"written  {options.output / 'detections.json'}, of {len(images)} images")
    return 0 if images else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of predict for detection, checked before any work is done."""
    parser = parser_for("detection: detections.json in COCO's format")
    add_min_score(parser)
    return parser.parse_args(arguments)


def add_min_score(parser: argparse.ArgumentParser) -> None:
    """The option for what is found with little confidence."""
    parser.add_argument("--min-score", type=score, default=0.3, help="least score of what is written, 0 to 1 (default 0.3)")


def score(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def rows(found: Boxes, image_id: int) -> Iterator[dict[str, Any]]:
    """Detections of an image as COCO has them: x, y, width and height, and run-length codes of masks."""
    for index, (box, label, score) in enumerate(
        zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ):
        x0, y0, x1, y1 = box
        corner = [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)]
        row: dict[str, Any] = dict(image_id=image_id, category_id=label + 1, bbox=corner, score=round(score, 4))
        if "masks" in found:
            row["segmentation"] = run_lengths((found["masks"][index, 0] > 0.5).numpy())
        yield row
