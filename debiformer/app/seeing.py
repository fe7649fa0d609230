"""Trained models of every task, one way to see an image through them, and what they found in it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from ..data.images import eval_transform
from ..data.masks import default_palette, overlay
from ..explain.boxes import draw
from ..explain.views import View, classified, detected, segmented
from ..tasks.classification import ClassificationTask
from ..tasks.detection import DetectionTask
from ..tasks.prediction import PREPROCESSING, kind_at, load_classifier, load_task
from ..tasks.segmentation import SegmentationTask

LIKELIEST = 3  # classes of an image that are named
SURE = 0.3  # score from which on a box is shown


@dataclass
class Findings:
    """What a model found in an image: names with shares from 0 to 1, the foremost first, and a picture for dense tasks."""

    shares: list[tuple[str, float]]
    sentence: str
    picture: Image.Image | None


@dataclass
class Model:
    """A model with what it takes to show it an image.

    Attributes:
        see: Runs it on an image, and keeps what its attention did.
        findings: What it found, from what `see` gave.
    """

    see: Callable[[Image.Image], View]
    findings: Callable[[View], Findings]


def load_model(source: str, device: str | torch.device = "cpu") -> Model:
    """A trained model of any task.

    Args:
        source: A checkpoint of a run, a folder that `debiformer share` wrote, or hf-hub:OWNER/NAME.
        device: Where it runs.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or no checkpoint of a known task.
        OSError: If the Hub does not give it.
    """
    kind = kind_at(source)
    if kind == "classification":
        return classifier(load_classifier(source, device))
    if kind == "segmentation":
        return segmenter(load_task(SegmentationTask, Path(source), device))
    return detector(load_task(DetectionTask, Path(source), device))


def untrained(mixer: str, size: int = 224) -> Model:
    """A Swin-layout model of a mechanism with random weights, the same ones each time: it shows what the mechanism lets through.

    Args:
        mixer: The mechanism, as `swin_layout` names it.
        size: Pixels of each side that it sees images at.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("swin_layout", mixer=mixer, num_classes=2).eval().requires_grad_(False)
    transform = eval_transform(size, crop_pct=1.0)

    def see(image: Image.Image) -> View:
        return classified(model, image, transform, ["one class", "another class"], torch.device("cpu"))

    return Model(
        see, lambda view: Findings([], "This model is untrained: it shows what its mechanism lets through, and finds nothing.", None)
    )


def classifier(task: ClassificationTask) -> Model:
    """The model of a classification task."""
    transform = eval_transform(**{name: task.hparams[name] for name in PREPROCESSING})

    def see(image: Image.Image) -> View:
        return classified(task.model, image, transform, task.hparams["class_names"], task.device)

    def findings(view: View) -> Findings:
        output: Any = view.look.output
        chances, classes = output[0].float().softmax(0).topk(min(LIKELIEST, len(view.labels)))
        shares = [(view.labels[label], chance) for label, chance in zip(classes.tolist(), chances.tolist(), strict=True)]
        return Findings(shares, "What the model takes the picture for, and how sure it is:", None)

    return Model(see, findings)


def segmenter(task: SegmentationTask) -> Model:
    """The model of a segmentation task."""

    def see(image: Image.Image) -> View:
        pixels = task.normalized(image)
        return segmented(task.model, image, pixels, task.inference.sizes(*pixels.shape[1:])[0], task.hparams["class_names"])

    def findings(view: View) -> Findings:
        output: Any = view.look.output
        classes = output[0].argmax(0).cpu().numpy().astype(np.uint8)
        counts = np.bincount(classes.flat, minlength=len(view.labels)) / classes.size
        shares = [(view.labels[label], float(counts[label])) for label in np.argsort(-counts, kind="stable") if counts[label]]
        picture = overlay(view.look.image, classes, task.hparams["palette"])
        return Findings(shares, "The class of every pixel, by colour, and the share of the picture that each takes:", picture)

    return Model(see, findings)


def detector(task: DetectionTask) -> Model:
    """The model of a detection task."""

    def see(image: Image.Image) -> View:
        return detected(task.model, image, task.normalized(image), task.hparams["class_names"])

    def findings(view: View) -> Findings:
        output: Any = view.look.output
        found = {name: value[output[0]["scores"] >= SURE].cpu() for name, value in output[0].items()}
        picture = draw(view.look.image, found, view.labels, default_palette(len(view.labels)))
        shares = [(view.labels[label], score) for label, score in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)]
        return Findings(shares, f"{len(shares)} boxes that the model is at least {SURE:.0%} sure of, and how sure it is:", picture)

    return Model(see, findings)
