"""Regions: a feature map cut into a grid of equal rectangles, the unit that routing works on."""

from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .chunks import is_compiling, settled

Grid = tuple[int, int]  # (rows, columns)


def as_grid(grid: int | Grid, name: str = "region_grid") -> Grid:
    """Rows and columns of a grid; one number stands for both.

    Raises:
        ValueError: If `grid`, which the message calls `name`, is not one or two positive integers.
    """
    pair = tuple(grid) if isinstance(grid, list | tuple) else (grid, grid)
    if len(pair) != 2 or not all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in pair):
        raise ValueError(f"{name}={grid!r} is not a positive integer or a pair (rows, columns) of them")
    return int(pair[0]), int(pair[1])


def padded_size(grid: Grid, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a map after `pad_to_grid`."""
    (rows, cols), (height, width) = grid, size
    return (height + rows - 1) // rows * rows, (width + cols - 1) // cols * cols


def pad_to_grid(x: Tensor, grid: Grid) -> Tensor:
    """Zero-pad a map below and on the right until `grid` divides it.

    Args:
        x: Feature map (B, H, W, C).
        grid: Rows and columns of regions.

    Returns:
        The map (B, H', W', C) with H' and W' the next multiples of the grid; `x` itself where it already fits.
    """
    height, width = padded_size(grid, (x.shape[1], x.shape[2]))
    below, right = height - x.shape[1], width - x.shape[2]
    if statically_known_true(below == 0) and statically_known_true(right == 0):
        return x
    # A graph for every size pads each of them, if by nothing, which alone would leave the strides as they are.
    return F.pad(x.contiguous() if is_compiling() else x, (0, 0, 0, right, 0, below))


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left `height` x `width` of a map (B, H, W, C); undoes `pad_to_grid`."""
    below, right = x.shape[1] - height, x.shape[2] - width
    if is_compiling() and not (statically_known_true(below == 0) and statically_known_true(right == 0)):
        # A slice is contiguous or not: a graph with it would not serve every size.
        return F.pad(x.contiguous(), (0, 0, 0, -right, 0, -below))
    return settled(x.narrow(1, 0, height).narrow(2, 0, width))  # a slice would ask whether the map is that large


def partition(x: Tensor, grid: Grid) -> Tensor:
    """Cut a map (B, H, W, C) into regions (B, R, T, C), row by row, with R = rows * cols.

    Raises:
        ValueError: If `grid` does not divide the map; `pad_to_grid` makes it so.
    """
    (rows, cols), (h, w) = grid, region_size(grid, (x.shape[1], x.shape[2]))
    if is_compiling():
        return _opaque_partition(x, rows, cols)
    return _swapped(x.unflatten(2, (cols, w)).unflatten(1, (rows, h)))


def merge(regions: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Lay regions (B, R, T, C) back into a map (B, H, W, C) of the given height and width; undoes `partition`.

    Raises:
        ValueError: If `regions` is not a `grid` of equal regions of a map of that size.
    """
    (rows, cols), (h, w) = grid, region_size(grid, size)
    if regions.shape[1] != rows * cols or regions.shape[2] != h * w:
        raise ValueError(
            f"{regions.shape[1]} regions of {regions.shape[2]} tokens are not a {rows}x{cols} grid over a {size[0]}x{size[1]} map"
        )
    if is_compiling():
        return _opaque_merge(regions, rows, cols, *size)
    return _swapped(regions.unflatten(2, (h, w)).unflatten(1, (rows, cols)))


def _swapped(tiles: Tensor) -> Tensor:
    """(B, i, j, k, m, C) -> (B, i * k, j * m, C)."""
    return settled(tiles.transpose(2, 3)).flatten(3, 4).flatten(1, 2)


def _unshared(output: Tensor, given: Tensor) -> Tensor:
    """Contiguous, and a copy where it is a view: an opaque operation must not return its input's memory."""
    return output.clone(memory_format=torch.contiguous_format) if output.data_ptr() == given.data_ptr() else output.contiguous()


# Cutting and merging stay whole in compiled graphs: the symbolic shapes of views and copies take a compiler minutes and a graph per size.
@torch.library.custom_op("debiformer::partition", mutates_args=())
def _opaque_partition(x: Tensor, rows: int, cols: int) -> Tensor:
    return _unshared(partition(x, (rows, cols)), x)


@torch.library.custom_op("debiformer::merge", mutates_args=())
def _opaque_merge(regions: Tensor, rows: int, cols: int, height: int, width: int) -> Tensor:
    return _unshared(merge(regions, (rows, cols), (height, width)), regions)


@_opaque_partition.register_fake
def _(x: Tensor, rows: int, cols: int) -> Tensor:
    return x.new_empty(x.shape[0], rows * cols, (x.shape[1] // rows) * (x.shape[2] // cols), x.shape[3])


@_opaque_merge.register_fake
def _(regions: Tensor, rows: int, cols: int, height: int, width: int) -> Tensor:
    return regions.new_empty(regions.shape[0], height, width, regions.shape[3])


def _keep_sizes(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.grid, ctx.size = tuple(inputs[1:3]), tuple(inputs[0].shape[1:3])


_opaque_partition.register_autograd(lambda ctx, gradient: (merge(gradient, ctx.grid, ctx.size), None, None), setup_context=_keep_sizes)
_opaque_merge.register_autograd(lambda ctx, gradient: (partition(gradient, ctx.grid), None, None, None, None), setup_context=_keep_sizes)


def region_size(grid: Grid, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the regions of a map.

    Raises:
        ValueError: If `grid` does not divide the map.
    """
    (rows, cols), (height, width) = grid, size
    if height % rows or width % cols:
        raise ValueError(f"a {height}x{width} map has no {rows}x{cols} grid of equal regions: pad_to_grid(x, {grid}) first")
    return height // rows, width // cols
