"""Learned points for keys (deformable attention: DAT, Xia et al., CVPR 2022)."""

from timm.layers import register_notrace_module
from torch import Tensor, nn

from ...ops.deformable import deformable_attention, sample_points
from ...ops.regions import Grid, as_grid
from ..bias_table import bias_table
from ..deformable_bi_level_routing import OffsetNetwork
from ..region_routing import check_heads
from .heads import tokens_in_heads


@register_notrace_module
class DeformableAttention(nn.Module):
    """Every pixel attends to the map at points that a small network moves, with a bias for the displacement. (B, H, W, C) -> the same.

    DAT's deformable attention (eqs. 1-8): softmax(D ** -0.5 q k(a)^T + B) v(a), where a is x sampled at the points. Points move along both
    axes, freely up to `max_offset` cells, as DAT bounds them.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`.
        point_stride: One point for every `point_stride` x `point_stride` pixels.
        offset_kernel_size: Odd size of the offset network's filter.
        offset_groups: Channel groups with points of their own; must divide `num_heads`.
        bias_grid: Rows and columns of the map at which the bias table holds one entry for each displacement.
        max_offset: In cells of points. DAT's offset range factor of 2 is 1 cell.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        point_stride: int = 1,
        offset_kernel_size: int = 5,
        offset_groups: int = 1,
        bias_grid: int | Grid = 14,
        max_offset: float = 1.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.offset_network = OffsetNetwork(dim, offset_kernel_size, point_stride, offset_groups, channels=2, max_offset=max_offset)
        if num_heads % offset_groups:
            raise ValueError(f"offset_groups={offset_groups} does not divide num_heads={num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.bias_table = bias_table(num_heads, as_grid(bias_grid, "bias_grid"), std=0.01)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        points = self.offset_network(q)
        sampled = sample_points(x, points).flatten(1, 2)
        k, v = (tokens_in_heads(part, self.num_heads) for part in self.key_value(sampled).chunk(2, dim=-1))
        out = deformable_attention(
            tokens_in_heads(q.flatten(1, 2), self.num_heads), k, v, points.flatten(2, 3), self.bias_table, (x.shape[1], x.shape[2])
        )
        return self.proj(out.transpose(1, 2).flatten(2)).view_as(x)
