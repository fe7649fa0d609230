"""Bi-level routing attention on maps: cut into regions, route, attend, and lay the regions back."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .autocast import autocast
from .backends import requested_backend
from .chunks import CHUNK, is_compiling_inference
from .dense_attention import softmax_attention
from .observation import is_watched, report, watch
from .regions import Grid, merge, partition, region_size
from .routed_attention import routed_attention
from .routing import route

# Gathering one token's key and value costs as much as attending to this many more: measured on CPUs, where it ranges from 20 to 30.
GATHER_COST = 24


def bi_level_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    region_grid: Grid,
    topk: int,
    num_heads: int,
    *,
    scale: float | None = None,
    soft_routing: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attention of every pixel to the `topk` regions that its own region is routed to, and to nothing else (BiFormer, eqs. 3-6).

    Args:
        q: Query map (B, h, w, C); its size may differ from that of keys and values, its grid of regions is the same.
        k: Key map (B, H, W, C).
        v: Value map (B, H, W, C).
        region_grid: Rows and columns of regions, which must divide every map.
        topk: Regions each region is routed to, from 1 to rows * columns; with all of them nothing is routed.
        num_heads: Attention heads; must divide C.
        scale: Factor on the dot products, and on the affinities of soft routing; (C / num_heads) ** -0.5 where it is None.
        soft_routing: Weigh the keys and values of each route by the softmax of its affinity.
        backend: As for `routed_attention`; "eager", which "auto" is on a CPU, masks dense attention where that is less work than gathering.

    Returns:
        (B, h, w, C).

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or the backend is unknown or cannot run this.
    """
    _check(q, k, v, region_grid, topk, num_heads)
    scale = (q.shape[-1] // num_heads) ** -0.5 if scale is None else scale
    if is_compiling_inference():
        # Cutting and merging have symbolic shapes that take a compiler long to reason about, and nothing to gain from it.
        q, k, v = autocast(q, k, v)
        return _opaque(q, k, v, *region_grid, topk, num_heads, scale, soft_routing, requested_backend(backend).backend)
    return _attend(q, k, v, region_grid, topk, num_heads, scale, soft_routing, backend)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, region_grid: Grid, topk: int, num_heads: int, scale: float, soft_routing: bool, backend: str
) -> Tensor:
    asked = requested_backend(backend).backend
    eager = asked == "eager" or (asked == "auto" and q.device.type == "cpu")
    if eager and not soft_routing and _masking_is_cheaper(q, k, region_grid, topk):
        return _masked(q, k, v, region_grid, topk, num_heads, scale)
    size = q.shape[1], q.shape[2]
    q, k, v = (partition(x, region_grid) for x in (q, k, v))
    routes = weights = None
    if soft_routing or topk < k.shape[1]:  # with all regions routed to, there is no choice
        routes, affinities = route(q.mean(2), k.mean(2), topk)
        weights = (scale * affinities).softmax(dim=-1) if soft_routing else None
    q, k, v = (_heads(x, num_heads) for x in (q, k, v))
    out = routed_attention(q, k, v, routes, scale=scale, route_weights=weights, backend=backend)
    return merge(out.permute(0, 2, 3, 1, 4).flatten(-2), region_grid, size)


def _check(q: Tensor, k: Tensor, v: Tensor, region_grid: Grid, topk: int, num_heads: int) -> None:
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"expected q (B, h, w, C) with k and v (B, H, W, C); got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating-point dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")
    if num_heads < 1 or q.shape[3] % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the {q.shape[3]} channels")
    if not 1 <= topk <= region_grid[0] * region_grid[1]:
        raise ValueError(f"topk={topk} is not between 1 and the {region_grid[0] * region_grid[1]} regions of region_grid={region_grid}")
    if not torch.compiler.is_compiling():  # a graph for every size cannot look at one
        for x in (q, k):
            region_size(region_grid, (x.shape[1], x.shape[2]))


def _heads(regions: Tensor, num_heads: int) -> Tensor:
    """(B, R, T, C) -> (B, heads, R, T, C / heads)."""
    return regions.unflatten(-1, (num_heads, regions.shape[-1] // num_heads)).permute(0, 3, 1, 2, 4)


def _masking_is_cheaper(q: Tensor, k: Tensor, region_grid: Grid, topk: int) -> bool:
    """Whether dense attention under a mask of regions is less work than gathering them; a graph of any size gathers."""
    regions, queries, keys = region_grid[0] * region_grid[1], q.shape[1] * q.shape[2], k.shape[1] * k.shape[2]
    cheaper = statically_known_true(queries * (regions - topk) <= GATHER_COST * topk * regions)
    return cheaper and statically_known_true(q.shape[0] * queries * keys <= CHUNK)


def _masked(q: Tensor, k: Tensor, v: Tensor, region_grid: Grid, topk: int, num_heads: int, scale: float) -> Tensor:
    """Dense attention, to which the order of tokens is all one: no map is cut, and the mask is made to fit."""
    regions = region_grid[0] * region_grid[1]
    routes = mask = None
    if topk < regions:
        routes, _ = route(_region_means(q, region_grid), _region_means(k, region_grid), topk)
        mask = q.new_full((q.shape[0], regions, regions), float("-inf")).scatter(2, routes, 0.0)
        mask = mask.index_select(1, _regions_of(q, region_grid)).index_select(2, _regions_of(k, region_grid)).unsqueeze(1)
    if is_watched():
        listed = torch.arange(regions, device=q.device).expand(q.shape[0], regions, -1) if routes is None else routes
        seen = {name: _heads(partition(x, region_grid), num_heads) for name, x in {"q": q, "k": k, "v": v}.items()}
        report("routed_attention", **seen, routes=listed, scale=scale, route_weights=None)
    queries, keys, values = (x.flatten(1, 2).unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2) for x in (q, k, v))
    out = softmax_attention(queries, keys, values, mask, scale)
    return out.transpose(1, 2).flatten(2).unflatten(1, (q.shape[1], q.shape[2]))


def _region_means(x: Tensor, region_grid: Grid) -> Tensor:
    """(B, H, W, C) -> (B, R, C)."""
    size = region_size(region_grid, (x.shape[1], x.shape[2]))
    return F.avg_pool2d(x.permute(0, 3, 1, 2), size).flatten(2).transpose(1, 2)


def _regions_of(x: Tensor, region_grid: Grid) -> Tensor:
    """The region (H * W,) of every pixel of a map (B, H, W, C)."""
    (rows, cols), (height, width) = region_grid, region_size(region_grid, (x.shape[1], x.shape[2]))
    return torch.arange(rows * cols, device=x.device).view(rows, 1, cols, 1).expand(-1, height, -1, width).flatten()


@torch.library.custom_op("debiformer::bi_level_attention", mutates_args=())
def _opaque(
    q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, topk: int, num_heads: int, scale: float, soft_routing: bool, backend: str
) -> Tensor:
    with watch(None):  # as of all that is compiled, a watcher sees nothing
        return _attend(q, k, v, (rows, columns), topk, num_heads, scale, soft_routing, backend).contiguous()


@_opaque.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, topk: int, num_heads: int, scale: float, soft_routing: bool, backend: str
) -> Tensor:
    return q.new_empty(q.shape)
