"""Command export: a checkpoint as a file that runs without this library, compared with it on the spot."""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from .. import __version__
from ..data.images import find_images
from ..deploy import example
from ..deploy.formats import FORMATS, Format, coreml_interface
from ..deploy.graphs import Description, Outputs, folded, graph, reference
from ..deploy.quantization import quantize
from ..models.backbone import STRIDES
from ..models.segmentation_inference import usual_stride
from ..tasks.prediction import kind_at, load_classifier, load_task
from .arguments import at_least_one
from .comparing import checks_of, compare_decisions, compare_outputs, compare_routes, readable
from .kinds import KINDS

CALIBRATION = 300  # images at most: plenty for the ranges of activations


def run(arguments: list[str]) -> int:
    """Export and compare; 1 if the file does not agree with eager mode, else 0.

    Raises:
        FileNotFoundError: If the checkpoint, the output's folder, an image or a compiler is missing.
        ValueError: If the checkpoint, the size, the precision or the file's ending will not do.
        ImportError: If the format needs what is not installed.
        RuntimeError: If the model cannot be converted.
    """
    options = parse(arguments)
    form = FORMATS[options.format]
    file = options.output or Path(f"{Path(options.checkpoint).stem}{form.suffix}")
    check(options, form, file)
    paths = find_images(options.calibration) if options.calibration else []
    paths = paths[:: -(-len(paths) // CALIBRATION) or 1]  # of all folders alike
    model, description = read(options.checkpoint, form, options)
    if paths and next(readable(paths, description), None) is None:
        raise ValueError(f"--calibration: none of {len(paths)} images can be read")
    begin = time.perf_counter()
    size = "x".join(map(str, description.size)) if description.size else "any size"
    more = ", or any other" if description.any_size and description.size else ""
    count = "one" if description.one_image else "any number"
    print(f"{file.name}: {description.task} of images of {size}{more}, {count} at once", flush=True)
    routes = form.routes and description.precision != "int8"  # which is made of a file of its own
    outputs = Outputs(folded(model), options.features, routes)
    if description.precision == "bfloat16" and form.suffix == ".pt2":
        outputs = outputs.bfloat16()
    failed = f"checkpoint {options.checkpoint} cannot be exported as {options.format} in {options.precision}, for {size}"
    with converting(failed):
        converted = form.convert(graph(outputs, description), description)
    eager = Outputs(reference(model), options.features, routes)
    checks = checks_of(eager, description) if form.runs_here else []
    holds = compare_routes(form, converted, description, checks) if routes else True
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as folder:  # what is half done is not left behind
        made = Path(folder, file.name)
        with converting(failed):
            form.save(converted, made, description, len(description.outputs))
            if description.precision == "int8":
                quantize(made, readable(paths, description))
        for part in Path(folder).iterdir():
            place = file.parent / part.name
            if part.is_dir() and place.is_dir():  # as Core ML has it
                shutil.rmtree(place)
            part.replace(place)
    runner = Path(file.parent, f"run_{file.stem}.py")
    shutil.copyfile(example.__file__, runner)
    if form.runs_here:
        holds = compare_outputs(file, description, checks) and holds
        if paths and description.task != "features":
            compare_decisions(file, description, eager, paths)
    else:
        print(f"not compared  {options.format} runs on Macs only; the file maps {coreml_interface(file)}")
    print(f"written  {file} in {time.perf_counter() - begin:.0f} s; run it without this library: python {runner} {file} IMAGE")
    if not holds:
        print("The file does NOT agree with the model that it was made from: do not deploy it before you know why.")
    return 0 if holds else 1


@contextmanager
def converting(failed: str) -> Iterator[None]:
    """What converters raise becomes a RuntimeError that says what failed; a full disk stays one."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # each converter has errors of its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RuntimeError(f"{failed}: {reason}") from error


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
        meant = [name for name, other in FORMATS.items() if other.suffix == file.suffix]
        remedy = f", one of --format {' or '.join(meant)} with {file.suffix}" if meant else ""
        raise ValueError(f"--output {file}: a file of {options.format} ends with {form.suffix}{remedy}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--output {file}: there is no folder {file.parent}")
    if file.is_dir() and not Path(file, "Manifest.json").is_file():  # which is an earlier one of Core ML
        raise ValueError(f"--output {file} is a folder: name a file that may be written")
    if options.precision not in form.precisions:
        raise ValueError(f"--precision {options.precision}: files of {options.format} are written in {' or '.join(form.precisions)}")
    if options.calibration and (options.features or not form.runs_here) and options.precision != "int8":
        judged = "--features gives none" if options.features else f"files of {options.format} run on Macs only"
        raise ValueError(f"--calibration judges decisions: {judged}")
    if options.precision == "int8" and not options.calibration:
        raise ValueError("--precision int8 needs the ranges of activations: give --calibration IMAGE_OR_FOLDER, a few hundred images")
    if options.format == "aoti" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise FileNotFoundError("--format aoti compiles C++, and there is no compiler: install g++ or clang++, or set CXX")
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
    if kind == "detection" and form.no_detectors:
        raise ValueError(f"--format {options.format}: checkpoint {source} is of detection: {form.no_detectors}")
    if kind == "detection" and options.calibration:
        raise ValueError(f"--calibration judges decisions, one for each image or pixel: checkpoint {source} is of detection")
    task: Any = load_classifier(source) if kind == "classification" else load_task(KINDS[kind].task, Path(source))
    if options.features and [map_info["reduction"] for map_info in task.model.feature_info] != STRIDES:
        raise ValueError(f"--features gives maps at strides 4 to 32: checkpoint {source} is of a model that has others")
    limits: dict[str, Any] = {"short_side": None, "long_side": None}
    stride = None
    if kind == "classification":
        usual: tuple[int, int] | None = tuple(task.hparams["input_size"])[-2:]
        crop_pct, interpolation = task.hparams["crop_pct"], task.hparams["interpolation"]
    else:
        window = task.hparams.get("window")
        usual = None if window is None else (window, window)
        crop_pct, interpolation = None, "bilinear"
        limits = {name: task.hparams[name] for name in limits}
        stride = task.hparams.get("stride") if options.size is None else None  # of the window that it has
    any_size = options.size == [None] or (options.size is None and usual is None and form.any_size)
    size = usual if options.size in (None, [None]) else (options.size[0], options.size[-1])
    if size is None and not any_size:
        raise ValueError(f"checkpoint {source} takes images of any size, a file of {options.format} those of one: give --size HEIGHT WIDTH")
    if any_size and kind != "classification":
        size = None
    if kind == "segmentation" and size is not None and stride is None:
        stride = usual_stride(min(size))
    return task.model, Description(
        task="features" if options.features else kind,
        outputs=outputs_of(kind, options.features, getattr(task.model, "detector", "")),
        size=size,
        any_size=any_size,
        one_image=kind == "detection" or not form.runs_here,
        stride=None if size is None else stride,
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
