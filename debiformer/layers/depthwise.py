"""Depthwise convolutions on channels-last maps."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops.chunks import is_compiling


class DepthwiseConv2d(nn.Conv2d):
    """One odd-sized filter per channel, on maps (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C)."""

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(dim, dim, kernel_size, stride, padding=kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # A channels-last map is an NCHW tensor in channels_last memory format: both permutes are views.
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module  # a leaf for torchvision's feature extraction, whose tracer knows no precision
class ResidualDepthwiseConv2d(DepthwiseConv2d):
    """x + depthwise(x), in one pass over the map: the filters' centres carry the identity. (B, H, W, C) -> the same."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        if is_compiling():
            return x + super().forward(x)  # the compiler joins the addition with what follows
        if x.device.type != "cpu" or x.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu"):
            return x + super().forward(x)  # half precision and TF32 would lose the filters' digits beside the ones
        centre = self.kernel_size[0] // 2
        one = torch.ones(1, 1, 1, 1, dtype=self.weight.dtype, device=self.weight.device)  # Core ML's converter knows no new_ones
        weight = self.weight + F.pad(one, (centre,) * 4)
        return self._conv_forward(x.permute(0, 3, 1, 2), weight, self.bias).permute(0, 2, 3, 1)
