"""Command explain: where a checkpoint looks in an image, as figures and arrays."""

import argparse
from pathlib import Path

import numpy as np

from ..app.seeing import load_model
from ..data.images import read_image
from ..explain.evidence import Evidence, arrays, evidence, evidence_figure
from ..explain.grad_cam import METHODS
from ..explain.path import path_figure
from ..explain.views import NothingFound
from .labelling import device
from .reporting import check_folder


def run(arguments: list[str]) -> int:
    """Explain one image; returns the exit code.

    Raises:
        FileNotFoundError: If the checkpoint or the image is missing.
        ValueError: If the checkpoint, a coordinate, a layer, a head or a class will not do; it says what would.
        PermissionError: If the output folder cannot be written.
    """
    options = parse(arguments)
    image = read_image(options.image)
    view = load_model(options.checkpoint, options.device).see(image)
    stage = min(view.look.traces)[0] if options.stage is None else options.stage
    block = max((b for s, b in view.look.traces if s == stage), default=1) if options.block is None else options.block
    given = options.query or (image.width // 2, image.height // 2)
    x, y = view.place(*given)
    path = path_figure(view.look, stage, block, x, y, options.head)
    found: Evidence | None = None
    try:
        found = evidence(view, x, y, options.label, options.method, options.cam_stage)
    except NothingFound as error:
        what = str(error)
    else:
        what = found.name
    values = arrays(view, stage, block, x, y, options.head, found)
    check_folder(options.output)
    path.savefig(options.output / "attention.png", dpi=130)
    written = {"attention.png": f"the path of the query in stage {stage}, block {block}"}
    if found is not None:
        evidence_figure(view, found).savefig(options.output / "evidence.png", dpi=130)
        written["evidence.png"] = f"{found.method} of {what}, and what reaches the last map"
    np.savez(options.output / "arrays.npz", **values)  # type: ignore[arg-type]
    written["arrays.npz"] = ", ".join(values)
    print(f"{options.image}: {what}")
    trace = view.look.trace(stage, block)
    row, column = view.look.pixel(trace, x, y)
    size = "x".join(map(str, trace.size))
    print(f"query {given[0]:g},{given[1]:g} is in row {row}, column {column} of the {size} map of {trace.name}")
    for file, content in written.items():
        print(f"written  {options.output / file}: {content}")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of explain."""
    parser = argparse.ArgumentParser(prog="debiformer explain", description="Show where a checkpoint of any task looks in an image.")
    parser.add_argument("image", type=Path)
    parser.add_argument("--checkpoint", required=True, help="best.ckpt or last.ckpt of a run, a shared folder, or hf-hub:OWNER/NAME")
    parser.add_argument("--stage", type=int, help="of the layer, from 1 (default 1)")
    parser.add_argument("--block", type=int, help="of the layer in its stage, from 1 (default: the last)")
    parser.add_argument("--head", type=head, help="an attention head, from 0, or all, averaged (default all)")
    parser.add_argument("--query", type=query, metavar="X,Y", help="pixels from the left and from the top (default: the centre)")
    parser.add_argument("--label", help="the class to explain (default: what the model finds, for dense tasks at the query)")
    parser.add_argument("--method", choices=METHODS, default="grad_cam", help="of class activation (default grad_cam)")
    parser.add_argument("--cam-stage", type=int, help="whose map class activation weighs (default: the last of 4x4 pixels or more)")
    parser.add_argument("--output", type=Path, default=Path("explained"), help="folder for figures and arrays (default explained)")
    parser.add_argument("--device", type=device, default="auto", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    return parser.parse_args(arguments)


def head(text: str) -> int | None:
    """A head, None for all."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'all' nor the number of a head, from 0")
    return int(text)


def query(text: str) -> tuple[float, float]:
    """X,Y in pixels."""
    parts = text.split(",")
    try:
        x, y = map(float, parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y: two numbers of pixels, such as 120,80") from None
    return x, y
