"""Deformable attention: a map sampled at learned points, and the attention of every pixel to those samples."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .autocast import autocast
from .backends import choose_backend, requested_backend
from .chunks import is_compiling_inference, over_chunks
from .dense_attention import softmax_attention
from .observation import report


def reference_points(height: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Centres (h, w, 2) of the cells of a regular grid, as (x, y) from -1 to 1; the points that offsets move."""
    y, x = ((2 * torch.arange(n, dtype=dtype, device=device) + 1) / n - 1 for n in (height, width))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)


def sample_points(x: Tensor, points: Tensor, *, backend: str = "auto") -> Tensor:
    """Read a map at points between its pixels, bilinearly, as the deformed agents of DeBiFormer are; zero beyond the border.

    Args:
        x: Feature map (B, H, W, C).
        points: Points (B, G, h, w, 2) as (x, y), where -1 and 1 are the centres of the border pixels. Group g reads the g-th of G equal
            slices of the channels.
        backend: "auto", "eager" (`grid_sample`; gathers of whole tokens where the map is less precise than the points) or "reference";
            "triton", which has no kernel for this, is "eager" here.

    Returns:
        Samples (B, h, w, C).

    Raises:
        ValueError: If the shapes do not fit together, G does not divide C, or the backend is unknown.
    """
    if x.ndim != 4 or points.ndim != 5 or points.shape[-1] != 2 or points.shape[0] != x.shape[0]:
        raise ValueError(f"expected x (B, H, W, C) and points (B, G, h, w, 2); got {tuple(x.shape)} and {tuple(points.shape)}")
    if not (x.is_floating_point() and points.is_floating_point() and x.device == points.device):
        raise ValueError(f"x and points must be floating-point on one device; got {x.dtype} {x.device}, {points.dtype} {points.device}")
    if not points.shape[1] or x.shape[-1] % points.shape[1]:
        raise ValueError(f"the {points.shape[1]} groups of points do not divide the {x.shape[-1]} channels of x")
    report("sample_points", x=x, points=points)
    return SAMPLE_IMPLEMENTATIONS[requested_backend(backend).backend](x, points)


