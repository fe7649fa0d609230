"""Bi-level routing attention on maps: cut into regions, route, attend, and lay the regions back."""

import torch
from torch import Tensor

from .backends import requested_backend
from .chunks import is_compiling_inference
from .regions import Grid, merge, partition
from .routed_attention import routed_attention
from .routing import route


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
        backend: As for `routed_attention`.

    Returns:
        (B, h, w, C).

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or the backend is unknown or cannot run this.
    """
    scale = (q.shape[-1] // num_heads) ** -0.5 if scale is None else scale
    if is_compiling_inference():
        # Cutting and merging have symbolic shapes that take a compiler long to reason about, and nothing to gain from it.
        return _opaque(q, k, v, *region_grid, topk, num_heads, scale, soft_routing, requested_backend(backend).backend)
    return _attend(q, k, v, region_grid, topk, num_heads, scale, soft_routing, backend)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, region_grid: Grid, topk: int, num_heads: int, scale: float, soft_routing: bool, backend: str
) -> Tensor:
    size = q.shape[1], q.shape[2]
    q, k, v = (partition(x, region_grid) for x in (q, k, v))
    routes = weights = None
    if soft_routing or topk < k.shape[1]:  # with all regions routed to, there is no choice
        routes, affinities = route(q.mean(2), k.mean(2), topk)
        weights = (scale * affinities).softmax(dim=-1) if soft_routing else None
    q, k, v = (x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    out = routed_attention(q, k, v, routes, scale=scale, route_weights=weights, backend=backend)
    return merge(out.permute(0, 2, 3, 1, 4).flatten(-2), region_grid, size)


@torch.library.custom_op("debiformer::bi_level_attention", mutates_args=())
def _opaque(
    q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, topk: int, num_heads: int, scale: float, soft_routing: bool, backend: str
) -> Tensor:
    return _attend(q, k, v, (rows, columns), topk, num_heads, scale, soft_routing, backend).contiguous()


@_opaque.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, topk: int, num_heads: int, scale: float, soft_routing: bool, backend: str
) -> Tensor:
    return q.new_empty(q.shape)
