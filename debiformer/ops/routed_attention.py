"""Routed attention: queries of a region attend to the tokens of the regions it is routed to, and to nothing else."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .autocast import autocast
from .backends import choose_backend
from .chunks import is_compiling_inference, over_chunks
from .dense_attention import softmax_attention
from .observation import is_watched, report


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor | None,
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
        routes: Indices (B, R, K) of key regions, int64, from 0 to R' - 1; a region listed twice counts twice. None routes everywhere:
            every query attends to every token.
        scale: Factor on the dot products; D ** -0.5 where it is None.
        route_weights: Soft routing, (B, R, K): the keys and values of a route are multiplied by its weight. None for hard routing.
        backend: "auto", "triton" (never gathers), "eager" (gathers whole regions) or "reference"; see `choose_backend`. Without routes,
            "triton" is dense attention as well.

    Returns:
        (B, H, R, T, E).

    Raises:
        ValueError: If the shapes, dtypes or devices do not fit together, or the backend is unknown or cannot run this.
        IndexError: If a route is not a region. Not checked on an accelerator and under compilation, where looking would stall the work.
    """
    _check(q, k, v, routes, route_weights)
    backend = choose_backend("routed_attention", q, k, v, routes, route_weights, backend=backend).backend
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if is_watched():
        listed = torch.arange(k.shape[2], device=k.device).expand(*q.shape[:3:2], -1) if routes is None else routes
        report("routed_attention", q=q, k=k, v=v, routes=listed, scale=scale, route_weights=route_weights)
    return IMPLEMENTATIONS[backend](q, k, v, routes, scale, route_weights)


def _eager(q: Tensor, k: Tensor, v: Tensor, routes: Tensor | None, scale: float, route_weights: Tensor | None) -> Tensor:
    if is_compiling_inference():
        return _opaque(*autocast(q, k, v), routes, scale, route_weights)
    return _attend(q, k, v, routes, scale, route_weights)


@torch.library.custom_op("debiformer::eager_routed_attention", mutates_args=())
def _opaque(q: Tensor, k: Tensor, v: Tensor, routes: Tensor | None, scale: float, route_weights: Tensor | None) -> Tensor:
    out = _attend(q, k, v, routes, scale, route_weights)
    return out.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)


@_opaque.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, routes: Tensor | None, scale: float, route_weights: Tensor | None) -> Tensor:
    batch, heads, regions, tokens, _ = q.shape
    return q.new_empty(batch, regions, tokens, heads, v.shape[4]).permute(0, 3, 1, 2, 4)


def _attend(q: Tensor, k: Tensor, v: Tensor, routes: Tensor | None, scale: float, route_weights: Tensor | None) -> Tensor:
    return _dense(q, k, v, scale) if routes is None else _gathered(q, k, v, routes, scale, route_weights)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = softmax_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), scale=scale)
    return out.unflatten(2, (q.shape[2], q.shape[3]))


def _gathered(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, scale: float, route_weights: Tensor | None) -> Tensor:
    batch, heads, regions, _, _ = q.shape
    first = k.shape[2] * torch.arange(batch, device=routes.device).view(-1, 1, 1)
    chosen = (routes + first).flatten(0, 1)  # one row for each query region of the batch
    queries = q.transpose(1, 2).flatten(0, 1)
    # One row per key region, so that index_select copies whole regions; a view where heads are slices of (B, R, T, C).
    k_rows, v_rows = (x.permute(0, 2, 3, 1, 4).flatten(2).flatten(0, 1) for x in (k, v))
    weights = None if route_weights is None else route_weights.flatten(0, 1)

    def gathered(x: Tensor, rows: slice, width: int) -> Tensor:
        taken = x.index_select(0, chosen[rows].flatten())
        if weights is not None:
            taken = taken * weights[rows].flatten().unsqueeze(-1).to(taken.dtype)
        return taken.view(-1, chosen.shape[1] * k.shape[3], heads, width).transpose(1, 2)

    def attend(rows: slice) -> Tensor:
        keys, values = gathered(k_rows, rows, k.shape[4]), gathered(v_rows, rows, v.shape[4])
        return softmax_attention(queries[rows], keys, values, scale=scale).transpose(1, 2)

    inputs = (q, k, v) if route_weights is None else (q, k, v, route_weights)
    out = over_chunks(attend, batch * regions, chosen.shape[1] * (k_rows.shape[1] + v_rows.shape[1]), 0, *inputs)
    return out.unflatten(0, (batch, regions)).permute(0, 3, 1, 2, 4)


def _triton(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, scale: float, route_weights: None) -> Tensor:
    from .triton.routed_attention import routed_attention as fused  # not before it is wanted: Triton is heavy, and not everywhere

    return fused(q, k, v, routes, scale)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"triton": _triton, "eager": _eager, "reference": reference.routed_attention}


def _check(q: Tensor, k: Tensor, v: Tensor, routes: Tensor | None, route_weights: Tensor | None) -> None:
    def shapes() -> str:
        given = {"q": q, "k": k, "v": v, "routes": routes, "route_weights": route_weights}
        return ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items() if x is not None)

    if not q.ndim == k.ndim == v.ndim == 5 or (routes is not None and routes.ndim != 3):
        raise ValueError(f"expected q (B, H, R, T, D), k and v (B, H, R', T', D), routes (B, R, K); got {shapes()}")
    if k.shape[:-1] != v.shape[:-1] or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k and v must agree in B and H, q and k in D, and k and v in R' and T'; got {shapes()}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating-point dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")
    if routes is None:
        if route_weights is not None:
            raise ValueError(f"route_weights {tuple(route_weights.shape)} without routes")
        return
    if (routes.shape[0], routes.shape[1]) != (q.shape[0], q.shape[2]):
        raise ValueError(f"routes must be (B, R, K) with the B and R of q; got {shapes()}")
    if routes.device != q.device:
        raise ValueError(f"routes must be on the device of q; got {routes.device} and {q.device}")
    if routes.dtype != torch.int64:
        raise ValueError(f"routes must be int64 indices of regions; got {routes.dtype}")
    if routes.shape[2] < 1 or (route_weights is not None and route_weights.shape != routes.shape):
        raise ValueError(f"routes (B, R, K) need K of at least 1, and route_weights their shape; got {shapes()}")
    if routes.device.type == "cpu" and not torch.compiler.is_compiling() and routes.numel():
        # A route past the end would silently read the next image of the batch.
        low, high = (int(bound) for bound in torch.aminmax(routes))
        if low < 0 or high >= k.shape[2]:
            raise IndexError(f"routes from {low} to {high} leave the {k.shape[2]} key regions")
