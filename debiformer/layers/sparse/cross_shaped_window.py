"""Stripes across and down at once (cross-shaped windows: CSWin, Dong et al., CVPR 2022)."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ...ops.regions import Grid
from ...ops.windows import cut_windows, lay_windows, window_attention
from ..region_routing import check_positive
from .heads import HeadedAttention


@register_notrace_module
class CrossShapedWindowAttention(HeadedAttention):
    """Half of the heads attend inside stripes across the map, the others inside stripes down it. (B, H, W, C) -> the same.

    After CSWin, eqs. 2-6. A depthwise 3x3 convolution of the values, which ends at the borders of a stripe, is added (LePE, eq. 9).

    Args:
        dim: Channels C.
        num_heads: Attention heads of both directions, an even number; must divide `dim`.
        stripe_width: Pixels; None for one stripe that is the whole map, and all heads alike, as in CSWin's last stage.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, num_heads: int, stripe_width: int | None) -> None:
        super().__init__(dim, num_heads)
        if stripe_width is not None:
            check_positive(stripe_width=stripe_width)
            if num_heads % 2:
                raise ValueError(f"num_heads={num_heads} is odd: half of the heads attend across, and half down")
        self.stripe_width = stripe_width
        directions = 1 if stripe_width is None else 2
        self.local_context = nn.ModuleList(
            nn.Conv2d(dim // directions, dim // directions, 3, padding=1, groups=dim // directions) for _ in range(directions)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        height, width = q.shape[1:3]
        stripe = self.stripe_width
        windows: list[Grid] = [(height, width)] if stripe is None else [(stripe, width), (height, stripe)]
        q, k, v = (x.unflatten(-1, (len(windows), x.shape[-1] // len(windows))) for x in (q, k, v))
        heads = self.num_heads // len(windows)
        directions = []
        for i, (window, convolution) in enumerate(zip(windows, self.local_context, strict=True)):
            attended = window_attention(q[..., i, :], k[..., i, :], v[..., i, :], window, heads)
            directions.append(attended + _convolved(v[..., i, :], convolution, window))
        return torch.cat(directions, dim=-1)


def _convolved(x: Tensor, convolution: nn.Module, window: Grid) -> Tensor:
    """A convolution inside each window of a map (B, H, W, C)."""
    windows = cut_windows(x, window)
    out = convolution(windows.flatten(0, 1).unflatten(1, window).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return lay_windows(out.flatten(1, 2).unflatten(0, windows.shape[:2]), window, (x.shape[1], x.shape[2]))
