"""Exported files beside the models that they were made from, in eager mode."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from ..data.blood_cells import whole_images
from ..data.images import UnreadableImage, read_image
from ..deploy import example
from ..deploy.agreement import TOLERANCE, Agreement, agreement
from ..deploy.formats import Format
from ..deploy.graphs import Description, Outputs

OTHER_SIZES = ((64, 96), (160, 224))  # at which files for any size are compared too


Checks = Sequence[tuple[np.ndarray, list[np.ndarray]]]  # images, and what eager mode finds in them


def compare_routes(form: Format, converted: Any, description: Description, checks: Checks) -> bool:
    """Print how many regions are routed as in eager mode, by a file of the same graph that tells; False if others are wrong in float32."""
    count = len(description.outputs)
    total = Agreement([])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"routed{form.suffix}")
        form.save(converted, file, description, len(checks[0][1]))
        run = runner_of(file)
        for images, expected in checks:
            found = agreement(run(images), expected, count, rows=description.task == "detection")
            total.routes, total.tied, total.other = total.routes + found.routes, total.tied + found.tied, total.other + found.other
    if not total.routes:  # nothing chooses among regions
        return True
    equal = total.routes - total.tied - total.other
    ties = f", and {total.tied} between regions that answer alike, as those of padding do" if total.tied else ""
    print(f"routes  {equal} of {total.routes} equal{ties}")
    return not total.other or description.precision != "float32"


def compare_outputs(file: Path, description: Description, checks: Checks) -> bool:
    """Print how far the outputs of a file are from eager mode's; False if that is too far for float32, or no number at all."""
    run = runner_of(file)
    exact = description.precision == "float32"
    bound = f"float32: at most {TOLERANCE:g}" if exact else f"{description.precision}: no bound"
    holds = True
    for images, expected in checks:
        found = agreement(run(images), expected, len(description.outputs), rows=description.task == "detection")
        holds = holds and (found.holds if exact else found.finite)
        shape = f"{len(images)}x{images.shape[2]}x{images.shape[3]}"
        for name, error in zip(description.outputs, found.errors, strict=True):
            print(f"batch {shape}  {name}: differs from eager mode by {error:.1e} of its norm ({bound})")
        if description.task == "detection" and not (expected[2] > 0).any():
            print(f"batch {shape}  nothing was found in the photograph: this says little of the boxes")
    return holds


def compare_decisions(file: Path, description: Description, eager: Outputs, paths: list[Path]) -> None:
    """Print for how many images, or pixels of masks, a file decides as eager mode does."""
    run = runner_of(file)
    same = total = 0
    for images in readable(paths, description):
        found, expected = run(images)[0].argmax(1), run_eager(eager, images)[0].argmax(1)
        same += int((found == expected).sum())
        total += expected.size
    what = "images" if description.task == "classification" else "pixels"
    print(f"decided alike  {same} of {total} {what} of --calibration" + (f" ({same / total:.2%})" if total else ""))


def checks_of(eager: Outputs, description: Description) -> Checks:
    """What files are compared on."""
    return [(images, run_eager(eager, images)) for images in batches(description)]


def batches(description: Description) -> Iterator[np.ndarray]:
    """Bundled photographs as the model takes them, (B, 3, H, W): one and all, and where any size will do, of others too."""
    photos = [read_image(path) for path, _ in whole_images()]
    for size in (description.size, *(OTHER_SIZES if description.any_size else ())):
        stride = min(size) if size is not None and description.task == "segmentation" else description.stride  # a window of this size
        shape = replace(description, size=size, stride=stride)
        yield prepared(photos[0], shape)
        if size is not None and not description.one_image:
            yield np.concatenate([prepared(photo, shape) for photo in photos])


def readable(paths: list[Path], description: Description) -> Iterator[np.ndarray]:
    """Images as the model takes them, (1, 3, H, W); those that cannot be read are told and passed over."""
    for path in paths:
        try:
            yield prepared(read_image(path), description)
        except UnreadableImage as error:
            print(f"passed over  {error}", file=sys.stderr)


def prepared(image: Image, description: Description) -> np.ndarray:
    """An image as the program beside the file brings it to the model; of windows, the first."""
    told = asdict(description)
    values = example.prepare(image, told)
    return values if description.stride is None else next(example.windows(values, told))[2]


def runner_of(file: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """What runs a file: the program that lies beside it."""
    return example.load(file)[1]


@torch.no_grad()
def run_eager(eager: Outputs, images: np.ndarray) -> list[np.ndarray]:
    """What eager mode finds."""
    return [out.numpy() for out in eager(torch.from_numpy(images))]
