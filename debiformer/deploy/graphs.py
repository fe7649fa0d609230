"""A model as a graph, for one size of images or any, and what its file is to say of itself."""

import json
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental import _config as config
from torch.utils._sympy.value_ranges import ValueRanges

from ..models.detector import Detector
from ..models.segmenter import Segmenter
from ..ops.observation import watch
from .detections import Detections, Undivided

BATCH = Dim("batch", min=1, max=65536)
SIDE = Dim.DYNAMIC(min=64, max=16384)  # pixels of a side, where any will do
EXAMPLES = 2  # images that are traced: one alone would fix the batch
EXAMPLE_SIZE = (224, 288)  # of graphs for any size: sides that are not alike


@dataclass(frozen=True)
class Description:
    """What a file says of itself, so that it can be run by whoever finds it.

    Attributes:
        task: "classification", "features", "segmentation" or "detection".
        outputs: A name for each.
        size: Height and width that images are brought to; None where they keep theirs, within the limits of `short_side` and `long_side`.
        any_size: Whether other sizes, of at least 64 pixels a side, are taken too.
        one_image: Whether images are taken one at a time only, as by detectors.
        stride: Pixels from one window to the next, where larger images are seen in windows of `size`, as by segmenters.
        short_side: Pixels that the shorter side gets, unless the longer would have more than `long_side`; None for no limit.
        long_side: See there.
        mean: Of the channels red, green and blue, for values in `input_range`; inputs are (value - mean) / std.
        std: See there.
        crop_pct: Share of the resized image's shorter side that the crop keeps; None where nothing is cropped.
        interpolation: How images are resized.
        precision: Of the weights, and where the format has it of the arithmetic.
        class_names: Of the logits or labels; none for features.
        version: Of this library.
        channels: Their order in the input.
        input_range: Of the values before mean and standard deviation are applied.
    """

    task: str
    outputs: tuple[str, ...]
    size: tuple[int, int] | None
    any_size: bool
    one_image: bool
    stride: int | None
    short_side: int | None
    long_side: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float | None
    interpolation: str
    precision: str
    class_names: tuple[str, ...]
    version: str
    channels: str = "RGB"
    input_range: tuple[float, float] = (0.0, 1.0)

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

        images = images.to(next(self.model.parameters()).dtype)
        with watch(keep if self.routes else None):
            maps: Any = self.model
            out = maps.forward_intermediates(images, intermediates_only=True) if self.features else self.model(images)
        given = (*(out if isinstance(out, list | tuple) else (out,)), *found)
        return tuple(value.float() if value.is_floating_point() else value for value in given)


def copied(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32 and evaluation mode."""
    return deepcopy(model).cpu().float().eval().requires_grad_(False)


def reference(model: nn.Module) -> nn.Module:
    """What a file of a model must agree with: the model, or the detector as it is, in eager mode."""
    model = copied(model)
    return Undivided(model).eval() if isinstance(model, Detector) else model


def folded(model: nn.Module) -> nn.Module:
    """A copy whose norms are folded into convolutions where they can be, exactly; of a detector, as `Detections`."""
    model = copied(model)
    network: Any = model.backbone.maps.model if isinstance(model, Segmenter | Detector) else model
    reparameterize_model(network, inplace=True)  # not of a head, whose part that fuses maps timm would call
    return Detections(model).eval() if isinstance(model, Detector) else model


@torch.no_grad()
def graph(model: Outputs, description: Description) -> ExportedProgram:
    """The graph of a model for images of the described size, or of any."""
    height, width = EXAMPLE_SIZE if description.any_size or description.size is None else description.size
    return traced(model.eval(), torch.zeros(1 if description.one_image else EXAMPLES, 3, height, width), description)


@torch.no_grad()
def first_outputs(program: ExportedProgram, description: Description, outputs: int) -> ExportedProgram:
    """A graph of the first outputs of a graph."""
    if len(program.graph_signature.user_outputs) == outputs:
        return program
    (example,), _ = program.example_inputs
    return traced(_First(program.module(check_guards=False), outputs), example, description)


def traced(module: nn.Module, example: Tensor, description: Description) -> ExportedProgram:
    """The graph of a module, without the lines of code, and their places on this disk, that it came from."""
    free: dict[int, Any] = {} if description.one_image else {0: BATCH}
    free |= {2: SIDE, 3: SIDE} if description.any_size else {}
    # What is said of sizes that are traced must hold for those that are not, such as maps of a single row.
    with config.patch(backed_size_oblivious=description.any_size):  # type: ignore[attr-defined]  # added when it is imported
        program = torch.export.export(module, (example,), dynamic_shapes=(free,), strict=False)
    if description.any_size:
        # Both tell layouts of the example in memory, on which no value depends: guards, and sides below which a map becomes a single point.
        program._guards_code.clear()
        (images,) = (node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
        for side in images.meta["val"].shape[2:]:
            program.range_constraints[side.node.expr] = ValueRanges(SIDE.min, SIDE.max)
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
