"""Command predict with a checkpoint of segmentation: a mask for every image."""

import argparse
from dataclasses import replace
from typing import Any

from ..data.masks import overlay, paint
from ..models.segmentation_inference import Inference
from ..tasks.prediction import load_task
from ..tasks.segmentation import SegmentationTask
from .pictures import each, find, parser_for, write
from .reporting import check_folder


def run(arguments: list[str]) -> int:
    """Write a mask for each image; 1 if not one image could be read, else 0.

    Raises:
        FileNotFoundError: If the checkpoint or an image is missing.
        PermissionError: If the output folder cannot be written.
        ValueError: If an argument or the checkpoint will not do.
    """
    options = parse(arguments)
    names = find(options.images)
    task = load_task(SegmentationTask, options.checkpoint, options.device)
    task.inference = inference_from(options, task.inference)
    check_folder(options.output)
    done = 0
    for _, name, image in each(names):
        mask = task.segment(task.normalized(image)).cpu().numpy()
        write(paint(mask, task.hparams["palette"]), options.output / "masks", name, ".png")
        if options.draw:
            write(overlay(image, mask, task.hparams["palette"]), options.output / "pictures", name, ".jpg")
        done += 1
    print(f"written  {done} masks in {options.output / 'masks'}")
    return 0 if done else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of predict for segmentation."""
    parser = parser_for("segmentation: masks as PNG with the colours of the classes")
    add_inference(parser)
    return parser.parse_args(arguments)


def add_inference(parser: argparse.ArgumentParser) -> None:
    """The options for how an image is segmented."""
    parser.add_argument("--short-side", type=int, help="pixels of an image's shorter side; 0 keeps its size (default: as in evaluation)")
    parser.add_argument(
        "--window", type=int, help="pixels of windows that slide over the image; 0 takes it whole (default: as in evaluation)"
    )
    parser.add_argument("--stride", type=int, help="pixels from one window to the next (default: two thirds of the window)")
    parser.add_argument("--scales", type=float, nargs="+", help="factors on the size, to average over (default: as in evaluation)")
    parser.add_argument("--flip", action="store_true", help="see each scale in the mirror too")


def inference_from(options: argparse.Namespace, trained: Inference) -> Inference:
    """How images are segmented: as in evaluation, but for what the options say.

    Raises:
        ValueError: If that will not do.
    """
    given: dict[str, Any] = {"window": options.window, "stride": options.stride, "scales": options.scales and tuple(options.scales)}
    if options.short_side is not None:
        given["short_side"] = options.short_side or None
        given |= {} if options.short_side else {"long_side": None}
    changes = {name: value for name, value in given.items() if value is not None or name.endswith("_side")}
    if options.window is not None:  # another window has another stride, and none where it is 0
        changes |= {"window": options.window or None, "stride": options.stride}
    return replace(trained, **changes, flip=options.flip or trained.flip)
