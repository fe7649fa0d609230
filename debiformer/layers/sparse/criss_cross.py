"""Row and column at once (criss-cross attention: CCNet, Huang et al., ICCV 2019)."""

from timm.layers import register_notrace_module
from torch import Tensor

from ...ops.criss_cross import criss_cross_attention
from .heads import HeadedAttention


@register_notrace_module
class CrissCrossAttention(HeadedAttention):
    """Every pixel attends to those of its row and of its column, in one softmax; itself counts once. (B, H, W, C) -> the same.

    CCNet's form (eqs. 1-2), whose name this is; what CrossFormer calls long-distance attention has another pattern, that of
    `GridAttention`. Heads and query width are those of the other mechanisms here, where CCNet has one head of an eighth of the channels. It
    knows no places, as `AxialAttention`.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return criss_cross_attention(q, k, v, self.num_heads)
