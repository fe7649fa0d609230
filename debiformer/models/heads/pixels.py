"""Where a head for dense tasks ends: maps at one size, and a class for every pixel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, H, W) at another size, bilinearly, without aligned corners."""
    return x if x.shape[2:] == torch.Size(size) else F.interpolate(x, size=tuple(size), mode="bilinear")


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
