"""Regions: a feature map cut into a grid of equal rectangles, the unit that routing works on."""

import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # (rows, columns)


def as_grid(grid: int | Grid, name: str = "region_grid") -> Grid:
    """Rows and columns of a grid; one number stands for both.

    Raises:
        ValueError: If `grid`, which the message calls `name`, is not one or two positive integers.
    """
    pair = tuple(grid) if isinstance(grid, list | tuple) else (grid, grid)
    if len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
        raise ValueError(f"{name}={grid!r} is not a positive integer or a pair (rows, columns) of them")
    return pair


def pad_to_grid(x: Tensor, grid: Grid) -> Tensor:
    """Zero-pad a map below and on the right until `grid` divides it.

    Args:
        x: Feature map (B, H, W, C).
        grid: Rows and columns of regions.

    Returns:
        The map (B, H', W', C) with H' and W' the next multiples of the grid; `x` itself where it already fits.
    """
    rows, cols = grid
    below, right = -x.shape[1] % rows, -x.shape[2] % cols
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


def partition(x: Tensor, grid: Grid) -> Tensor:
    """Cut a map (B, H, W, C) into regions (B, R, T, C), row by row, with R = rows * cols.

    Raises:
        ValueError: If `grid` does not divide the map; `pad_to_grid` makes it so.
    """
    rows, cols = grid
    _check_divides(grid, (x.shape[1], x.shape[2]))
    return x.unflatten(2, (cols, -1)).unflatten(1, (rows, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def merge(regions: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Lay regions (B, R, T, C) back into a map (B, H, W, C) of the given height and width; undoes `partition`.

    Raises:
        ValueError: If `regions` is not a `grid` of equal regions of a map of that size.
    """
    (rows, cols), (height, width) = grid, size
    _check_divides(grid, size)
    if regions.shape[1] != rows * cols or regions.shape[1] * regions.shape[2] != height * width:
        raise ValueError(
            f"{regions.shape[1]} regions of {regions.shape[2]} tokens are not a {rows}x{cols} grid over a {height}x{width} map"
        )
    tiles = regions.unflatten(2, (height // rows, width // cols)).unflatten(1, (rows, cols))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def region_means(x: Tensor, grid: Grid) -> Tensor:
    """Mean token (B, R, C) of every region of a map (B, H, W, C) that `grid` divides.

    Pooling is an order of magnitude faster than a mean over permuted axes.

    Raises:
        ValueError: If `grid` does not divide the map.
    """
    _check_divides(grid, (x.shape[1], x.shape[2]))
    window = (x.shape[1] // grid[0], x.shape[2] // grid[1])
    return F.avg_pool2d(x.permute(0, 3, 1, 2), window).flatten(2).transpose(1, 2)


def _check_divides(grid: Grid, size: tuple[int, int]) -> None:
    (rows, cols), (height, width) = grid, size
    if height % rows or width % cols:
        raise ValueError(f"a {height}x{width} map has no {rows}x{cols} grid of equal regions: pad_to_grid(x, {grid}) first")
