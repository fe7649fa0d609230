"""UPerNet (Xiao et al., ECCV 2018) with the pooling of PSPNet (Zhao et al., CVPR 2017), and the auxiliary head it is trained with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from .pixels import AveragePool, PixelClassifier, enlarge


class UPerNetHead(nn.Module):
    """Maps (B, C_i, H / 2**i, W / 2**i), the finest first -> logits (B, num_classes, H, W).

    Args:
        in_channels: Channels of the maps.
        num_classes: Classes.
        channels: Channels of the pyramid and of everything after it.
        pool_sizes: Grids that the coarsest map is averaged to.
        dropout: Probability that a channel is dropped before the last convolution.

    Raises:
        ValueError: In `forward`, if it trains on one image: batch norm learns nothing from a map that is averaged to one pixel.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_sizes: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        coarsest = in_channels[-1]
        self.averages = 1 in pool_sizes
        self.pools = nn.ModuleList(nn.Sequential(AveragePool(size), Conv2dNormActivation(coarsest, channels, 1)) for size in pool_sizes)
        self.bottleneck = Conv2dNormActivation(coarsest + len(pool_sizes) * channels, channels, 3)
        self.lateral = nn.ModuleList(Conv2dNormActivation(c, channels, 1) for c in in_channels[:-1])
        self.smooth = nn.ModuleList(Conv2dNormActivation(channels, channels, 3) for _ in in_channels[:-1])
        self.fuse = Conv2dNormActivation(len(in_channels) * channels, channels, 3)
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        top = maps[-1]
        if self.training and len(top) == 1 and self.averages and not any(isinstance(module, nn.SyncBatchNorm) for module in self.modules()):
            raise ValueError("batch_size=1: UPerNet's batch norms train on two images or more, as one of its maps is averaged to one pixel")
        pooled = [enlarge(pool(top), top.shape[2:]) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], dim=1)))
        for finer in range(len(levels) - 2, -1, -1):
            levels[finer] = levels[finer] + enlarge(levels[finer + 1], levels[finer].shape[2:])
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)] + [levels[-1]]
        fused = self.fuse(torch.cat([enlarge(x, smoothed[0].shape[2:]) for x in smoothed], dim=1))
        return self.classifier(fused)


class FCNHead(nn.Module):
    """One map (B, C, H, W) -> logits (B, num_classes, H, W): a 3x3 convolution and a 1x1, for a second loss on a stage before the last.

    Args:
        in_channels: Channels of the map.
        num_classes: Classes.
        channels: Channels between the two convolutions.
        dropout: Probability that a channel is dropped before the second.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.convolution = Conv2dNormActivation(in_channels, channels, 3)
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.convolution(x))
