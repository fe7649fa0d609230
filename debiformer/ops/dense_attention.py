"""Attention of every query to every key."""

import torch.nn.functional as F
from torch import Tensor

from .chunks import settled
from .observation import report


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(D ** -0.5 q k^T) v, with queries (B, H, N, D), keys (B, H, M, D) and values (B, H, M, E); returns (B, H, N, E)."""
    report("dense_attention", q=q, k=k, v=v)
    return softmax_attention(q, k, v)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's own attention, each of whose kernels gives another layout."""
    return settled(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale))
