"""Tables of position biases: one entry for each displacement."""

import torch
from torch import nn

from ..ops.regions import Grid


def bias_table(num_heads: int, size: Grid, std: float) -> nn.Parameter:
    """A table (heads, 2 * rows - 1, 2 * cols - 1) for a map of rows and columns, from a truncated normal of this deviation."""
    rows, cols = size
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, 2 * rows - 1, 2 * cols - 1), std=std))
