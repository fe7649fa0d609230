"""What the mechanisms share: heads, and the projections before and after."""

from torch import Tensor, nn

from ..region_routing import check_heads, project_in_parts


class HeadedAttention(nn.Module):
    """Project every pixel to query, key and value, `attend`, and project. (B, H, W, C) -> the same, for any height and width.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out = self.attend(*project_in_parts(self.qkv, x, 3))
        return self.proj(out.flatten(1, 2)).view_as(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Query, key and value maps (B, H, W, C) -> (B, H, W, C)."""
        raise NotImplementedError


def tokens_in_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)
