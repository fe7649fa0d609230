"""Where a head for dense tasks ends: maps at one size, and a class for every pixel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, H, W) at another size, bilinearly, without aligned corners."""
    return x if x.shape[2:] == torch.Size(size) else F.interpolate(x, size=tuple(size), mode="bilinear")


class AveragePool(nn.Module):
    """A map (B, C, H, W) in `size` x `size` averages: `AdaptiveAvgPool2d`, which exported graphs have for one H and W only."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return F.adaptive_avg_pool2d(x, self.size)
        rows, columns = (self.shares(n, x) for n in x.shape[2:])
        return rows @ x @ columns.T

    def shares(self, length: int, x: Tensor) -> Tensor:
        """What each of `length` pixels adds to each average, (size, length); neighbours share a pixel where `size` does not divide."""
        first = torch.arange(self.size, device=x.device) * length
        pixel = torch.arange(length, device=x.device)
        start, end = first // self.size, (first + length + self.size - 1) // self.size
        inside = (pixel >= start[:, None]) & (pixel < end[:, None])
        return inside.to(x.dtype) / (end - start)[:, None].to(x.dtype)


class PixelClassifier(nn.Conv2d):
    """A map (B, C, H, W) to logits (B, num_classes, H, W): a 1x1 convolution behind dropout of whole channels.

    Args:
        channels: Channels of the map.
        num_classes: Classes.
        dropout: Probability that a channel is dropped.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(channels, num_classes, 1)
        self.dropout = dropout

    def reset_parameters(self) -> None:
        """Small weights: no class is likelier than another at the start."""
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]  # there is one

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout2d(x, self.dropout, self.training))
