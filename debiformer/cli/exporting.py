"""Command export: a checkpoint as a file that runs without this library, compared with it on the spot."""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import nn

from .. import __version__
from ..data.blood_cells import whole_images
from ..data.images import find_images, read_image
from ..deploy import example
from ..deploy.agreement import TOLERANCE, Agreement, agreement
from ..deploy.formats import FORMATS, Format, coreml_interface
from ..deploy.graphs import Description, Outputs, folded, graph
from ..deploy.quantization import quantize
from ..tasks.detection import DetectionTask
from ..tasks.prediction import kind_at, load_classifier, load_task
from ..tasks.segmentation import SegmentationTask
from .arguments import at_least_one

STRIDES = (4, 8, 16, 32)
DENSE: dict[str, Any] = {"segmentation": SegmentationTask, "detection": DetectionTask}
OTHER_SIZES = ((64, 96), (160, 224))  # at which files for any size are compared too
CALIBRATION = 300  # images are plenty for the ranges of activations


def run(arguments: list[str]) -> int:
    """Export and compare; 1 if the file does not agree with eager mode, else 0.

    Raises:
        FileNotFoundError: If the checkpoint, the output's folder or an image is missing.
        ValueError: If the checkpoint, the size, the precision or the file's ending will not do.
        ImportError: If the format needs what is not installed.
    """
    options = parse(arguments)
    form = FORMATS[options.format]
    file = options.output or Path(f"{Path(options.checkpoint).stem}{form.suffix}")
    check(options, form, file)
    calibration = find_images(options.calibration) if options.calibration else []
    model, description = read(options.checkpoint, form, options)
    begin = time.perf_counter()
    routes = form.routes and description.precision != "int8"  # which is made of a file of its own
    outputs = Outputs(folded(model), options.features, routes)
    size = "x".join(map(str, description.size)) if description.size else "any size"
    more = ", or any other," if description.any_size and description.size else ""
    print(
        f"{file.name}: {description.task} of images of {size}{more} {'one' if description.one_image else 'any number'} at once", flush=True
    )
    given = deepcopy(outputs).bfloat16() if description.precision == "bfloat16" and form.suffix == ".pt2" else outputs
    converted = form.convert(graph(given, description), description)
    photos = [read_image(path) for path, _ in whole_images()]
    holds = check_routes(form, converted, description, outputs, photos) if outputs.routes else True
    form.save(converted, file, description, len(description.outputs))
    if description.precision == "int8":
        quantize(file, (prepared(read_image(path), description) for path in calibration[:CALIBRATION]))
    runner = Path(file.parent, f"run_{file.stem}.py")
    shutil.copyfile(example.__file__, runner)
    if form.runs_here:
        holds = check_outputs(file, description, outputs, photos) and holds
        if calibration and description.task != "features":
            print_alike(file, description, outputs, calibration)
    else:
        print(f"not compared  {options.format} runs on Macs only; the file maps {coreml_interface(file)}")
    print(f"written  {file} in {time.perf_counter() - begin:.0f} s; run it without this library: python {runner} {file} IMAGE")
    if not holds:
        print("The file does NOT agree with the model that it was made from: do not deploy it before you know why.")
    return 0 if holds else 1


def check_routes(form: Format, converted: Any, description: Description, outputs: Outputs, photos: list[Image]) -> bool:
    """Print how many regions are routed as in eager mode, by a file of the same graph that tells; False if others are wrong in float32."""
    count = len(description.outputs)
    total = Agreement([])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"routed{form.suffix}")
        for index, images in enumerate(batches(description, photos)):
            expected = expected_of(outputs, images)
            if index == 0:
                form.save(converted, file, description, len(expected))
                runs = run_of(file)
            found = agreement(runs(images), expected, count, rows=description.task == "detection")
            total.routes, total.tied, total.other = total.routes + found.routes, total.tied + found.tied, total.other + found.other
    equal = total.routes - total.tied - total.other
    ties = f", and {total.tied} between regions that answer alike, as those of padding do" if total.tied else ""
    print(f"routes  {equal} of {total.routes} equal{ties}")
    return not total.other or description.precision != "float32"


def check_outputs(file: Path, description: Description, outputs: Outputs, photos: list[Image]) -> bool:
    """Print how far the outputs of a file are from eager mode's; False if that is too far for float32."""
    runs = run_of(file)
    exact = description.precision == "float32"
    holds = True
    for images in batches(description, photos):
        found = agreement(runs(images), expected_of(outputs, images), len(description.outputs), rows=description.task == "detection")
        holds = holds and (found.holds or not exact)
        bound = f"float32: at most {TOLERANCE:g}" if exact else f"{description.precision}: no bound"
        for name, error in zip(description.outputs, found.errors, strict=True):
            shape = f"{len(images)}x{images.shape[2]}x{images.shape[3]}"
            print(f"batch {shape}  {name}: differs from eager mode by {error:.1e} of its norm ({bound})")
    return holds


def print_alike(file: Path, description: Description, outputs: Outputs, paths: list[Path]) -> None:
    """Print for how many images, or pixels of masks, a file decides as eager mode does."""
    runs = run_of(file)
    same = total = 0
    for path in paths:
        images = prepared(read_image(path), description)
        (found, *_), (expected, *_) = runs(images), expected_of(outputs, images)
        same += int((found.argmax(1) == expected.argmax(1)).sum())
        total += expected.argmax(1).size
    what = "images" if description.task == "classification" else "pixels"
    print(f"decided alike  {same} of {total} {what} of --calibration ({same / total:.2%})")


