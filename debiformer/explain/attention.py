"""What the attention of a model looks at, as arrays: routes, points, and the weight of every pixel for a query."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import DeformableBiLevelRoutingAttention, FullAttention
from ..layers.region_routing import RegionRouting
from ..layers.sparse import DeformableAttention, SubsampledAttention
from ..layers.sparse.heads import HeadedAttention
from ..ops import deformable_attention, merge, partition, reference_points, route, routed_attention, sample_points
from ..ops.criss_cross import criss_cross_attention
from ..ops.dense_attention import dense_attention
from ..ops.observation import watch
from ..ops.regions import padded_size, region_size
from ..ops.windows import grid_attention, window_attention

ON_MAPS: dict[str, Callable[..., Tensor]] = {
    "window_attention": window_attention,
    "grid_attention": grid_attention,
    "criss_cross_attention": criss_cross_attention,
}


class Trace:
    """One attention layer in one forward pass: the arguments of its operations, and what they say.

    Weights are read off the operations themselves: attention is linear in its values, so that a backward pass to values that are all alike
    tells what each has given. Queries are pixels (row, column) of the layer's map, which is `size`.
    """

    has_points = False

    def __init__(self, name: str, layer: Any, size: tuple[int, int]) -> None:
        self.name, self.layer, self.size = name, layer, size
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def attention(self, row: int, column: int, image: int = 0, head: int | None = None) -> Tensor:
        """Attention (H, W) of one pixel to all pixels of the map, of one head or averaged over all; hard attention sums to 1.

        What a layer pads takes its share, which is not shown. In a deformable layer all levels are composed: the pixel's weights on the
        points, times what is read there or, in bi-level routing, the agents' weights on pixels.

        Raises:
            ValueError: If there is no such pixel, image or head.
        """
        return self._of_head(self.spread(self.one(row, column), image), head)

    def spread(self, weights: Tensor, image: int = 0) -> Tensor:
        """What queries of these weights (H, W) attend to, summed, for each head: (heads, H, W); the rows of an attention matrix, mixed.

        Raises:
            ValueError: If there is no such image.
        """
        raise NotImplementedError

    def routes(self, row: int, column: int, image: int = 0) -> list[int]:
        """Regions that the region of a pixel is routed to, best first. In a deformable layer: that its agents are routed to.

        Raises:
            ValueError: If there is no such pixel or image, or the layer does not route.
        """
        self._lacks("routes")

    def affinities(self, row: int, column: int, image: int = 0) -> Tensor:
        """How well every region (rows, columns) answers the region of a pixel: the products that the routes are the largest of.

        Raises:
            ValueError: If there is no such pixel or image, or the layer does not route.
        """
        self._lacks("routes")

    def points(self, image: int = 0) -> tuple[Tensor, Tensor]:
        """Deformed points and the reference points that they started from, both (G, h, w, 2), as (x, y) in [-1, 1] over the padded map.

        Raises:
            ValueError: If there is no such image, or the layer is not deformable.
        """
        self._lacks("points")

    def importance(self, image: int = 0, head: int | None = None) -> Tensor:
        """Attention that each point (h, w) receives, the mean over all pixels, of one head or averaged over all.

        Raises:
            ValueError: If there is no such image or head, or the layer is not deformable.
        """
        self._lacks("points")

    def heard(self, row: int, column: int, image: int = 0, head: int | None = None) -> Tensor:
        """Attention of one pixel to each point (h, w), of one head or averaged over all.

        Raises:
            ValueError: If there is no such pixel, image or head, or the layer is not deformable.
        """
        self._lacks("points")

    def check_query(self, row: int, column: int) -> None:
        """Raise a ValueError unless the map has this pixel."""
        if not (0 <= row < self.size[0] and 0 <= column < self.size[1]):
            raise ValueError(f"query ({row}, {column}) is not on the {self.size[0]}x{self.size[1]} map of {self.name}")

    def one(self, row: int, column: int) -> Tensor:
        """Weights (H, W) of nothing but one pixel of the map.

        Raises:
            ValueError: If there is no such pixel.
        """
        self.check_query(row, column)
        weights = torch.zeros(self.size)
        weights[row, column] = 1
        return weights

    def _lacks(self, what: str) -> NoReturn:
        raise ValueError(f"{self.name} has no {what}: it is a {type(self.layer).__name__}")

    def _of_head(self, found: Tensor, head: int | None) -> Tensor:
        """Of what is found for every head (heads, ...), that of one, or the mean."""
        if head is None:
            return found.mean(0)
        if not 0 <= head < len(found):
            raise ValueError(f"head {head} is not one of the {len(found)} of {self.name}, from 0 on")
        return found[head]

    def call(self, operation: str) -> dict[str, Any]:
        """The arguments of an operation of the layer, for the whole batch."""
        return next(arguments for name, arguments in self.calls if name == operation)

    def _of_image(self, arguments: dict[str, Any], image: int) -> dict[str, Any]:
        """Arguments for one image alone, in single precision at least."""
        images = len(self.calls[0][1]["x" if "x" in self.calls[0][1] else "q"])
        if not 0 <= image < images:
            raise ValueError(f"image {image} is not one of the {images} traced in {self.name}, from 0 on")
        batched = ("q", "k", "v", "x", "points", "routes", "route_weights")
        one = {name: value[image : image + 1] if name in batched and value is not None else value for name, value in arguments.items()}
        return {name: _precise(value) if isinstance(value, Tensor) else value for name, value in one.items()}


def _precise(x: Tensor) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode takes no part in a backward pass, its copy does
        return x.to(torch.promote_types(x.dtype, torch.float32)).clone() if x.is_floating_point() else x.clone()


def taken(operation: Callable[[Tensor], Tensor], like: Tensor, weights: Tensor) -> Tensor:
    """What an operation that is linear in its values takes of each for outputs of these weights: its transpose.

    Args:
        operation: From values to outputs.
        like: A tensor as the values are.
        weights: Of the outputs, or a shape that expands to theirs.
    """
    with torch.inference_mode(False), torch.enable_grad():
        values = torch.zeros_like(like).requires_grad_()
        out = operation(values)
        return torch.autograd.grad(out, values, weights.to(out).expand_as(out))[0]


class MapTrace(Trace):
    """A layer whose operations work on whole maps."""

    def spread(self, weights: Tensor, image: int = 0) -> Tensor:
        found = []
        for name, arguments in self.calls:
            one = self._of_image(arguments, image)
            values = one["v"].new_zeros(1, *self.size, one["num_heads"])  # one channel for each head
            found.append(taken(lambda v, one=one, name=name: ON_MAPS[name](**one | {"v": v}), values, weights[None, :, :, None]))  # type: ignore[misc]
        return torch.cat(found, dim=-1)[0].permute(2, 0, 1)


class DenseTrace(Trace):
    """A layer that attends to all pixels, or to cells of them, whose weight is shared by the pixels of each."""

    def spread(self, weights: Tensor, image: int = 0) -> Tensor:
        one = self._of_image(self.call("dense_attention"), image)
        on_keys = taken(lambda v: dense_attention(one["q"], one["k"], v), one["k"][..., :1], weights.flatten()[:, None])[0, :, :, 0]
        stride = getattr(self.layer, "stride", 1)
        cells = [-(-n // stride) for n in self.size]
        shared = on_keys.unflatten(1, cells).repeat_interleave(stride, 1).repeat_interleave(stride, 2) / stride**2
        return shared[:, : self.size[0], : self.size[1]]


class PointTrace(Trace):
    """Deformable attention: pixels to points, and the map as it is read there."""

    has_points = True

    def spread(self, weights: Tensor, image: int = 0) -> Tensor:
        sampled = self._of_image(self.call("sample_points"), image)
        on_points = self._on_points(weights, image)
        read = on_points.unflatten(1, sampled["points"].shape[2:4]).permute(1, 2, 0)[None]
        values = sampled["x"].new_zeros(1, *self.size, len(on_points))
        return taken(lambda x: sample_points(x, sampled["points"]), values, read)[0].permute(2, 0, 1)

    def points(self, image: int = 0) -> tuple[Tensor, Tensor]:
        points = self._of_image(self.call("sample_points"), image)["points"][0]
        return points, _cell_centres(points)

    def importance(self, image: int = 0, head: int | None = None) -> Tensor:
        return self._of_head(self._on_grid(uniform(self.size), image), head)

    def heard(self, row: int, column: int, image: int = 0, head: int | None = None) -> Tensor:
        return self._of_head(self._on_grid(self.one(row, column), image), head)

    def _on_grid(self, weights: Tensor, image: int) -> Tensor:
        """Weights (heads, h, w) on the points, for weights of the pixels (H, W) of the map."""
        return self._on_points(weights, image).unflatten(1, self.call("sample_points")["points"].shape[2:4])

    def _on_points(self, weights: Tensor, image: int) -> Tensor:
        """Weights (heads, M) on the points, for weights of the pixels (H, W) of the padded map."""
        one = self._of_image(self.call("deformable_attention"), image)
        return taken(lambda v: deformable_attention(**one | {"v": v}, backend="eager"), one["k"][..., :1], weights.flatten()[:, None])[
            0, ..., 0
        ]


class RoutingTrace(Trace):
    """Bi-level routing; regions are numbered row by row over the padded map."""

    def __init__(self, name: str, layer: Any, size: tuple[int, int]) -> None:
        super().__init__(name, layer, size)
        self.region_grid: tuple[int, int] = layer.region_grid  # of this pass, whatever becomes of the layer

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
        self.check_query(row, column)
        return row // self.region_size[0] * self.region_grid[1] + column // self.region_size[1]

    def routes(self, row: int, column: int, image: int = 0) -> list[int]:
        return self._of_image(self.call("routed_attention"), image)["routes"][0, self.region(row, column)].tolist()

    def affinities(self, row: int, column: int, image: int = 0) -> Tensor:
        one = self._of_image(self.call("routed_attention"), image)
        queries, keys = (one[name].mean(3).transpose(1, 2).flatten(2) for name in ("q", "k"))
        routes, affinities = route(queries, keys, keys.shape[1])
        region = self.region(row, column)
        return torch.zeros_like(affinities[0, region]).scatter(0, routes[0, region], affinities[0, region]).unflatten(0, self.region_grid)

    def spread(self, weights: Tensor, image: int = 0) -> Tensor:
        found = self._routed(self._fill(weights)[None, :, :, None], image)
        return merge(found, self.region_grid, self.padded)[:, : self.size[0], : self.size[1], 0]

    def _fill(self, weights: Tensor) -> Tensor:
        """Weights on the padded map, for those of the map, or of the padded one already."""
        below, right = (n - m for n, m in zip(self.padded, weights.shape, strict=True))
        return F.pad(weights, (0, right, 0, below))

    def _routed(self, weights: Tensor, image: int) -> Tensor:
        """Weights (heads, R, T, E) on the pixels of all regions, for E weights of the queries on a map (1, h, w, E)."""
        one = self._of_image(self.call("routed_attention"), image)
        values = one["k"].new_zeros(*one["k"].shape[:4], weights.shape[-1])
        queries = partition(weights, self.region_grid).unsqueeze(1)
        return taken(lambda v: routed_attention(**one | {"v": v}, backend="eager"), values, queries)[0]


class AgentTrace(RoutingTrace, PointTrace):
    """Deformable bi-level routing: pixels to agents, and these to the pixels of their routed regions."""

    def spread(self, weights: Tensor, image: int = 0) -> Tensor:
        on_agents = self._on_points(self._fill(weights), image)
        queries = on_agents.T.unflatten(0, self._padded_agents)[None]
        found = self._routed(queries, image).mean(0)[None]  # the heads of the agents are mixed before the pixels listen to them
        return merge(found, self.region_grid, self.padded)[0, : self.size[0], : self.size[1]].permute(2, 0, 1)

    def points(self, image: int = 0) -> tuple[Tensor, Tensor]:
        height, width = self.agents
        points = self._of_image(self.call("deformable_attention"), image)["points"][0]
        points = points.unflatten(1, self._padded_agents)[:, :height, :width]
        return points, _cell_centres(points)

    def importance(self, image: int = 0, head: int | None = None) -> Tensor:
        """As for every layer with points, over the pixels of the padded map; it sums to 1 with the agents of the padding."""
        return self._of_head(self._on_grid(uniform(self.padded), image), head)

    def _on_grid(self, weights: Tensor, image: int) -> Tensor:
        height, width = self.agents
        return self._on_points(self._fill(weights), image).unflatten(1, self._padded_agents)[:, :height, :width]

    @property
    def agents(self) -> tuple[int, int]:
        """Rows and columns of agents, without those that only fill up the region grid."""
        stride = self.layer.offset_network.stride
        return -(-self.padded[0] // stride), -(-self.padded[1] // stride)

    @property
    def _padded_agents(self) -> tuple[int, int]:
        return padded_size(self.region_grid, self.agents)


def _cell_centres(points: Tensor) -> Tensor:
    return reference_points(*points.shape[1:3], dtype=points.dtype, device=points.device).expand_as(points)


def uniform(size: tuple[int, int]) -> Tensor:
    """Weights (H, W) that are all alike and sum to 1."""
    return torch.full(size, 1 / (size[0] * size[1]))


# The first that a layer is an instance of.
KINDS: Sequence[tuple[type[nn.Module], type[Trace]]] = (
    (DeformableBiLevelRoutingAttention, AgentTrace),
    (RegionRouting, RoutingTrace),
    (DeformableAttention, PointTrace),
    (SubsampledAttention, DenseTrace),
    (FullAttention, DenseTrace),
    (HeadedAttention, MapTrace),
)


@contextmanager
def tracing(model: nn.Module) -> Iterator[dict[str, Trace]]:
    """Trace every attention layer of a model during the forward passes inside the block; of a layer, the last stays. Results do not change.

    Yields:
        Traces by module name, in order of execution.
    """
    traces: dict[str, Trace] = {}
    current: list[Trace] = []
    kinds = {layer: (name, kind) for name, layer in model.named_modules() for of, kind in reversed(KINDS) if isinstance(layer, of)}

    def enter(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        (name, kind), x = kinds[layer], args[0]
        height, width = x.shape[2:] if getattr(layer, "layout", "NHWC") == "NCHW" else x.shape[1:3]
        traces.pop(name, None)
        traces[name] = kind(name, layer, (height, width))
        current[:] = [traces[name]]

    def seen(name: str, **arguments: Any) -> None:
        if current:
            kept = {key: value.detach() if isinstance(value, Tensor) else value for key, value in arguments.items()}
            current[0].calls.append((name, kept))

    handles = [layer.register_forward_pre_hook(enter) for layer in kinds]
    handles += [layer.register_forward_hook(lambda *_: current.clear()) for layer in kinds]
    try:
        with watch(seen):
            yield traces
    finally:
        for handle in handles:
            handle.remove()
