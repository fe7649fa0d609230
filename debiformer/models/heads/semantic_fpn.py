"""Semantic FPN: the semantic branch of Panoptic Feature Pyramid Networks (Kirillov et al., CVPR 2019, section 3), as both papers use it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork


class SemanticFPNHead(nn.Module):
    """Maps (B, C_i, H / 2**i, W / 2**i), the finest first -> logits (B, num_classes, H, W).

    A feature pyramid; on each of its levels as many 3x3 convolutions with batch norm and ReLU as it takes doublings to reach the finest
    one; their sum; a 1x1 convolution. What is enlarged is enlarged bilinearly, without aligned corners.

    Args:
        in_channels: Channels of the maps.
        num_classes: Classes.
        pyramid_channels: Channels of the pyramid.
        channels: Channels of the branches and of their sum.
        dropout: Probability that a channel is dropped before the last convolution.
    """

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, pyramid_channels: int = 256, channels: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(list(in_channels), pyramid_channels)
        self.branches = nn.ModuleList(
            nn.ModuleList(Conv2dNormActivation(pyramid_channels if i == 0 else channels, channels, 3) for i in range(max(level, 1)))
            for level in range(len(in_channels))
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = list(self.pyramid({str(index): x for index, x in enumerate(maps)}).values())
        total = torch.zeros((), device=maps[0].device)
        for level, (x, branch) in enumerate(zip(levels, self.branches, strict=True)):
            for convolution in branch:
                x = convolution(x)
                if level > 0:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear")
            total = total + enlarge(x, levels[0].shape[2:])  # levels of odd sizes do not double exactly
        return self.classifier(self.dropout(total))


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, H, W) at another size, bilinearly, without aligned corners."""
    return x if x.shape[2:] == torch.Size(size) else F.interpolate(x, size=tuple(size), mode="bilinear")
