"""Command predict with a checkpoint of detection: boxes in COCO's format, and masks where the detector gives them."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..data.masks import default_palette
from ..explain.boxes import draw
from ..models.detector import Boxes
from ..tasks.detection import DetectionTask
from ..tasks.prediction import load_task
from .labelling import shown
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
            found = detect(task, task.normalized(image), options.min_score)
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
    parser.add_argument("--min-score", type=float, default=0.3, help="least score of what is written, 0 to 1 (default 0.3)")
    options = parser.parse_args(arguments)
    if not 0 <= options.min_score <= 1:
        parser.error(f"--min-score {options.min_score} is not between 0 and 1")
    return options


@torch.inference_mode()
def detect(task: DetectionTask, pixels: torch.Tensor, min_score: float) -> Boxes:
    """What is found in a normalised image (3, H, W) with at least some score, on the CPU."""
    (found,) = task([pixels])
    kept = found["scores"] >= min_score
    return {name: value[kept].cpu() for name, value in found.items()}


def rows(found: Boxes, image_id: int) -> Iterator[dict[str, Any]]:
    """Detections of an image as COCO has them: x, y, width and height, and run-length codes of masks."""
    for index, (box, label, score) in enumerate(
        zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ):
        x0, y0, x1, y1 = box
        corner = [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)]
        row: dict[str, Any] = dict(image_id=image_id, category_id=label + 1, bbox=corner, score=round(score, 4))
        if "masks" in found:
            from faster_coco_eval.core import mask as coco

            code = coco.encode(np.asfortranarray((found["masks"][index, 0] > 0.5).numpy().astype(np.uint8)))
            row["segmentation"] = {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}
        yield row
