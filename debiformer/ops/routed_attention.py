"""Routed attention: queries of a region attend to the tokens of the regions it is routed to, and to nothing else."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .observation import report


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    *,
    scale: float | None = None,
    route_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each region's queries over the tokens of its routed regions, together (BiFormer, eqs. 5-6).

    Args:
        q: Queries (B, H, R, T, D).
        k: Keys (B, H, R', T', D).
        v: Values (B, H, R', T', E); E = D in every model, another width where the weights themselves are wanted.
        routes: Indices (B, R, K) of key regions, int64, from 0 to R' - 1. A region listed twice counts twice; as many routes as there are
            regions must list every region.
        scale: Factor on the dot products; D ** -0.5 where it is None.
        route_weights: Soft routing, (B, R, K): the keys and values of a route are multiplied by its weight. None for hard routing.
        backend: "auto", "eager" (gathers whole regions, dense attention where all regions are routed to) or "reference".

    Returns:
        (B, H, R, T, E).

    Raises:
        ValueError: If the shapes, dtypes or devices do not fit together, or the backend is unknown.
        IndexError: If a route is not a region, or K = R' routes leave one out. Not checked on an accelerator and under compilation, where
            looking would stall the work.
    """
    _check(q, k, v, routes, route_weights)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    report("routed_attention", q=q, k=k, v=v, routes=routes, scale=scale, route_weights=route_weights)
    return BACKENDS[backend](q, k, v, routes, scale, route_weights)


def _eager(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, scale: float, route_weights: Tensor | None) -> Tensor:
    batch, heads, regions, tokens, _ = q.shape
    everywhere = routes.shape[-1] == k.shape[2]
    if everywhere and route_weights is None:  # every token attends to every token: no routing, and no gather
        out = F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), scale=scale)
        return out.unflatten(2, (regions, tokens))

    first = k.shape[2] * torch.arange(batch, device=routes.device).view(-1, 1, 1)
    rows = (routes + first).flatten()

    def gathered(x: Tensor) -> Tensor:
        # One row per region, so that index_select copies whole regions; a view where heads are slices of (B, R, T, C).
        chosen = x.permute(0, 2, 3, 1, 4).flatten(2).flatten(0, 1).index_select(0, rows)
        if route_weights is not None:
            chosen = chosen * route_weights.flatten().unsqueeze(-1).to(chosen.dtype)
        return chosen.view(batch * regions, routes.shape[-1] * x.shape[3], heads, x.shape[-1]).transpose(1, 2)

    out = F.scaled_dot_product_attention(q.transpose(1, 2).flatten(0, 1), gathered(k), gathered(v), scale=scale)
    return out.unflatten(0, (batch, regions)).transpose(1, 2)


BACKENDS = {"auto": _eager, "eager": _eager, "reference": reference.routed_attention}


def _check(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, route_weights: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, routes {tuple(routes.shape)}"
    if not q.ndim == k.ndim == v.ndim == 5 or routes.ndim != 3:
        raise ValueError(f"expected q (B, H, R, T, D), k and v (B, H, R', T', D), routes (B, R, K); got {shapes}")
    if k.shape[:-1] != v.shape[:-1] or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k and v must agree in B and H, q and k in D, and k and v in R' and T'; got {shapes}")
    if (routes.shape[0], routes.shape[1]) != (q.shape[0], q.shape[2]):
        raise ValueError(f"routes must be (B, R, K) with the B and R of q; got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating-point dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device == routes.device:
        raise ValueError(f"q, k, v and routes must be on one device; got {q.device}, {k.device}, {v.device}, {routes.device}")
    if routes.dtype != torch.int64:
        raise ValueError(f"routes must be int64 indices of regions; got {routes.dtype}")
    if routes.shape[2] < 1 or (route_weights is not None and route_weights.shape != routes.shape):
        given = None if route_weights is None else tuple(route_weights.shape)
        raise ValueError(f"routes (B, R, K) need K of at least 1, and route_weights their shape; got {shapes}, route_weights {given}")
    if routes.device.type == "cpu" and not torch.compiler.is_compiling() and routes.numel():
        # A route past the end would silently read the next image of the batch.
        low, high = (int(bound) for bound in torch.aminmax(routes))
        if low < 0 or high >= k.shape[2]:
            raise IndexError(f"routes from {low} to {high} leave the {k.shape[2]} key regions")
        if routes.shape[2] == k.shape[2] and not torch.equal(routes.sort(dim=-1).values, torch.arange(k.shape[2]).expand_as(routes)):
            raise IndexError(f"{routes.shape[2]} routes to {k.shape[2]} key regions must list each region once")
