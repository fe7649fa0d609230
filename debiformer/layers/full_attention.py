"""Full attention with local context enhancement: the last stage of BiFormer."""

import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise import DepthwiseConv2d
from .region_routing import check_positive


class FullAttention(nn.Module):
    """Every token attends to every token; a depthwise convolution of the input is added. (B, H, W, C) -> the same.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`. The published models use 8 at every width.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int = 8) -> None:
        super().__init__()
        check_positive(dim=dim, num_heads=num_heads)
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.local_context = DepthwiseConv2d(dim, kernel_size=5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # Scaled by the head width, unlike the routed layers.
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, x.shape[-1] // self.num_heads)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).view_as(x)
        return self.proj(out + self.local_context(x))
