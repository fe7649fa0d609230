"""The grid of block-grid attention (MaxViT, Tu et al., ECCV 2022)."""

from timm.layers import register_notrace_module
from torch import Tensor

from ...ops.grouped_attention import relative_position_bias
from ...ops.windows import grid_attention
from ..bias_table import bias_table
from ..region_routing import check_positive
from .heads import HeadedAttention


@register_notrace_module
class GridAttention(HeadedAttention):
    """Every pixel attends to those at its place in all cells of a grid over the map (MaxViT, section 3.2). (B, H, W, C) -> the same.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`.
        grid_size: Rows and columns of cells.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, num_heads: int, grid_size: int = 7) -> None:
        super().__init__(dim, num_heads)
        check_positive(grid_size=grid_size)
        self.grid_size = grid_size
        self.bias_table = bias_table(num_heads, (grid_size, grid_size), std=0.02)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = relative_position_bias(self.bias_table)
        return grid_attention(q, k, v, (self.grid_size, self.grid_size), self.num_heads, bias=bias)
