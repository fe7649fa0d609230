"""Full attention with local context enhancement: the last stage of BiFormer."""

from torch import Tensor, nn

from ..ops.dense_attention import dense_attention
from .depthwise import DepthwiseConv2d
from .region_routing import check_heads


class FullAttention(nn.Module):
    """Every token attends to every token; a depthwise convolution is added. (B, H, W, C) -> the same.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`. The published models use 8 at every width.
        value_context: Convolve the values, as the second published form of BiFormer-STL does, rather than the input. The convolution goes
            by another name then, so that no checkpoint of one form passes for the other's.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int = 8, value_context: bool = False) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.local_context = None if value_context else DepthwiseConv2d(dim, kernel_size=5)
        self.value_context = DepthwiseConv2d(dim, kernel_size=5) if value_context else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        context = self.local_context(x) if self.local_context is not None else self.value_context(qkv.chunk(3, dim=-1)[2])  # type: ignore[misc]
        # Scaled by the head width, unlike the routed layers.
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, x.shape[-1] // self.num_heads)).permute(2, 0, 3, 1, 4)
        out = dense_attention(q, k, v).transpose(1, 2).flatten(2).view_as(x)
        return self.proj(out + context)
