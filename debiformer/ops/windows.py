"""A map cut into windows of a fixed size, or by a grid that spans all of it, and the attention inside."""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .grouped_attention import grouped_attention
from .observation import report
from .regions import Grid, crop, merge, pad_to_grid, padded_size, partition, region_size

UNSHIFTED = (0, 0)


def cut_windows(x: Tensor, window: Grid, shift: Grid = UNSHIFTED) -> Tensor:
    """Windows (B, N, T, C) of a map (B, H, W, C), row by row, with zeros where they reach beyond it.

    Args:
        x: Map of any height and width.
        window: Height and width of a window, with T pixels.
        shift: Row and column that the first whole window begins at. What lies before it shares windows with what is left at the end.
    """
    x = pad_to_grid(x, window)  # to a multiple of windows, rather than of regions
    return partition(x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x, _windows_of(window, (x.shape[1], x.shape[2])))


def lay_windows(windows: Tensor, window: Grid, size: tuple[int, int], shift: Grid = UNSHIFTED) -> Tensor:
    """Lay windows (B, N, T, C) back into a map (B, H, W, C) of the given height and width; undoes `cut_windows`."""
    padded = padded_size(window, size)
    x = merge(windows, _windows_of(window, padded), padded)
    return crop(x.roll(shift, (1, 2)) if any(shift) else x, *size)


def _windows_of(window: Grid, padded: tuple[int, int]) -> Grid:
    """Rows and columns of windows over a padded map."""
    return padded[0] // window[0], padded[1] // window[1]


def _divides(parts: Grid, size: tuple[int, int]) -> bool:
    """Whether a window, or a grid, is known to divide a map; a graph for every size does not know."""
    return all(statically_known_true(n % part == 0) for n, part in zip(size, parts, strict=True))


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: Grid, num_heads: int, *, shift: Grid = UNSHIFTED, bias: Tensor | None = None
) -> Tensor:
    """Attention inside the windows of a map; the border cuts windows off, and nothing beyond it takes part.

    Args:
        q: Query map (B, H, W, C), of any height and width.
        k: Key map, likewise.
        v: Value map (B, H, W, C'); C' = C in every model.
        window: Height and width of a window.
        num_heads: Attention heads; must divide C and C'.
        shift: Row and column that the first whole window begins at, from 0 to below the window's size; before it lie cut ones.
        bias: Added to the scores, (heads, T, T) with T = height * width of the window.

    Returns:
        (B, H, W, C').

    Raises:
        ValueError: If the heads do not divide the channels, or the shift is out of range.
    """
    if q.shape[3] % num_heads or not all(0 <= first < extent for first, extent in zip(shift, window, strict=True)):
        raise ValueError(f"num_heads={num_heads} must divide the {q.shape[3]} channels, and shift={shift} lie in the window {window}")
    report("window_attention", q=q, k=k, v=v, window=window, num_heads=num_heads, shift=shift, bias=bias)
    size = q.shape[1], q.shape[2]
    labels = None
    if any(shift) or not _divides(window, size):  # cut windows share one with others, or with what is no pixel
        labels = cut_windows(_sides(size, shift, q.device), window, shift)[0, :, :, 0]
    q, k, v = (cut_windows(x, window, shift) for x in (q, k, v))
    return lay_windows(grouped_attention(q, k, v, num_heads, bias=bias, labels=labels), window, size, shift)


def _sides(size: tuple[int, int], shift: Grid, device: torch.device) -> Tensor:
    """Labels (1, H, W, 1) from 1 to 4: the pixels before and after the shift along either axis. 0 is left for what is no pixel."""
    below, right = ((torch.arange(n, device=device) >= first).long() for n, first in zip(size, shift, strict=True))
    return (1 + 2 * below.unsqueeze(1) + right).view(1, *size, 1)


def grid_attention(q: Tensor, k: Tensor, v: Tensor, grid: Grid, num_heads: int, *, bias: Tensor | None = None) -> Tensor:
    """Attention between the pixels at the same place of every cell, where a grid cuts a map into cells (MaxViT, section 3.2).

    Args:
        q: Query map (B, H, W, C), of any height and width; the border cuts the last cells off.
        k: Key map, likewise.
        v: Value map (B, H, W, C'); C' = C in every model.
        grid: Rows and columns of cells.
        num_heads: Attention heads; must divide C and C'.
        bias: Added to the scores, (heads, T, T) with T = rows * columns of the grid.

    Returns:
        (B, H, W, C').

    Raises:
        ValueError: If the heads do not divide the channels.
    """
    if q.shape[3] % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the {q.shape[3]} channels")
    report("grid_attention", q=q, k=k, v=v, grid=grid, num_heads=num_heads, bias=bias)
    size = q.shape[1], q.shape[2]
    cell = region_size(grid, padded_size(grid, size))

    def cut(x: Tensor) -> Tensor:
        x = pad_to_grid(x, grid).unflatten(2, (grid[1], cell[1])).unflatten(1, (grid[0], cell[0]))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)  # (B, places in a cell, cells, C)

    labels = None if _divides(grid, size) else cut(torch.ones(1, *size, 1, device=q.device))[0, :, :, 0]
    out = grouped_attention(cut(q), cut(k), cut(v), num_heads, bias=bias, labels=labels)
    x = out.unflatten(2, grid).unflatten(1, cell).permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)
    return crop(x, *size)
