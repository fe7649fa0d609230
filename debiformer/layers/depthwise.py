"""Depthwise convolution on channels-last maps."""

from torch import Tensor, nn


class DepthwiseConv2d(nn.Conv2d):
    """One odd-sized filter per channel, on maps (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C)."""

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(dim, dim, kernel_size, stride, padding=kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # A channels-last map is an NCHW tensor in channels_last memory format: both permutes are views.
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
