"""Windows, shifted in every second block (Swin, Liu et al., ICCV 2021)."""

from timm.layers import register_notrace_module
from torch import Tensor

from ...ops.grouped_attention import relative_position_bias
from ...ops.windows import window_attention
from ..bias_table import bias_table
from ..region_routing import check_positive
from .heads import HeadedAttention


@register_notrace_module  # a leaf for torchvision's feature extraction, whose tracer cannot follow its shapes
class WindowAttention(HeadedAttention):
    """Every pixel attends to those of its window. (B, H, W, C) -> the same.

    In turns without and with `shift`, these are Swin's W-MSA and SW-MSA (section 3.2); MaxViT's block attention and, without the bias, the
    locally-grouped attention of Twins are the first of them.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`.
        window_size: Height and width of a window in pixels.
        shift: Pixels that the windows are moved by, to the right and down. An axis of the map that is no longer than a window has none.
        relative_bias: Whether scores have a bias for each displacement.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 7, shift: int = 0, relative_bias: bool = True) -> None:
        super().__init__(dim, num_heads)
        check_positive(window_size=window_size)
        if not 0 <= shift < window_size:
            raise ValueError(f"shift={shift} is not from 0 to below window_size={window_size}")
        self.window_size, self.shift = window_size, shift
        self.bias_table = bias_table(num_heads, (window_size, window_size), std=0.02) if relative_bias else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shift = tuple(self.shift if n > self.window_size else 0 for n in q.shape[1:3])
        bias = None if self.bias_table is None else relative_position_bias(self.bias_table)
        return window_attention(q, k, v, (self.window_size, self.window_size), self.num_heads, shift=(shift[0], shift[1]), bias=bias)
