"""One image through a model, with the attention of every layer: what figures and the explorer show."""

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL.Image import Image
from torch import Tensor, nn

from .attention import Trace, tracing
from .rollout import rollout

PLACE = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.mixer$")


@dataclass
class Look:
    """What a model did with an image.

    Attributes:
        image: The image as the model saw it, before normalisation.
        output: What the model gave for it.
        traces: Of its attention layers, by (stage, block), both counted from 1.
        covered: Height and width that the image has of the traced maps, from 0 to 1; less than 1 where the model has padded it.
    """

    image: Image
    output: object
    traces: dict[tuple[int, int], Trace]
    covered: tuple[float, float] = (1.0, 1.0)

    def trace(self, stage: int, block: int) -> Trace:
        """The attention layer of a block.

        Raises:
            ValueError: If there is no such stage or block; it says which there are.
        """
        stages = sorted({s for s, _ in self.traces})
        if stage not in stages:
            raise ValueError(f"stage {stage} is none of {', '.join(map(str, stages))}")
        blocks = sorted(b for s, b in self.traces if s == stage)
        if block not in blocks:
            raise ValueError(f"block {block} of stage {stage} is none of {', '.join(map(str, blocks))}")
        return self.traces[stage, block]

    def stage(self, stage: int) -> dict[tuple[int, int], Trace]:
        """The attention layers of a stage, in order, as `rollout` takes them.

        Raises:
            ValueError: If there is no such stage.
        """
        self.trace(stage, 1)
        return {place: trace for place, trace in self.traces.items() if place[0] == stage}

    @cached_property
    def reached(self) -> Tensor:
        """From where what reaches the last map comes, (h, w) of the first, by `rollout`; it does not depend on a query."""
        return self.on_image(rollout(self.traces))

    def pixel(self, trace: Trace, x: float, y: float) -> tuple[int, int]:
        """Row and column of the map's pixel that a place of the image falls on.

        Args:
            trace: The layer.
            x: Pixels from the left of the image.
            y: Pixels from its top.

        Raises:
            ValueError: If the place is not on the image.
        """
        if not (0 <= x < self.image.width and 0 <= y < self.image.height):
            raise ValueError(f"query {x:g},{y:g} is not on the image, which is {self.image.width} wide and {self.image.height} high")
        places = (y / self.image.height * self.covered[0], x / self.image.width * self.covered[1])
        row, column = (int(place * side) for place, side in zip(places, trace.size, strict=True))
        return row, column

    def on_image(self, weights: Tensor) -> Tensor:
        """The part of a layer's map (H, W) that the image covers."""
        height, width = (max(round(share * side), 1) for share, side in zip(self.covered, weights.shape, strict=True))
        return weights[:height, :width]


@torch.no_grad()
def look(model: nn.Module, image: Image, inputs: object, covered: tuple[float, float] = (1.0, 1.0)) -> Look:
    """Run a model on one image, and keep what its attention layers did.

    Args:
        model: A model of this library's, in evaluation mode, or one with such a backbone.
        image: The image as the model sees it.
        inputs: What the model takes: images (1, 3, H, W), or a list of one (3, H, W) for detectors.
        covered: As for `Look`.

    Raises:
        ValueError: If the model has no attention layers that can be traced.
    """
    with tracing(model) as traces:
        output = model(inputs)
    found = {(int(place[1]) + 1, int(place[2]) + 1): trace for name, trace in traces.items() if (place := PLACE.search(name))}
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention layers that can be traced: its backbone must be one of this library's")
    return Look(image, output, found, covered)