def batches(description: Description, photos: list[Image]) -> Iterator[np.ndarray]:
    """Photographs as the model takes them, (B, 3, H, W): one and all, and where any size will do, of others too."""
    sizes = [description.size, *(OTHER_SIZES if description.any_size else ())]
    for size in sizes:
        shape = replace(description, size=size)
        yield prepared(photos[0], shape)
        if size is not None and not description.one_image:
            yield np.concatenate([prepared(photo, shape) for photo in photos])


def prepared(image: Image, description: Description) -> np.ndarray:
    """An image as the program beside the file brings it to the model."""
    return example.prepare(image, asdict(description))


@torch.no_grad()
def expected_of(outputs: Outputs, images: np.ndarray) -> list[np.ndarray]:
    """What eager mode finds."""
    return [out.numpy() for out in outputs(torch.from_numpy(images))]


def run_of(file: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """What runs a file: the program that lies beside it."""
    return example.load(file)[1]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of export."""
    parser = argparse.ArgumentParser(prog="debiformer export", description="Write a checkpoint as a file that runs without this library.")
    parser.add_argument("checkpoint", help="best.ckpt or last.ckpt of a run, a shared folder, or hf-hub:OWNER/NAME")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="of the file (default onnx)")
    parser.add_argument("--output", type=Path, help="the file (default: the checkpoint's name, in this folder)")
    parser.add_argument(
        "--size",
        type=lambda text: None if text == "any" else at_least_one(text),
        nargs="+",
        help='pixels of a square, height and width, or "any" (default: as in evaluation; any, where that takes images as they come)',
    )
    parser.add_argument("--features", action="store_true", help="of a classifier: the maps at strides 4 to 32 instead of the logits")
    precisions = list(dict.fromkeys(name for form in FORMATS.values() for name in form.precisions))
    parser.add_argument("--precision", choices=precisions, default="float32", help="of the file (default float32)")
    parser.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        metavar="IMAGE_OR_FOLDER",
        help="images that int8 takes its ranges from, and any is judged by",
    )
    options = parser.parse_args(arguments)
    if options.size is not None and (len(options.size) > 2 or (None in options.size and len(options.size) > 1)):
        shown = " ".join("any" if side is None else str(side) for side in options.size)
        parser.error(f'--size {shown}: one number, height and width, or "any"')
    return options


def check(options: argparse.Namespace, form: Format, file: Path) -> None:
    """Raise what would keep the file from being written, before any work is done."""
    missing = [package for package in form.needs if find_spec(package) is None]
    if missing:
        raise ImportError(f'--format {options.format} needs {", ".join(missing)}: pip install "debiformer[{form.extra}]"')
    if file.suffix != form.suffix:
        raise ValueError(f"--output {file}: a file of {options.format} ends with {form.suffix}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--output {file}: there is no folder {file.parent}")
    if options.precision not in form.precisions:
        raise ValueError(f"--precision {options.precision}: files of {options.format} are written in {' or '.join(form.precisions)}")
    if options.precision == "int8" and not options.calibration:
        raise ValueError("--precision int8 needs the ranges of activations: give --calibration IMAGE_OR_FOLDER, a few hundred images")
    if options.size == [None] and not form.any_size:
        raise ValueError(f"--size any: a file of {options.format} has one size: give --size HEIGHT WIDTH")


def read(source: str, form: Format, options: argparse.Namespace) -> tuple[nn.Module, Description]:
    """The model of a checkpoint, and what its file is to say of itself.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is of a task that is not exported so, or the size must be given.
    """
    kind = kind_at(source)
    if options.features and kind != "classification":
        raise ValueError(f"--features is for classification: checkpoint {source} is of {kind}")
    if kind == "detection" and options.precision != "float32":
        raise ValueError(f"--precision {options.precision}: checkpoint {source} is of detection, whose boxes need float32")
    if kind == "detection" and not form.runs_here:
        raise ValueError(f"--format {options.format}: checkpoint {source} is of detection, whose operations it does not have")
    task = load_classifier(source) if kind == "classification" else load_task(DENSE[kind], Path(source))
    limits = {"short_side": None, "long_side": None}
    if kind == "classification":
        usual: tuple[int, int] | None = tuple(task.hparams["input_size"])[-2:]
        crop_pct, interpolation = task.hparams["crop_pct"], task.hparams["interpolation"]
    else:
        window = task.hparams.get("window")
        usual = None if window is None else (window, window)
        crop_pct, interpolation = None, "bilinear"
        limits = {name: task.hparams[name] for name in limits}
    any_size = options.size == [None] or (options.size is None and usual is None and form.any_size)
    size = usual if options.size in (None, [None]) else (options.size[0], options.size[-1])
    if size is None and not any_size:
        raise ValueError(f"checkpoint {source} takes images of any size, a file of {options.format} those of one: give --size HEIGHT WIDTH")
    if any_size and kind != "classification":
        size = None
    return task.model, Description(
        task="features" if options.features else kind,
        outputs=outputs_of(kind, options.features, getattr(task.model, "detector", "")),
        size=size,
        any_size=any_size,
        one_image=kind == "detection" or not form.runs_here,
        **limits,
        mean=tuple(task.hparams["mean"]),
        std=tuple(task.hparams["std"]),
        crop_pct=crop_pct,
        interpolation=interpolation,
        precision=options.precision,
        class_names=() if options.features else tuple(task.hparams["class_names"]),
        version=__version__,
    )


def outputs_of(kind: str, features: bool, detector: str) -> tuple[str, ...]:
    """Names of what a file gives."""
    if kind == "detection":
        return ("boxes", "labels", "scores", *(["masks"] if detector == "mask_rcnn" else []))
    return tuple(f"stride_{stride}" for stride in STRIDES) if features else ("logits",)
