"""A model as a graph for one size of images and any number of them, and what its outputs are."""

import json
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from ..ops.observation import watch

BATCH = Dim("batch", min=1, max=65536)
EXAMPLES = 2  # images that are traced: one alone would fix the batch


@dataclass(frozen=True)
class Description:
    """What a file says of itself, so that it can be run by whoever finds it.

    Attributes:
        task: "classification", "features" or "segmentation".
        outputs: A name for each.
        size: Height and width of its images.
        mean: Of the channels red, green and blue, for values from 0 to 1; inputs are (value - mean) / std.
        std: See there.
        crop_pct: Share of the resized image's shorter side that the crop keeps; None where the image is resized to `size` as it is.
        interpolation: How it is resized.
        class_names: Of the logits; none for features.
        version: Of this library.
    """

    task: str
    outputs: tuple[str, ...]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float | None
    interpolation: str
    class_names: tuple[str, ...]
    version: str

    def json(self) -> str:
        """As files keep it."""
        return json.dumps(asdict(self))


class Outputs(nn.Module):
    """A model whose outputs are a tuple; with `routes`, followed by what every layer that chooses among regions has chosen.

    Args:
        model: What to run.
        features: Give the maps of the stages rather than what the model gives.
        routes: Whether to add, for each layer, the routes (B, R, k), sorted, and the affinities that they were chosen for, sorted too.
    """

    def __init__(self, model: nn.Module, features: bool = False, routes: bool = False) -> None:
        super().__init__()
        self.model, self.features, self.routes = model, features, routes

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) to the outputs."""
        found: list[Tensor] = []

        def keep(name: str, **arguments: Any) -> None:
            if name == "routed_attention" and arguments["routes"] is not None and arguments["routes"].shape[2] < arguments["k"].shape[2]:
                queries, keys = (arguments[name].mean(3).transpose(1, 2).flatten(2) for name in ("q", "k"))
                chosen = (queries @ keys.transpose(1, 2)).gather(2, arguments["routes"])
                found.extend(values.sort(dim=-1).values for values in (arguments["routes"], chosen))

        with watch(keep if self.routes else None):
            maps: Any = self.model
            out = maps.forward_intermediates(images, intermediates_only=True) if self.features else self.model(images)
        return (*(out if isinstance(out, list | tuple) else (out,)), *found)


def folded(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose norms are folded into convolutions where they can be, exactly."""
    return reparameterize_model(deepcopy(model).cpu().float().eval().requires_grad_(False))


@torch.no_grad()
def graph(model: Outputs, size: tuple[int, int]) -> ExportedProgram:
    """The graph of a model for images (B, 3, *size), for any B."""
    return traced(model.eval(), torch.zeros(EXAMPLES, 3, *size))


@torch.no_grad()
def first_outputs(program: ExportedProgram, outputs: int) -> ExportedProgram:
    """A graph of the first outputs of a graph."""
    if len(program.graph_signature.user_outputs) == outputs:
        return program
    (example,), _ = program.example_inputs
    return traced(_First(program.module(), outputs), example)


def traced(module: nn.Module, example: Tensor) -> ExportedProgram:
    """The graph of a module for any number of images, without the lines of code, and their places on this disk, that it came from."""
    program = torch.export.export(module, (example,), dynamic_shapes=({0: BATCH},), strict=False)
    for part in program.graph_module.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


class _First(nn.Module):
    def __init__(self, module: nn.Module, outputs: int) -> None:
        super().__init__()
        self.module, self.outputs = module, outputs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.module(images)[: self.outputs]
