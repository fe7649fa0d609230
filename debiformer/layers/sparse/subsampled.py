"""A coarse map for keys (spatially separable attention: Twins-SVT, Chu et al., NeurIPS 2021)."""

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ...ops.dense_attention import dense_attention
from ..region_routing import check_heads, check_positive
from .heads import tokens_in_heads


@register_notrace_module
class SubsampledAttention(nn.Module):
    """Every pixel attends to a summary of every cell of `stride` x `stride` pixels, a strided convolution's (B, H, W, C) -> the same.

    The global sub-sampled attention of Twins-SVT (section 3.2), in turns with `WindowAttention` spatially separable attention. Cells that
    the border cuts off are filled up with zeros, where Twins leaves them out.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`.
        stride: Height and width of a cell; 1 is full attention.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, num_heads: int, stride: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_positive(stride=stride)
        self.num_heads, self.stride = num_heads, stride
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.summary = nn.Conv2d(dim, dim, stride, stride) if stride > 1 else None
        self.norm = nn.LayerNorm(dim) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        cells = x
        if self.summary is not None and self.norm is not None:
            below, right = -x.shape[1] % self.stride, -x.shape[2] % self.stride
            cells = self.norm(self.summary(F.pad(x, (0, 0, 0, right, 0, below)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        q = tokens_in_heads(self.query(x).flatten(1, 2), self.num_heads)
        k, v = (tokens_in_heads(part, self.num_heads) for part in self.key_value(cells.flatten(1, 2)).chunk(2, dim=-1))
        return self.proj(dense_attention(q, k, v).transpose(1, 2).flatten(2)).view_as(x)
