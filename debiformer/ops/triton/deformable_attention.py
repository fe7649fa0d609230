"""Deformable attention in Triton: the position bias is interpolated inside, where its logit is, and never stored.

Scores are kept as [points, queries], so that neighbouring lanes read neighbouring columns of the bias table, and a program's queries are a
rectangle of the grid: the row of the table that a point looks up is then the same for a whole row of queries. The table arrives in units of
log2(e), padded by two cells of zeros, which stand for everything beyond its border.

Backward, the gradients of the logits are written for some tiles of points at a time, and `table_gradient.py` makes that of the table of
them. Every sum has its place and order, so gradients are the same bits every time.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..autocast import autocast
from . import launch
from .launch import LOG2E, Tile, block, dot_dtype, float32_precision, heads_last, load_rows, readable, store_rows, width_block
from .table_gradient import TableGradient

LOGIT_GRADIENT_BYTES = 32 << 20  # what the gradients of the logits may take at a time


@triton.jit
def _queries(tile, height, width, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """A rectangle of the query grid: the number of each query, whether it is there, and how far off the centre its row and column are."""
    across = tl.cdiv(width, TILE_COLUMNS)
    lane = tl.arange(0, TILE_ROWS * TILE_COLUMNS)
    row = tile // across * TILE_ROWS + lane // TILE_COLUMNS
    column = tile % across * TILE_COLUMNS + lane % TILE_COLUMNS
    # One row for all lanes is computed once.
    centred_row = tile // across + tl.zeros([1], tl.int32) if TILE_ROWS == 1 else row
    return row * width + column, (row < height) & (column < width), centred_row - 0.5 * (height - 1), column - 0.5 * (width - 1)


@triton.jit
def _corners(table, rows, columns, table_height, table_width):
    """The four biases around places in the table, counted from its centre, and the fractions of the way between them."""
    row_floor = tl.floor(rows)
    column_floor = tl.floor(columns)
    top = tl.minimum(tl.maximum(row_floor.to(tl.int32) + (table_height // 2 + 2), 0), table_height + 2)
    left = tl.minimum(tl.maximum(column_floor.to(tl.int32) + (table_width // 2 + 2), 0), table_width + 2)
    pitch = table_width + 4
    corner = table + (top * pitch + left)
    below = corner + pitch
    return tl.load(corner), tl.load(corner + 1), tl.load(below), tl.load(below + 1), rows - row_floor, columns - column_floor


@triton.jit
def _bias(table, rows, columns, table_height, table_width):
    """The table, read bilinearly at places counted from its centre."""
    top_left, top_right, bottom_left, bottom_right, down, right = _corners(table, rows, columns, table_height, table_width)
    top = top_left + (top_right - top_left) * right
    bottom = bottom_left + (bottom_right - bottom_left) * right
    return top + (bottom - top) * down


@triton.jit
def _load_points(points, point, there, table_height, table_width):
    """How far from the table's centre the points are, in its rows and columns, seen from the centre of the grid."""
    x = tl.load(points + 2 * point, mask=there, other=0.0)
    y = tl.load(points + 2 * point + 1, mask=there, other=0.0)
    return y * (0.25 * (table_height - 1)), x * (0.25 * (table_width - 1))


@triton.jit
def _forward_kernel(
    q, k, v, points, table, out, lse, q_strides, k_strides, v_strides, out_strides, tiles, heads, groups, count, height, width,
    table_height, table_width, row_step, column_step, scale,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    ONE_TILE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program // tiles % heads
    image = (program // tiles // heads).to(tl.int64)
    query, query_there, rows, columns = _queries(program % tiles, height, width, TILE_ROWS, TILE_COLUMNS)
    queries = load_rows(q + image * q_strides[0] + head * q_strides[1], query * q_strides[2], query_there, WIDTH, WIDTH_BLOCK, DOT)
    k += image * k_strides[0] + head * k_strides[1]
    v += image * v_strides[0] + head * v_strides[1]
    points += (image * groups + head * groups // heads) * count * 2
    table += head * (table_height + 4) * (table_width + 4)
    rows *= row_step
    columns *= column_step

    maximum = tl.full([TILE_ROWS * TILE_COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS * TILE_COLUMNS], tl.float32)
    result = tl.zeros([WIDTH_BLOCK, TILE_ROWS * TILE_COLUMNS], tl.float32)
    for first in range(0, KEYS if ONE_TILE else count, KEYS):
        point = first + tl.arange(0, KEYS)
        there = point < count
        point_row, point_column = _load_points(points, point, there, table_height, table_width)
        keys = load_rows(k, point * k_strides[2], there, WIDTH, WIDTH_BLOCK, DOT)
        values = load_rows(v, point * v_strides[2], there, WIDTH, WIDTH_BLOCK, DOT)
        bias = _bias(table, rows[None, :] - point_row[:, None], columns[None, :] - point_column[:, None], table_height, table_width)
        logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E) + bias
        logits = tl.where(there[:, None], logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 0))
        weights = tl.exp2(logits - new_maximum[None, :])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, 0)
        result = tl.dot(tl.trans(values), weights.to(DOT), result * shrink[None, :], input_precision=PRECISION)
        maximum = new_maximum
    out += image * out_strides[0] + head * out_strides[1]
    store_rows(out, query * out_strides[2], query_there, tl.trans(result / total[None, :]), WIDTH, WIDTH_BLOCK)
    tl.store(lse + (image * heads + head) * height * width + query, maximum + tl.log2(total), mask=query_there)


