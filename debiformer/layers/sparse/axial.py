"""Rows and columns in turns (Axial attention, Ho et al., 2019)."""

from timm.layers import register_notrace_module
from torch import Tensor

from ...ops.windows import window_attention
from .heads import HeadedAttention


@register_notrace_module
class AxialAttention(HeadedAttention):
    """Every pixel attends to those of its row, or of its column. (B, H, W, C) -> the same.

    Blocks of both in turns are sequential axial attention. It knows no places: shuffled columns give the shuffled result.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`.
        axis: "row" or "column".

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, num_heads: int, axis: str) -> None:
        super().__init__(dim, num_heads)
        if axis not in ("row", "column"):
            raise ValueError(f"axis={axis!r} is neither 'row' nor 'column'")
        self.axis = axis

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        height, width = q.shape[1:3]
        return window_attention(q, k, v, (1, width) if self.axis == "row" else (height, 1), self.num_heads)
