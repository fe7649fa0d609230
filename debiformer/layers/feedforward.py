"""The convolutional feed-forward of DeBiFormer."""

import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise import ResidualDepthwiseConv2d


class ConvFeedForward(nn.Module):
    """Expand, add a depthwise 3x3 convolution, GELU, contract. (B, H, W, C) -> the same.

    Args:
        dim: Channels C.
        ratio: Hidden width as a multiple of `dim`, B_r of the paper (D_r for the agents).

    Raises:
        ValueError: If `ratio` is not above 0.
    """

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        if not ratio > 0:
            raise ValueError(f"mlp ratio={ratio} is not above 0")
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.depthwise = ResidualDepthwiseConv2d(hidden, kernel_size=3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.depthwise(self.fc1(x))))
