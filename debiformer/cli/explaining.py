"""Command explain: where a checkpoint looks in an image, as figures and arrays."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..data.images import eval_transform, read_image
from ..explain import rollout
from ..explain.grad_cam import METHODS
from ..explain.path import heat, path_figure, show
from ..explain.views import View, classified, detected, segmented
from ..nearest import did_you_mean
from ..tasks.addresses import address_of
from ..tasks.checkpointing import kind_of, read_content
from ..tasks.detection import DetectionTask
from ..tasks.prediction import PREPROCESSING, load_classifier, load_task
from ..tasks.segmentation import SegmentationTask
from .labelling import device
from .pictures import normalized
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
    view = seen(options.checkpoint, image, options.device)
    stages = sorted({stage for stage, _ in view.look.traces})
    stage = stages[0] if options.stage is None else options.stage
    block = max((b for s, b in view.look.traces if s == stage), default=1) if options.block is None else options.block
    trace = view.look.trace(stage, block)
    given = options.query or (image.width // 2, image.height // 2)
    x, y = view.place(*given)
    label = None if options.label is None else index_of(options.label, view.labels)
    figure = path_figure(view.look, stage, block, x, y, options.head)
    name, target = view.target(x, y, label)
    cam_stage = stages[-1] if options.cam_stage is None else options.cam_stage
    cam = view.activation(target, options.method, cam_stage)
    name += f"; by the {'x'.join(map(str, view.look.trace(cam_stage, 1).size))} map of stage {cam_stage}"
    reached = view.look.on_image(rollout(view.look.traces))
    check_folder(options.output)
    pixel = view.look.pixel(trace, x, y)
    arrays = {"attention": trace.attention(*pixel, head=options.head), "rollout": reached, options.method: cam}
    if trace.has_points:
        points, start = trace.points()
        arrays |= {"points": points, "reference_points": start, "heard": trace.heard(*pixel, head=options.head)}
    figure.savefig(options.output / "attention.png", dpi=130)
    evidence(view, name, cam, reached, options.method).savefig(options.output / "evidence.png", dpi=130)
    np.savez(options.output / "arrays.npz", **{key: value.float().cpu().numpy() for key, value in arrays.items()})  # type: ignore[arg-type]
    print(f"{options.image}: {name}")
    size = "x".join(map(str, trace.size))
    print(f"query {given[0]:g},{given[1]:g} is in row {pixel[0]}, column {pixel[1]} of the {size} map of {trace.name}")
    for file, what in {
        "attention.png": f"the path of the query in stage {stage}, block {block}",
        "evidence.png": f"{options.method} of {name}, and what reaches the last map",
        "arrays.npz": ", ".join(arrays),
    }.items():
        print(f"written  {options.output / file}: {what}")
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
    parser.add_argument("--cam-stage", type=int, help="stage whose map is weighed for class activation (default: the last)")
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


def index_of(label: str, labels: list[str]) -> int:
    """The number of a class.

    Raises:
        ValueError: If there is no such class.
    """
    if label not in labels:
        raise ValueError(f"--label {label}: the model knows no such class; {did_you_mean(label, labels)}")
    return labels.index(label)


def seen(checkpoint: str, image: Any, where: torch.device) -> View:
    """The image through the model of a checkpoint of any task."""
    kind = "classification" if address_of(checkpoint) is not None else kind_of(read_content(Path(checkpoint)))
    if kind == "classification":
        task: Any = load_classifier(checkpoint, where)
        transform = eval_transform(**{name: task.hparams[name] for name in PREPROCESSING})
        return classified(task.model, image, transform, task.hparams["class_names"], where)
    if kind == "segmentation":
        task = load_task(SegmentationTask, Path(checkpoint), where)
        pixels = normalized(task, image)
        return segmented(task.model, image, pixels, task.inference.sizes(*pixels.shape[1:])[0], task.hparams["class_names"])
    task = load_task(DetectionTask, Path(checkpoint), where)
    return detected(task.model, image, normalized(task, image), task.hparams["class_names"])


def evidence(view: View, name: str, cam: torch.Tensor, reached: torch.Tensor, method: str) -> Figure:
    """The image, its class activation map, and what reaches the last map."""
    figure = Figure(figsize=(9.3, 3.7), layout="constrained")
    panels = figure.subplots(1, 3)
    show(panels[0], view.look.image)
    heat(panels[1], view.look, cam)
    heat(panels[2], view.look, reached)
    titles = (
        "the image as the model saw it",
        f"{method.replace('_', ' ')}: the evidence for\n{name}",
        "attention rollout: what reaches\nthe last map from where",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
    return figure
