"""What the attention of a model looks at, as arrays: routes, points, and the weight of every pixel for a query."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import DeformableBiLevelRoutingAttention
from ..layers.region_routing import RegionRouting
from ..ops import deformable_attention, merge, reference_points, routed_attention
from ..ops.observation import watch
from ..ops.regions import padded_size, region_size


@dataclass
class Trace:
    """One routing layer in one forward pass: the arguments of its attention operations, and what they say.

    Queries are pixels (row, column) of the layer's map, which is `size`; regions are numbered row by row over the padded map.
    """

    name: str
    layer: RegionRouting
    size: tuple[int, int]
    region_grid: tuple[int, int]
    routed: dict[str, Any] = field(default_factory=dict)
    deformable: dict[str, Any] | None = None

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the map after padding to the region grid."""
        return padded_size(self.region_grid, self.size)

    @property
    def region_size(self) -> tuple[int, int]:
        """Height and width of a region in pixels of the map."""
        return region_size(self.region_grid, self.padded)

    def region(self, row: int, column: int) -> int:
        """The region that a pixel of the map lies in.

        Raises:
            ValueError: If the map has no such pixel.
        """
        if not (0 <= row < self.size[0] and 0 <= column < self.size[1]):
            raise ValueError(f"query ({row}, {column}) is not on the {self.size[0]}x{self.size[1]} map of {self.name}")
        return row // self.region_size[0] * self.region_grid[1] + column // self.region_size[1]

    def routes(self, row: int, column: int, image: int = 0) -> list[int]:
        """Regions that the region of a pixel is routed to, best first. In a deformable layer: that its agents are routed to."""
        self._check(image)
        return self.routed["routes"][image, self.region(row, column)].tolist()

    def points(self, image: int = 0) -> tuple[Tensor, Tensor]:
        """Deformed points and the reference points that they started from, both (G, h, w, 2), as (x, y) in [-1, 1] over the padded map.

        Raises:
            ValueError: If the layer is not deformable.
        """
        call = self._deformable()
        self._check(image)
        height, width = self.agents
        points = call["points"][image].unflatten(1, self._padded_agents)[:, :height, :width]
        start = reference_points(height, width, dtype=points.dtype, device=points.device)
        return points, start.expand_as(points)

    def importance(self, image: int = 0) -> Tensor:
        """Attention that each point (h, w) receives, the mean over all pixels and heads; it sums to 1 with the agents of the padding.

        Raises:
            ValueError: If the layer is not deformable, or there is no such image.
        """
        height, width = self.agents
        return self._weights_on_points(image).mean(0).unflatten(0, self._padded_agents)[:height, :width]

    def attention(self, row: int, column: int, image: int = 0) -> Tensor:
        """Attention (H, W) of one pixel to all pixels of the map, averaged over heads; hard routing makes it sum to 1 over the padded map.

        In a deformable layer both levels are composed: the pixel's weights on the agents, times the agents' weights on pixels.

        Raises:
            ValueError: If there is no such pixel or image.
        """
        region, (rows, cols) = self.region(row, column), self.region_grid
        if self.deformable is None:
            within = row % self.region_size[0] * self.region_size[1] + column % self.region_size[1]
            weights = self._weights_on_regions(image, region, slice(within, within + 1))[0]
        else:
            agents = torch.stack([self._weights_on_regions(image, r) for r in range(rows * cols)])  # (R, T, R', T')
            agents = merge(agents.flatten(2)[None], self.region_grid, self._padded_agents)[0].flatten(0, 1)
            listened = self._weights_on_points(image)[row * self.padded[1] + column]
            weights = (listened @ agents).unflatten(0, (rows * cols, -1))
        return merge(weights[None, :, :, None], self.region_grid, self.padded)[0, : self.size[0], : self.size[1], 0]

    def _weights_on_regions(self, image: int, region: int, tokens: slice = slice(None)) -> Tensor:
        """Weights (T, R', T') of the query tokens of one region on all key tokens, averaged over heads."""
        self._check(image)
        call = self.routed
        routes = call["routes"][image, region]
        k = call["k"][image : image + 1, :, routes]  # the routed regions alone: the weights on all others are 0
        q = call["q"][image : image + 1, :, region : region + 1, tokens]
        soft = None if call["route_weights"] is None else call["route_weights"][image : image + 1, region : region + 1]
        everything = torch.arange(len(routes), device=routes.device)[None, None]
        values = _identity(k.flatten(2, 3)).unflatten(2, k.shape[2:4])
        weights = routed_attention(q, k, values, everything, scale=call["scale"], route_weights=soft, backend="eager").mean(1)[0, 0]
        out = weights.new_zeros(weights.shape[0], call["k"].shape[2], k.shape[3])
        return out.index_copy(1, routes, weights.unflatten(1, k.shape[2:4]))

    def _weights_on_points(self, image: int) -> Tensor:
        """Attention (N, M) of every pixel of the padded map to every agent, padding included, averaged over heads."""
        self._check(image)
        call = self._deformable()
        one = {name: call[name][image : image + 1] for name in ("q", "k", "points")}
        return deformable_attention(**call | one | {"v": _identity(one["k"])}, backend="eager").mean(1)[0]

    def _check(self, image: int) -> None:
        images = len(self.routed["routes"])
        if not 0 <= image < images:
            raise ValueError(f"image {image} is not one of the {images} traced in {self.name}, from 0 on")

    def _deformable(self) -> dict[str, Any]:
        if self.deformable is None:
            raise ValueError(f"{self.name} has no points: it is a {type(self.layer).__name__}")
        return self.deformable

    @property
    def agents(self) -> tuple[int, int]:
        """Rows and columns of agents, without those that only fill up the region grid."""
        if not isinstance(self.layer, DeformableBiLevelRoutingAttention):
            raise ValueError(f"{self.name} has no agents: it is a {type(self.layer).__name__}")
        stride = self.layer.offset_network.stride
        return -(-self.padded[0] // stride), -(-self.padded[1] // stride)

    @property
    def _padded_agents(self) -> tuple[int, int]:
        return padded_size(self.region_grid, self.agents)


def _identity(k: Tensor) -> Tensor:
    """Values (B, H, M, M) that make an attention operation with keys (B, H, M, D) return its own weights."""
    return torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)


@contextmanager
def tracing(model: nn.Module) -> Iterator[dict[str, Trace]]:
    """Trace every routing layer of a model during the forward passes inside the block; of a layer, the last stays. Results do not change.

    Yields:
        Traces by module name, in order of execution.
    """
    traces: dict[str, Trace] = {}
    current: list[Trace] = []
    names: dict[nn.Module, str] = {layer: name for name, layer in model.named_modules() if isinstance(layer, RegionRouting)}

    def enter(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, RegionRouting)
        x = args[0]
        height, width = x.shape[1:3] if layer.layout == "NHWC" else x.shape[2:]
        traces[names[layer]] = Trace(names[layer], layer, (height, width), layer.region_grid)
        current[:] = [traces[names[layer]]]

    def seen(name: str, **arguments: Any) -> None:
        if current:
            kept = {key: value.detach() if isinstance(value, Tensor) else value for key, value in arguments.items()}
            setattr(current[0], "routed" if name == "routed_attention" else "deformable", kept)

    handles = [layer.register_forward_pre_hook(enter) for layer in names]
    handles += [layer.register_forward_hook(lambda *_: current.clear()) for layer in names]
    try:
        with watch(seen):
            yield traces
    finally:
        for handle in handles:
            handle.remove()
