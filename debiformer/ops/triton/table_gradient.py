"""The gradient of the bias table of deformable attention, from those of the logits.

A logit's gradient belongs to the four table entries around its place, with bilinear weights: the products of two hat functions, of rows and
of columns. Over all queries of a point this is hat(rows)^T d_logit hat(columns): matrix products, in which no two programs write to one
place. They are in float32 (tf32 where the model is in half precision): the gradients of a query's logits sum to zero, and half precision
would lose what neighbours leave of each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import block, float32_precision


@triton.jit
def _reached(first, last, centre, step, size):
    """The range of grid rows (or columns) whose place in the table lies between `first` and `last`."""
    step = tl.maximum(step, 1e-6)  # a table of one row has no steps
    begin = tl.floor(first / step + centre)
    end = tl.ceil(last / step + centre) + 1
    return tl.minimum(tl.maximum(begin, 0.0), size).to(tl.int32), tl.minimum(tl.maximum(end, 0.0), size).to(tl.int32)


@triton.jit(do_not_specialize=["first_unit", "units", "points_each"])
def _table_gradient_kernel(
    d_logit, points, partial, first_unit, units, points_each, heads, groups, count, height, width, table_height, table_width,
    row_step, column_step,
    KEYS: tl.constexpr, TABLE_ROWS: tl.constexpr, TABLE_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one table, over a share of the points: the sum of hat(rows)^T d_logit hat(columns), added to what earlier units gave."""
    across = tl.cdiv(table_width, TABLE_COLUMNS)
    table_tiles = tl.cdiv(table_height, TABLE_ROWS) * across
    program = tl.program_id(0)
    tile = program % table_tiles
    head = program // table_tiles % heads
    share = program // table_tiles // heads
    key_tiles = tl.cdiv(count, KEYS)
    table_row = tile // across * TABLE_ROWS + tl.arange(0, TABLE_ROWS)
    table_column = tile % across * TABLE_COLUMNS + tl.arange(0, TABLE_COLUMNS)
    cell = ((share * heads + head).to(tl.int64) * table_height + table_row[:, None]) * table_width + table_column[None, :]
    cell_there = (table_row < table_height)[:, None] & (table_column < table_width)[None, :]
    centred_row = (table_row - table_height // 2).to(tl.float32)
    centred_column = (table_column - table_width // 2).to(tl.float32)
    top = (tile // across * TABLE_ROWS - table_height // 2).to(tl.float32)
    left = (tile % across * TABLE_COLUMNS - table_width // 2).to(tl.float32)

    result = tl.load(partial + cell, mask=cell_there, other=0.0)
    for entry in range(share * points_each, tl.minimum((share + 1) * points_each, units * KEYS)):
        unit = first_unit + entry // KEYS
        point = unit % key_tiles * KEYS + entry % KEYS
        if point < count:
            image = (unit // key_tiles).to(tl.int64)
            place = points + ((image * groups + head * groups // heads) * count + point) * 2
            point_column = tl.load(place) * (0.25 * (table_width - 1))
            point_row = tl.load(place + 1) * (0.25 * (table_height - 1))
            row_begin, row_end = _reached(top - 1 + point_row, top + TABLE_ROWS + point_row, 0.5 * (height - 1), row_step, height)
            column_begin, column_end = _reached(
                left - 1 + point_column, left + TABLE_COLUMNS + point_column, 0.5 * (width - 1), column_step, width
            )
            rows_of_point = d_logit + ((entry // KEYS * heads + head).to(tl.int64) * KEYS + entry % KEYS) * (height * width)
            for first_column in range(column_begin, column_end, COLUMNS):
                column = first_column + tl.arange(0, COLUMNS)
                summed_rows = tl.zeros([TABLE_ROWS, COLUMNS], tl.float32)
                for first_row in range(row_begin, row_end, ROWS):
                    row = first_row + tl.arange(0, ROWS)
                    there = (row < height)[:, None] & (column < width)[None, :]
                    tile_gradient = tl.load(rows_of_point + row[:, None] * width + column[None, :], mask=there, other=0.0)
                    row_place = (row - 0.5 * (height - 1)) * row_step - point_row
                    row_hat = tl.maximum(1.0 - tl.abs(row_place[None, :] - centred_row[:, None]), 0.0)
                    summed_rows = tl.dot(row_hat, tile_gradient, summed_rows, input_precision=PRECISION)
                column_place = (column - 0.5 * (width - 1)) * column_step - point_column
                column_hat = tl.maximum(1.0 - tl.abs(column_place[:, None] - centred_column[None, :]), 0.0)
                result = tl.dot(summed_rows, column_hat, result, input_precision=PRECISION)
    tl.store(partial + cell, result, mask=cell_there)


class TableGradient:
    """A sum over all points, a chunk of `units` (tiles of `keys` points of an image) at a time."""

    def __init__(self, points: Tensor, sizes: tuple, units: int, keys: int, dtype: torch.dtype) -> None:
        heads, _, _, _, _, *table_size, _, _ = sizes
        self.points, self.sizes, self.keys = points, sizes, keys
        largest = 32 if dtype == torch.float32 else 64
        self.tile = tuple(block(n, 32, largest) for n in table_size)
        self.precision = float32_precision() if dtype == torch.float32 else "tf32"
        programs = triton.cdiv(table_size[0], self.tile[0]) * triton.cdiv(table_size[1], self.tile[1]) * heads
        self.points_each = triton.cdiv(units * keys, triton.cdiv(launch.PROGRAMS, programs))
        shares = triton.cdiv(units * keys, self.points_each)
        self.programs = programs * shares
        self.partial = points.new_zeros(shares, heads, *table_size)

    def add(self, d_logit: Tensor, first_unit: int, units: int) -> None:
        """Add what the units from the first on give; d_logit is (units, H, keys, N), float32."""
        _table_gradient_kernel[(self.programs,)](
            d_logit, self.points, self.partial, first_unit, units, self.points_each, *self.sizes, self.keys, *self.tile, 32, 32,
            self.precision, num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip

    def sum(self) -> Tensor:
        """The gradient (H, rows, columns)."""
        return self.partial.sum(0)
