"""An image as the model of a task sees it, with what the task makes of it and what its attention did."""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .grad_cam import Target, boxes_of, class_activation, pixels_of
from .look import Look, look


class NothingFound(ValueError):
    """A detector has found no box to explain."""


@dataclass
class View:
    """One image, seen by a model of a task.

    Attributes:
        look: The image as the model saw it, and its attention.
        model: The model.
        inputs: What it was given, (1, 3, H, W).
        columns: Where the columns of the image as seen lie in the image as given, in pixels.
        rows: Likewise its rows.
        size: Width and height of the image as given.
        labels: Names of the classes.
        kind: "classification", "segmentation" or "detection".
    """

    look: Look
    model: nn.Module
    inputs: Tensor
    columns: np.ndarray
    rows: np.ndarray
    size: tuple[int, int]
    labels: list[str]
    kind: str

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the image as given lies in the image as seen.

        Raises:
            ValueError: If it is not in the image, or the model's crop leaves it out.
        """
        width, height = self.size
        if not (0 <= x < width and 0 <= y < height):
            ranges = f"x is from 0 to {width - 1}, y from 0 to {height - 1}"
            raise ValueError(f"query {x:g},{y:g} is not on the image, which is {width} wide and {height} high: {ranges}")
        at = []
        for value, places, axis in ((x, self.columns, "x"), (y, self.rows, "y")):
            nearest = int(np.abs(places - value).argmin())
            step = abs(places[-1] - places[0]) / max(len(places) - 1, 1)
            if abs(places[nearest] - value) > max(step, 1):
                low, high = np.ceil(places[0]), np.floor(places[-1])
                raise ValueError(f"query {x:g},{y:g} is outside of what the model sees of the image: {axis} from {low:g} to {high:g}")
            at.append(nearest + 0.5)  # its centre
        return at[0], at[1]

    def target(self, x: float, y: float, label: int | None = None) -> tuple[str, int | Target]:
        """What a class activation map is asked for at a place of the image as seen, in words and as `class_activation` takes it.

        A classifier's likeliest class; the pixels of the class that a segmenter gives to this one; the box of a detector here, or where
        there is none its surest. `label` asks for another class.

        Raises:
            NothingFound: If a detector has found nothing.
        """
        out: Any = self.look.output
        if self.kind == "classification":
            chances = out[0].float().softmax(0)
            chosen = int(chances.argmax()) if label is None else label
            return f"{self.labels[chosen]}, {chances[chosen]:.0%}", chosen
        if self.kind == "segmentation":
            classes = out[0].argmax(0)
            chosen = int(classes[int(y), int(x)]) if label is None else label
            mask = classes == chosen
            return f"{self.labels[chosen]}, {mask.float().mean():.0%} of the pixels", pixels_of(chosen, mask if mask.any() else ~mask)
        found = out[0]
        kept = torch.ones_like(found["scores"], dtype=torch.bool) if label is None else found["labels"] == label
        if not kept.any():
            raise NothingFound("nothing was found in the image" + ("" if label is None else f" of class {self.labels[label]}"))
        x0, y0, x1, y1 = found["boxes"].unbind(1)
        here = kept & (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)
        chosen_box = int((found["scores"] * (here if here.any() else kept)).argmax())
        chosen, score = int(found["labels"][chosen_box]), found["scores"][chosen_box]
        return f"{self.labels[chosen]}, {score:.0%}", boxes_of(chosen, found["boxes"][chosen_box])

    def activation(self, target: int | Target, method: str, stage: int) -> Tensor:
        """The class activation map (H, W) of a target, over the image as seen, by the map of a stage, from 1.

        Raises:
            ValueError: If there is no such stage or method.
        """
        of_stage = self.look.trace(stage, 1).name.rpartition(".blocks.")[0]
        return class_activation(self.model, self.inputs, [target], of_stage, method)[0]


def classified(model: nn.Module, image: Image.Image, transform: Any, labels: list[str], device: torch.device) -> View:
    """An image through a classifier.

    Args:
        model: The classifier.
        image: The image as given.
        transform: Timm's transform for evaluation: steps on images, then on tensors.
        labels: Names of the classes.
        device: Where the model is.
    """
    steps = list(takewhile(lambda step: "Tensor" not in type(step).__name__, transform.transforms))

    def seen(picture: Image.Image) -> Image.Image:
        for step in steps:
            picture = step(picture)
        return picture

    x, y = np.meshgrid(np.arange(image.width, dtype=np.float32), np.arange(image.height, dtype=np.float32))
    columns, rows = (np.asarray(seen(Image.fromarray(values))) for values in (x, y))
    inputs = transform(image)[None].to(device)
    found = look(model, seen(image), inputs)
    return View(found, model, inputs, columns[0], rows[:, 0], image.size, labels, "classification")


def segmented(model: nn.Module, image: Image.Image, normalized: Tensor, size: tuple[int, int], labels: list[str]) -> View:
    """An image through a segmenter, whole.

    Args:
        model: The segmenter.
        image: The image as given.
        normalized: The same, (3, H, W).
        size: Height and width at which the model sees it.
        labels: Names of the classes.
    """
    inputs = F.interpolate(normalized[None], size=size, mode="bilinear", antialias=True)
    found = look(model, image.resize((size[1], size[0])), inputs)
    return View(found, model, inputs, *_evenly(image, size), image.size, labels, "segmentation")


def detected(model: Any, image: Image.Image, normalized: Tensor, labels: list[str]) -> View:
    """An image through a detector, which resizes and pads it inside.

    Args:
        model: The detector.
        image: The image as given.
        normalized: The same, (3, H, W).
        labels: Names of the classes.
    """
    batch, _ = model.model.transform([normalized])
    covered = tuple(n / padded for n, padded in zip(batch.image_sizes[0], batch.tensors.shape[2:], strict=True))
    found = look(model, image, [normalized], covered)
    return View(found, model, normalized[None], *_evenly(image, (image.height, image.width)), image.size, labels, "detection")


def _evenly(image: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where the columns and rows of a resized image lie in the image."""
    columns, rows = ((np.arange(n) + 0.5) * given / n - 0.5 for n, given in ((size[1], image.width), (size[0], image.height)))
    return columns, rows