@triton.jit
def _query_gradient_kernel(
    q, k, v, points, table, out, lse, d_out, delta, d_q, q_strides, k_strides, v_strides, out_strides, d_out_strides, d_q_strides,
    tiles, heads, groups, count, height, width, table_height, table_width, row_step, column_step, scale,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program // tiles % heads
    image = (program // tiles // heads).to(tl.int64)
    query, query_there, rows, columns = _queries(program % tiles, height, width, TILE_ROWS, TILE_COLUMNS)
    queries = load_rows(q + image * q_strides[0] + head * q_strides[1], query * q_strides[2], query_there, WIDTH, WIDTH_BLOCK, DOT)
    out += image * out_strides[0] + head * out_strides[1]
    d_out += image * d_out_strides[0] + head * d_out_strides[1]
    outputs = load_rows(out, query * out_strides[2], query_there, WIDTH, WIDTH_BLOCK, tl.float32)
    d_outputs = load_rows(d_out, query * d_out_strides[2], query_there, WIDTH, WIDTH_BLOCK, DOT)
    statistics = (image * heads + head) * height * width + query
    query_lse = tl.load(lse + statistics, mask=query_there, other=float("inf"))
    query_delta = tl.sum(outputs * d_outputs.to(tl.float32), 1)
    tl.store(delta + statistics, query_delta, mask=query_there)
    k += image * k_strides[0] + head * k_strides[1]
    v += image * v_strides[0] + head * v_strides[1]
    points += (image * groups + head * groups // heads) * count * 2
    table += head * (table_height + 4) * (table_width + 4)
    rows *= row_step
    columns *= column_step

    result = tl.zeros([WIDTH_BLOCK, TILE_ROWS * TILE_COLUMNS], tl.float32)
    for first in range(0, count, KEYS):
        point = first + tl.arange(0, KEYS)
        there = point < count
        point_row, point_column = _load_points(points, point, there, table_height, table_width)
        keys = load_rows(k, point * k_strides[2], there, WIDTH, WIDTH_BLOCK, DOT)
        values = load_rows(v, point * v_strides[2], there, WIDTH, WIDTH_BLOCK, DOT)
        bias = _bias(table, rows[None, :] - point_row[:, None], columns[None, :] - point_column[:, None], table_height, table_width)
        logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E) + bias
        weights = tl.where(there[:, None], tl.exp2(logits - query_lse[None, :]), 0.0)
        d_weights = tl.dot(values, tl.trans(d_outputs), input_precision=PRECISION)
        d_logits = weights * (d_weights - query_delta[None, :])
        result = tl.dot(tl.trans(keys), d_logits.to(DOT), result, input_precision=PRECISION)
    d_q += image * d_q_strides[0] + head * d_q_strides[1]
    store_rows(d_q, query * d_q_strides[2], query_there, tl.trans(result * scale), WIDTH, WIDTH_BLOCK)


@triton.jit(do_not_specialize=["first_unit", "units", "tiles_each"])
def _point_gradient_kernel(
    q, k, v, points, table, lse, d_out, delta, d_q, partial, d_logit,
    q_strides, k_strides, v_strides, d_out_strides, d_q_strides,
    first_unit, units, tiles, tiles_each, heads, groups, count, height, width, table_height, table_width, row_step, column_step, scale,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, KEYS: tl.constexpr,
    WITH_QUERIES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One unit, a tile of points of an image, over a share of the queries: partial gradients of keys, values and points, and all d_logit.

    WITH_QUERIES: the tile holds all points, so this is all there is to the gradients of these queries, too.
    """
    program = tl.program_id(0)
    head = program % heads
    unit = program // heads % units
    share = program // heads // units
    key_tiles = tl.cdiv(count, KEYS)
    image = ((first_unit + unit) // key_tiles).to(tl.int64)
    lane = tl.arange(0, KEYS)
    point = (first_unit + unit) % key_tiles * KEYS + lane
    there = point < count
    keys = load_rows(k + image * k_strides[0] + head * k_strides[1], point * k_strides[2], there, WIDTH, WIDTH_BLOCK, DOT)
    values = load_rows(v + image * v_strides[0] + head * v_strides[1], point * v_strides[2], there, WIDTH, WIDTH_BLOCK, DOT)
    points += (image * groups + head * groups // heads) * count * 2
    point_row, point_column = _load_points(points, point, there, table_height, table_width)
    q += image * q_strides[0] + head * q_strides[1]
    d_out += image * d_out_strides[0] + head * d_out_strides[1]
    statistics = (image * heads + head) * height * width
    table += head * (table_height + 4) * (table_width + 4)
    unit_row = (unit * heads + head).to(tl.int64) * KEYS
    d_logit += unit_row * height * width

    key_result = tl.zeros([KEYS, WIDTH_BLOCK], tl.float32)
    value_result = tl.zeros([KEYS, WIDTH_BLOCK], tl.float32)
    row_result = tl.zeros([KEYS], tl.float32)
    column_result = tl.zeros([KEYS], tl.float32)
    for tile in range(share * tiles_each, tl.minimum((share + 1) * tiles_each, tiles)):
        query, query_there, rows, columns = _queries(tile, height, width, TILE_ROWS, TILE_COLUMNS)
        queries = load_rows(q, query * q_strides[2], query_there, WIDTH, WIDTH_BLOCK, DOT)
        d_outputs = load_rows(d_out, query * d_out_strides[2], query_there, WIDTH, WIDTH_BLOCK, DOT)
        query_lse = tl.load(lse + statistics + query, mask=query_there, other=float("inf"))
        table_rows = (rows * row_step)[None, :] - point_row[:, None]
        table_columns = (columns * column_step)[None, :] - point_column[:, None]
        top_left, top_right, bottom_left, bottom_right, down, right = _corners(table, table_rows, table_columns, table_height, table_width)
        top = top_left + (top_right - top_left) * right
        bottom = bottom_left + (bottom_right - bottom_left) * right
        logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E) + top + (bottom - top) * down
        weights = tl.where(there[:, None], tl.exp2(logits - query_lse[None, :]), 0.0)
        value_result = tl.dot(weights.to(DOT), d_outputs, value_result, input_precision=PRECISION)
        d_weights = tl.dot(values, tl.trans(d_outputs), input_precision=PRECISION)
        if WITH_QUERIES:  # noqa: SIM108 (one of the two is not compiled)
            query_delta = tl.sum(weights * d_weights, 0)
        else:
            query_delta = tl.load(delta + statistics + query, mask=query_there, other=0.0)
        d_logits = weights * (d_weights - query_delta[None, :])
        key_result = tl.dot(d_logits.to(DOT), queries, key_result, input_precision=PRECISION)
        row_result += tl.sum(d_logits * (bottom - top), 1)
        slope_above = top_right - top_left
        column_result += tl.sum(d_logits * (slope_above + (bottom_right - bottom_left - slope_above) * down), 1)
        d_logit_rows = d_logit + (lane[:, None] * (height * width) + query[None, :])
        tl.store(d_logit_rows, d_logits, mask=there[:, None] & query_there[None, :])
        if WITH_QUERIES:
            d_queries = tl.trans(tl.dot(tl.trans(keys), d_logits.to(DOT), input_precision=PRECISION) * scale)
            d_q_rows = d_q + image * d_q_strides[0] + head * d_q_strides[1]
            store_rows(d_q_rows, query * d_q_strides[2], query_there, d_queries, WIDTH, WIDTH_BLOCK)
    partial += (share * units * heads * KEYS + unit_row) * (2 * WIDTH + 2)
    row = lane * (2 * WIDTH + 2)
    store_rows(partial, row, there, key_result * scale, WIDTH, WIDTH_BLOCK)
    store_rows(partial, row + WIDTH, there, value_result, WIDTH, WIDTH_BLOCK)
    # The table came in units of log2(e), gradients leave in plain ones; and the place in the table falls as the point moves on.
    tl.store(partial + row + 2 * WIDTH, column_result * (-0.25 * (table_width - 1) / LOG2E), mask=there)
    tl.store(partial + row + 2 * WIDTH + 1, row_result * (-0.25 * (table_height - 1) / LOG2E), mask=there)


def _forward_tile(dtype: torch.dtype, width: int, count: int) -> Tile:
    """These tiles compile without spills at the models' width, and are not yet timed."""
    if dtype == torch.float32 or width > 64:
        return Tile(queries=32, keys=32, num_warps=4, num_stages=1)
    return Tile(queries=32, keys=64, num_warps=4, num_stages=1) if count <= 64 else Tile(queries=64, keys=32, num_warps=8, num_stages=1)


def _query_tile(dtype: torch.dtype, width: int) -> Tile:
    return Tile(queries=32 if dtype == torch.float32 or width > 64 else 64, keys=32, num_warps=4, num_stages=1)


def _point_tile(dtype: torch.dtype, width: int, count: int) -> Tile:
    """Up to 64 points fit one tile, which saves the pass over the queries."""
    if dtype == torch.float32 or width > 64:
        return Tile(queries=16, keys=32, num_warps=4, num_stages=1)
    return Tile(queries=16 if width > 32 else 32, keys=64 if count > 32 else 32, num_warps=4, num_stages=1)


class _Geometry:
    """A call's sizes, and the arguments that every kernel takes of them."""

    def __init__(self, q: Tensor, points: Tensor, table: Tensor, grid_size: tuple[int, int]) -> None:
        (self.height, self.width), (self.batch, self.heads) = grid_size, q.shape[:2]
        self.groups, self.count = points.shape[1:3]
        self.table_size = tuple(table.shape[1:])
        # Queries span half the table; a grid of one row sits in the middle of it.
        steps = [0.5 * (entries - 1) / max(n - 1, 1) for entries, n in zip(self.table_size, grid_size, strict=True)]
        self.sizes = (self.heads, self.groups, self.count, *grid_size, *self.table_size, *steps)

    def rectangle(self, queries: int) -> tuple[int, int]:
        """Rows and columns of a tile of queries: one row of the grid where that is wide enough."""
        columns = block(self.width, 1, queries)
        return queries // columns, columns

    def tiles(self, queries: int) -> int:
        """Tiles of queries in the grid."""
        rows, columns = self.rectangle(queries)
        return triton.cdiv(self.height, rows) * triton.cdiv(self.width, columns)


def _padded(table: Tensor) -> Tensor:
    return F.pad(table.float() * LOG2E.value, (2, 2, 2, 2))


def forward(
    q: Tensor, k: Tensor, v: Tensor, points: Tensor, table: Tensor, grid_size: tuple[int, int], scale: float, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Attention, and the base-2 logarithm of each query's sum of weights (B, H, N), float32; `tile` is for tuning."""
    q, k, v, points = readable(q), readable(k), readable(v), points.float().contiguous()
    out, lse, width = heads_last(q), q.new_empty(q.shape[:-1], dtype=torch.float32), q.shape[-1]
    tile = tile or _forward_tile(q.dtype, width, k.shape[2])
    call = _Geometry(q, points, table, grid_size)
    tiles = call.tiles(tile.queries)
    with torch.cuda.device_of(q):
        _forward_kernel[(call.batch * call.heads * tiles,)](
            q, k, v, points, _padded(table), out, lse, q.stride(), k.stride(), v.stride(), out.stride(), tiles, *call.sizes, scale,
            width, width_block(width), *call.rectangle(tile.queries), tile.keys, call.count <= tile.keys,
            dot_dtype(q.dtype), float32_precision(), **tile.options,
        )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, points: Tensor, table: Tensor, out: Tensor, lse: Tensor, d_out: Tensor,
    grid_size: tuple[int, int], scale: float, query_tile: Tile | None = None, point_tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, points and table, always the same bits; the tiles are for tuning."""
    q, k, v, d_out = readable(q), readable(k), readable(v), readable(d_out)
    points_dtype, points, padded = points.dtype, points.float().contiguous(), _padded(table)
    width, count, types = q.shape[-1], k.shape[2], (dot_dtype(q.dtype), float32_precision())
    call = _Geometry(q, points, table, grid_size)
    query_tile, point_tile = query_tile or _query_tile(q.dtype, width), point_tile or _point_tile(q.dtype, width, count)
    d_q, delta = heads_last(q), torch.empty_like(lse)
    strides = q.stride(), k.stride(), v.stride(), out.stride(), d_out.stride(), d_q.stride()
    one_tile = count <= point_tile.keys

    # A unit is a tile of points of an image; `chunk` of them are worked on at a time, each by `shares` programs for every head.
    key_tiles = triton.cdiv(count, point_tile.keys)
    units = call.batch * key_tiles
    unit_bytes = call.heads * point_tile.keys * q.shape[2] * 4
    chunk = max(min(LOGIT_GRADIENT_BYTES // unit_bytes, units), 1)
    tiles = call.tiles(point_tile.queries)
    tiles_each = triton.cdiv(tiles, triton.cdiv(launch.PROGRAMS, chunk * call.heads))
    shares = triton.cdiv(tiles, tiles_each)
    d_logit = q.new_empty(chunk, call.heads, point_tile.keys, q.shape[2], dtype=torch.float32)
    partial = q.new_empty(shares * chunk * call.heads * point_tile.keys * (2 * width + 2), dtype=torch.float32)
    summed = q.new_empty(units, call.heads, point_tile.keys, 2 * width + 2, dtype=torch.float32)

    table_gradient = TableGradient(points, call.sizes, chunk, point_tile.keys, q.dtype)
    with torch.cuda.device_of(q):
        if not one_tile:
            query_tiles = call.tiles(query_tile.queries)
            _query_gradient_kernel[(call.batch * call.heads * query_tiles,)](
                q, k, v, points, padded, out, lse, d_out, delta, d_q, *strides, query_tiles, *call.sizes, scale,
                width, width_block(width), *call.rectangle(query_tile.queries), query_tile.keys, *types,
                **query_tile.options,
            )  # fmt: skip
        for first in range(0, units, chunk):
            now = min(chunk, units - first)
            _point_gradient_kernel[(shares * now * call.heads,)](
                q, k, v, points, padded, lse, d_out, delta, d_q, partial, d_logit, *strides[:3], *strides[4:],
                first, now, tiles, tiles_each, *call.sizes, scale,
                width, width_block(width), *call.rectangle(point_tile.queries), point_tile.keys, one_tile, *types,
                **point_tile.options,
            )  # fmt: skip
            here = summed[first : first + now]
            torch.sum(partial[: shares * here.numel()].view(shares, *here.shape), dim=0, out=here)
            table_gradient.add(d_logit, first, now)
    summed = summed.view(call.batch, key_tiles, *summed.shape[1:]).transpose(2, 3).flatten(1, 2)[:, :count]
    keys, values, d_points = summed.transpose(1, 2).split([width, width, 2], dim=-1)  # (B, H, M, ...)
    d_k, d_v = heads_last(k).copy_(keys), heads_last(v).copy_(values)
    d_points = d_points.unflatten(1, (call.groups, -1)).sum(2).contiguous().to(points_dtype)
    return d_q, d_k, d_v, d_points, table_gradient.sum().to(table.dtype)


@torch.library.custom_op("debiformer::deformable_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, points: Tensor, table: Tensor, height: int, width: int, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, points, table, (height, width), scale)


@_attention.register_fake
def _(q, k, v, points, table, height, width, scale):
    return heads_last(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("debiformer::deformable_attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, points: Tensor, table: Tensor, out: Tensor, lse: Tensor, d_out: Tensor,
    height: int, width: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(q, k, v, points, table, out, lse, d_out, (height, width), scale)


@_attention_backward.register_fake
def _(q, k, v, points, table, out, lse, d_out, height, width, scale):
    return heads_last(q), heads_last(k), heads_last(v), points.new_empty(points.shape), table.new_empty(table.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.height, ctx.width, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, d_out, d_lse):
    return *_attention_backward(*ctx.saved_tensors, d_out, ctx.height, ctx.width, ctx.scale), None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def _pairs(q, k):
    """Multiply-adds of one product of all queries with all keys."""
    batch, heads, queries, width = q
    return batch * heads * queries * k[2] * width


@register_flop_formula(torch.ops.debiformer.deformable_attention)
def _(q, k, *_, **__) -> int:
    return 2 * 2 * _pairs(q, k)


@register_flop_formula(torch.ops.debiformer.deformable_attention_backward)
def _(q, k, *_, **__) -> int:
    return 2 * 5 * _pairs(q, k)


def deformable_attention(
    q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor, grid_size: tuple[int, int], scale: float
) -> Tensor:
    """The public operation, on arguments that it has checked."""
    return _attention(*autocast(q, k, v), points, bias_table, *grid_size, scale)[0]
