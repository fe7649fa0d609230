"""Attention inside groups of pixels: what windows, stripes, lines and grids of a map have in common."""

import torch
from torch import Tensor

from .chunks import over_chunks
from .dense_attention import softmax_attention


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, *, bias: Tensor | None = None, labels: Tensor | None = None
) -> Tensor:
    """Attention of every token to those of its group that have its label: softmax(D ** -0.5 q k^T + bias) v.

    Args:
        q: Queries (B, N, T, C): N groups of T tokens.
        k: Keys, likewise.
        v: Values (B, N, T, C').
        num_heads: Attention heads, each D = C / num_heads wide; must divide C and C'.
        bias: Added to the scores of every group, (heads, T, T).
        labels: Of the tokens, (N, T); tokens of different labels do not see each other, as what is in the map and what fills up a group.

    Returns:
        (B, N, T, C').
    """
    batch, groups, tokens, _ = q.shape
    queries, keys, values = (x.flatten(0, 1).unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2) for x in (q, k, v))

    def attend(rows: slice) -> Tensor:
        mask = None if bias is None else bias.unsqueeze(0).to(q.dtype)
        if labels is not None:
            labels_of_rows = labels[torch.arange(rows.start, rows.stop, device=labels.device) % groups]
            apart = (labels_of_rows.unsqueeze(1) != labels_of_rows.unsqueeze(2)).unsqueeze(1)
            # In four dimensions, which the fused kernels take.
            mask = (q.new_zeros(1, 1, 1, 1) if mask is None else mask).masked_fill(apart, float("-inf"))
        return softmax_attention(queries[rows], keys[rows], values[rows], mask).transpose(1, 2).flatten(2)

    if bias is None and labels is None:  # fused kernels keep no weights, so that nothing grows with T * T
        return attend(slice(0, batch * groups)).unflatten(0, (batch, groups))
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    return over_chunks(attend, batch * groups, num_heads * tokens * tokens, 0, *inputs).unflatten(0, (batch, groups))


def relative_position_bias(bias_table: Tensor) -> Tensor:
    """Biases (heads, T, T) of a window of h x w = T tokens from a table (heads, 2h - 1, 2w - 1) of one for each displacement.

    The bias of query i and key j is the table's at position(i) - position(j), as in Swin (eq. 4).
    """
    rows, cols = ((n + 1) // 2 for n in bias_table.shape[1:])
    y, x = (torch.arange(n, device=bias_table.device) for n in (rows, cols))
    y, x = y.view(-1, 1).expand(rows, cols).flatten(), x.expand(rows, cols).flatten()
    return bias_table[:, y[:, None] - y + rows - 1, x[:, None] - x + cols - 1]
