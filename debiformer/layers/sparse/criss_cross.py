"""Row and column at once (criss-cross attention: CCNet, Huang et al., ICCV 2019)."""

from functools import partial

import torch
from timm.layers import register_notrace_module
from torch import Tensor

from ...ops.chunks import over_chunks
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
        batch, height, width, dim = q.shape
        # (B, heads, H, W, D), and (B, heads, W, H, D) for what runs along columns; in memory so, or every chunk would copy all of them.
        queries, keys, values = (
            x.unflatten(-1, (self.num_heads, dim // self.num_heads)).permute(0, 3, 1, 2, 4).contiguous() for x in (q, k, v)
        )
        keys_down, values_down = keys.transpose(2, 3).contiguous(), values.transpose(2, 3).contiguous()
        queries = queries * (dim // self.num_heads) ** -0.5

        # Two products and a softmax over both, as no fused kernel takes two sets of keys.
        def attend(images: slice, rows: slice) -> Tensor:
            here = queries[images, :, rows]
            across = here @ keys[images, :, rows].transpose(3, 4)
            down = (here.transpose(2, 3) @ keys_down[images].transpose(3, 4)).transpose(2, 3)
            own = torch.arange(rows.start, rows.stop, device=q.device).view(-1, 1, 1) == torch.arange(height, device=q.device)
            weights = torch.cat([across, down.masked_fill(own, float("-inf"))], dim=-1).softmax(dim=-1)
            across, down = weights.split([width, height], dim=-1)
            out = across @ values[images, :, rows] + (down.transpose(2, 3) @ values_down[images]).transpose(2, 3)
            return out.permute(0, 2, 3, 1, 4).flatten(3)

        # A few images at a time, and of large ones a few rows: the gradient of columns is as large as the map in every chunk.
        elements = 2 * self.num_heads * width * (width + height)
        return over_chunks(
            lambda images: over_chunks(partial(attend, images), height, elements * (images.stop - images.start), 1, q, k, v),
            batch,
            elements * height,
            0,
            *(q, k, v),
        )
