"""Regions: a feature map cut into a grid of equal rectangles, the unit that routing works on."""

from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

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
    # A compiled or exported graph pads whatever the size, so that it serves every size.
    if torch.compiler.is_compiling() or below or right:
        return F.pad(x, (0, 0, 0, right, 0, below))
    return x


def partition(x: Tensor, grid: Grid) -> Tensor:
    """Cut a map (B, H, W, C) into regions (B, R, T, C), row by row, with R = rows * cols.

    Raises:
        ValueError: If `grid` does not divide the map; `pad_to_grid` makes it so.
    """
    (rows, cols), (h, w) = grid, region_size(grid, (x.shape[1], x.shape[2]))
    return x.unflatten(2, (cols, w)).unflatten(1, (rows, h)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


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
    tiles = regions.unflatten(2, (h, w)).unflatten(1, (rows, cols))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def region_size(grid: Grid, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the regions of a map.

    Raises:
        ValueError: If `grid` does not divide the map.
    """
    (rows, cols), (height, width) = grid, size
    if height % rows or width % cols:
        raise ValueError(f"a {height}x{width} map has no {rows}x{cols} grid of equal regions: pad_to_grid(x, {grid}) first")
    return height // rows, width // cols
