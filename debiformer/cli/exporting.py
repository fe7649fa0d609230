"""Command export: a checkpoint as a file that runs without this library, compared with it on the spot."""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import __version__
from ..data.blood_cells import whole_images
from ..data.images import eval_transform, read_image
from ..deploy import example
from ..deploy.agreement import TOLERANCE, agreement
from ..deploy.formats import FORMATS, Format
from ..deploy.graphs import Description, Outputs, folded, graph
from ..tasks.prediction import PREPROCESSING, kind_at, load_classifier, load_task
from ..tasks.segmentation import SegmentationTask
from .arguments import at_least_one

STRIDES = (4, 8, 16, 32)


def run(arguments: list[str]) -> int:
    """Export and compare; 1 if the file does not agree with eager mode, else 0.

    Raises:
        FileNotFoundError: If the checkpoint or the output's folder is missing.
        ValueError: If the checkpoint, the size or the file's ending will not do.
        ImportError: If the format needs what is not installed.
    """
    options = parse(arguments)
    form = FORMATS[options.format]
    file = options.output or Path(f"{Path(options.checkpoint).stem}{form.suffix}")
    check(options.format, form, file)
    model, description = read(options.checkpoint, options.size, options.features)
    begin = time.perf_counter()
    outputs = Outputs(folded(model), options.features, routes=form.routes)
    converted = form.convert(graph(outputs, description.size), description)
    count = len(description.outputs)
    images = pictures(description)
    expected = [out.numpy() for out in outputs(torch.from_numpy(images))]
    print(f"{file.name}: {description.task} of images at {'x'.join(map(str, description.size))}, any number at once", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        routed = Path(folder, f"routed{form.suffix}")
        found = None
        if form.routes:
            form.save(converted, routed, description, len(expected))
            found = agreement(run_of(routed)(images), expected, count)
    form.save(converted, file, description, count)
    runner = Path(file.parent, f"run_{file.stem}.py")
    shutil.copyfile(example.__file__, runner)
    runs = run_of(file)
    holds = True if found is None else found.holds
    for batch in (1, len(images)):
        values = agreement(runs(images[:batch]), [out[:batch] for out in expected], count)
        holds = holds and values.holds
        for name, error in zip(description.outputs, values.errors, strict=True):
            print(f"batch {batch}  {name}: differs from eager mode by {error:.1e} of its norm (float32: at most {TOLERANCE:g})")
    if found is not None:
        equal = found.routes - found.tied - found.other
        ties = f", and {found.tied} between regions that answer alike, as those of padding do" if found.tied else ""
        print(f"routes  {equal} of {found.routes} equal{ties}")
    print(f"written  {file} in {time.perf_counter() - begin:.0f} s; run it without this library: python {runner} {file} IMAGE")
    if not holds:
        print("The file does NOT agree with the model that it was made from: do not deploy it before you know why.")
    return 0 if holds else 1


def run_of(file: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """What runs a file: the program that lies beside it."""
    return example.load(file)[1]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of export."""
    parser = argparse.ArgumentParser(prog="debiformer export", description="Write a checkpoint as a file that runs without this library.")
    parser.add_argument("checkpoint", help="best.ckpt or last.ckpt of a run, a shared folder, or hf-hub:OWNER/NAME")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="of the file (default onnx)")
    parser.add_argument("--output", type=Path, help="the file (default: the checkpoint's name, in this folder)")
    parser.add_argument("--size", type=at_least_one, nargs="+", help="pixels of a square, or height and width (default: as in evaluation)")
    parser.add_argument("--features", action="store_true", help="of a classifier: the maps at strides 4 to 32 instead of the logits")
    options = parser.parse_args(arguments)
    if options.size is not None and len(options.size) > 2:
        parser.error(f"--size {' '.join(map(str, options.size))}: one number, or height and width")
    return options


def check(name: str, form: Format, file: Path) -> None:
    """Raise what would keep the file from being written, before any work is done."""
    missing = [package for package in form.needs if find_spec(package) is None]
    if missing:
        raise ImportError(f'--format {name} needs {", ".join(missing)}: pip install "debiformer[export]"')
    if file.suffix != form.suffix:
        raise ValueError(f"--output {file}: a file of {name} ends with {form.suffix}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--output {file}: there is no folder {file.parent}")


def read(source: str, size: list[int] | None, features: bool) -> tuple[nn.Module, Description]:
    """The model of a checkpoint, and what its file is to say of itself.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is of a task that is not exported, or the size must be given.
    """
    kind = kind_at(source)
    if kind == "classification":
        task: Any = load_classifier(source)
        preprocessing = {name: task.hparams[name] for name in PREPROCESSING}
        shape = tuple(task.hparams["input_size"])[-2:] if size is None else (size[0], size[-1])
        crop_pct, interpolation, maps = preprocessing["crop_pct"], preprocessing["interpolation"], ("logits",)
    elif kind == "segmentation" and not features:
        task = load_task(SegmentationTask, Path(source))
        window = task.inference.window
        if size is None and window is None:
            raise ValueError(f"checkpoint {source} takes images of any size, a file those of one: give --size HEIGHT WIDTH")
        shape = (window, window) if size is None else (size[0], size[-1])
        crop_pct, interpolation, maps = None, "bilinear", ("logits",)
    else:
        raise ValueError(f"checkpoint {source} is of {kind}: only classification, its features and segmentation are exported so far")
    return task.model, Description(
        task="features" if features else kind,
        outputs=tuple(f"stride_{stride}" for stride in STRIDES) if features else maps,
        size=shape,
        mean=tuple(task.hparams["mean"]),
        std=tuple(task.hparams["std"]),
        crop_pct=crop_pct,
        interpolation=interpolation,
        class_names=() if features else tuple(task.hparams["class_names"]),
        version=__version__,
    )


def pictures(description: Description) -> np.ndarray:
    """Bundled images as the model takes them, (B, 3, H, W)."""
    transform = eval_transform(description.size, description.mean, description.std, crop_pct=description.crop_pct or 1.0)
    return torch.stack([transform(read_image(path)) for path, _ in whole_images()]).numpy()
