"""Criss-cross attention: every pixel to its row and its column at once."""

from functools import partial

import torch
from torch import Tensor

from .chunks import over_chunks
from .observation import report


def criss_cross_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention of every pixel to those of its row and of its column, in one softmax; itself counts once (CCNet, eqs. 1-2).

    Args:
        q: Query map (B, H, W, C).
        k: Key map, likewise.
        v: Value map (B, H, W, C'); C' = C in every model.
        num_heads: Attention heads; must divide C and C'.

    Returns:
        (B, H, W, C').
    """
    report("criss_cross_attention", q=q, k=k, v=v, num_heads=num_heads)
    batch, height, width, dim = q.shape
    # (B, heads, H, W, D), and (B, heads, W, H, D) for what runs along columns; in memory so, or every chunk would copy all of them.
    queries, keys, values = (x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).permute(0, 3, 1, 2, 4).contiguous() for x in (q, k, v))
    keys_down, values_down = keys.transpose(2, 3).contiguous(), values.transpose(2, 3).contiguous()
    queries = queries * (dim // num_heads) ** -0.5

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
    elements = 2 * num_heads * width * (width + height)
    return over_chunks(
        lambda images: over_chunks(partial(attend, images), height, elements * (images.stop - images.start), 1, q, k, v),
        batch,
        elements * height,
        0,
        *(q, k, v),
    )
