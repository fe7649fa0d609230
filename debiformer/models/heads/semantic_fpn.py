"""Semantic FPN: the semantic branch of Panoptic Feature Pyramid Networks (Kirillov et al., CVPR 2019, section 3), as both papers use it."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from .pixels import PixelClassifier, enlarge


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
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = list(self.pyramid({str(index): x for index, x in enumerate(maps)}).values())
        total: Tensor | int = 0
        for level, (x, branch) in enumerate(zip(levels, self.branches, strict=True)):
            for convolution in cast(nn.ModuleList, branch):
                x = convolution(x)
                if level > 0:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear")
            total = total + enlarge(x, levels[0].shape[2:])  # levels of odd sizes do not double exactly
        return self.classifier(total)
