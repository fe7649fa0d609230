"""Convolutional position encoding."""

from torch import Tensor

from .depthwise import DepthwiseConv2d


class PositionalConvolution(DepthwiseConv2d):
    """A depthwise 3x3 convolution added to its input: zero padding at the border tells a token where it is. (B, H, W, C) -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)