def _sample_rows(x: Tensor, points: Tensor) -> Tensor:
    (batch, height, width, channels), groups = x.shape, points.shape[1]
    tokens = x.reshape(batch * height * width * groups, channels // groups)  # a view: no copy per group of channels
    points = points.permute(0, 2, 3, 1, 4)  # groups last, so that the samples come out as (B, h, w, G * C / G)
    column, row = ((points[..., axis] + 1) * (0.5 * (n - 1)) for axis, n in enumerate((width, height)))
    left, top = column.floor(), row.floor()
    image = torch.arange(batch, device=x.device).view(-1, 1, 1, 1) * height
    group = torch.arange(groups, device=x.device)
    out = torch.zeros((), dtype=points.dtype, device=x.device)
    for i, row_weight in ((top, 1 - (row - top)), (top + 1, row - top)):
        for j, column_weight in ((left, 1 - (column - left)), (left + 1, column - left)):
            inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            # Clamped as integers, so that a NaN reads some token, and its NaN weight does the rest.
            at = (image + i.long().clamp(0, height - 1)) * width + j.long().clamp(0, width - 1)
            corner = tokens.index_select(0, (at * groups + group).flatten()).view(*at.shape, channels // groups)
            out = out + corner * (row_weight * column_weight * inside).unsqueeze(-1)
    return out.flatten(3).to(x.dtype)


def _sample(x: Tensor, points: Tensor) -> Tensor:
    return _opaque_samples(x, points) if is_compiling_inference() else _samples(x, points)


@torch.library.custom_op("debiformer::eager_sample_points", mutates_args=())
def _opaque_samples(x: Tensor, points: Tensor) -> Tensor:
    return _samples(x, points).contiguous()


@_opaque_samples.register_fake
def _(x: Tensor, points: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], points.shape[2], points.shape[3], x.shape[3])


def _samples(x: Tensor, points: Tensor) -> Tensor:
    if torch.compiler.is_exporting() and x.dtype == points.dtype:
        groups = points.shape[1]  # one node for all groups
        maps = x.unflatten(-1, (groups, x.shape[-1] // groups)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        samples = F.grid_sample(maps, points.flatten(0, 1), align_corners=True)
        return samples.unflatten(0, (x.shape[0], groups)).permute(0, 3, 4, 1, 2).flatten(3)
    # grid_sample reads map and points in one precision; the gathers leave a half-precision map as it is, however large.
    return reference.sample_points(x, points) if x.dtype == points.dtype else _sample_rows(x, points)


def _sample_reference(x: Tensor, points: Tensor) -> Tensor:
    return reference.sample_points(x.to(points.dtype), points).to(x.dtype)


SAMPLE_IMPLEMENTATIONS = {"auto": _sample, "triton": _sample, "eager": _sample, "reference": _sample_reference}


def deformable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    points: Tensor,
    bias_table: Tensor,
    grid_size: tuple[int, int],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every pixel to all sampled points, biased by their displacement: softmax(scale * q k^T + B) v (DeBiFormer, DBRA).

    The bias of query n and point m in head h is head h's table, read bilinearly at half the displacement between them, which is
    (x, y) from -1 to 1 and spans the table from corner to corner: one table serves every resolution.

    Args:
        q: Queries (B, H, N, D), one for each pixel of the grid, row by row.
        k: Keys (B, H, M, D) of the points.
        v: Values (B, H, M, E) of the points; E = D in every model, another width where the weights themselves are wanted.
        points: Where the points lie, (B, G, M, 2), as (x, y) from -1 to 1 on the map, and beyond it; head h belongs to group h * G // H.
            A displacement that the table does not reach has no bias.
        bias_table: Biases (H, 2 * rows - 1, 2 * cols - 1); kept in its own precision, as the points are.
        grid_size: Height and width of the query grid; their product is N.
        scale: Factor on the dot products; D ** -0.5 where it is None.
        backend: "auto", "triton" (the bias is never stored), "eager" or "reference"; see `choose_backend`.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or the backend is unknown or cannot run this.
    """
    _check(q, k, v, points, bias_table, grid_size)
    backend = choose_backend("deformable_attention", q, k, v, backend=backend).backend
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    report("deformable_attention", q=q, k=k, v=v, points=points, bias_table=bias_table, grid_size=grid_size, scale=scale)
    return IMPLEMENTATIONS[backend](q, k, v, points, bias_table, grid_size, scale)


def position_bias(points: Tensor, bias_table: Tensor, grid_size: tuple[int, int], rows: slice = slice(None)) -> Tensor:
    """Relative position bias (B, H, N, M) of `deformable_attention`, whose arguments these are; of these rows of its N alone."""
    height, width = grid_size
    batch, groups, count, _ = points.shape
    # From -1 to 1, and 0 where there is only one row or column.
    y, x = ((2 * torch.arange(n, dtype=points.dtype, device=points.device) - (n - 1)) / max(n - 1, 1) for n in (height, width))
    queries = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)[rows]
    # Written as N rows of M pairs: the difference to the points runs along whole rows, several times faster than pair by pair.
    queries = (0.5 * queries).unsqueeze(1).expand(-1, count, -1).flatten(1)
    half_displacement = (queries - 0.5 * points.flatten(0, 1).flatten(1).unsqueeze(1)).unflatten(2, (count, 2))
    # grid_sample shares its work among threads by image alone: a table for each.
    tables = bias_table.to(points.dtype).unflatten(0, (groups, -1)).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    return F.grid_sample(tables, half_displacement, align_corners=True).unflatten(0, (batch, groups)).flatten(1, 2)


def _eager(q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor, grid_size: tuple[int, int], scale: float) -> Tensor:
    if is_compiling_inference():
        return _opaque(*autocast(q, k, v), points, bias_table, *grid_size, scale)
    return _attend(q, k, v, points, bias_table, grid_size, scale)


@torch.library.custom_op("debiformer::eager_deformable_attention", mutates_args=())
def _opaque(q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor, height: int, width: int, scale: float) -> Tensor:
    return _attend(q, k, v, points, bias_table, (height, width), scale).transpose(1, 2).contiguous().transpose(1, 2)


@_opaque.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor, height: int, width: int, scale: float) -> Tensor:
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor, grid_size: tuple[int, int], scale: float) -> Tensor:
    def attend(rows: slice) -> Tensor:
        bias = position_bias(points, bias_table, grid_size, rows).to(q.dtype)
        return softmax_attention(q[:, :, rows], k, v, bias, scale).transpose(1, 2)

    # Of a row: its biases (or, in training, its weights) for each head, and its displacements for each group of points.
    elements = q.shape[0] * k.shape[2] * (q.shape[1] + 2 * points.shape[1])
    return over_chunks(attend, q.shape[2], elements, 1, q, k, v, points, bias_table).transpose(1, 2)


def _triton(q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor, grid_size: tuple[int, int], scale: float) -> Tensor:
    from .triton.deformable_attention import deformable_attention as fused  # not before it is wanted: Triton is heavy, and not everywhere

    return fused(q, k, v, points, bias_table, grid_size, scale)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"triton": _triton, "eager": _eager, "reference": reference.deformable_attention}


def _check(q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor, grid_size: tuple[int, int]) -> None:
    def shapes() -> str:
        given = {"q": q, "k": k, "v": v, "points": points, "bias_table": bias_table}
        return ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())

    if not q.ndim == k.ndim == v.ndim == points.ndim == 4 or bias_table.ndim != 3:
        raise ValueError(
            f"expected q (B, H, N, D), k and v (B, H, M, D), points (B, G, M, 2), bias_table (H, rows, columns); got {shapes()}"
        )
    if k.shape[:-1] != v.shape[:-1] or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k and v must agree in B and H, q and k in D, and k and v in M; got {shapes()}")
    if (
        (points.shape[0], points.shape[2], points.shape[3]) != (k.shape[0], k.shape[2], 2)
        or not points.shape[1]
        or q.shape[1] % points.shape[1]
    ):
        raise ValueError(f"points must be (B, G, M, 2) with the B and M of k, and G dividing the heads; got {shapes()}")
    if bias_table.shape[0] != q.shape[1] or not (bias_table.shape[1] % 2 and bias_table.shape[2] % 2):
        raise ValueError(f"bias_table must hold one table of odd height and width for each of the {q.shape[1]} heads; got {shapes()}")
    if not (points.is_floating_point() and bias_table.is_floating_point()):
        raise ValueError(f"points and bias_table must be floating-point; got {points.dtype}, {bias_table.dtype}")
    if not isinstance(grid_size, list | tuple) or len(grid_size) != 2 or min(grid_size) < 1 or grid_size[0] * grid_size[1] != q.shape[2]:
        raise ValueError(f"grid_size={grid_size} does not hold the {q.shape[2]} queries of q")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating-point dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device == points.device == bias_table.device:
        raise ValueError(f"all tensors must be on one device; got {q.device}, {k.device}, {v.device}, {points.device}, {bias_table.device}")
