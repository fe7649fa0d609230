"""Patch embedding and downsampling between stages; all on maps (B, C, H, W)."""

from torch import nn


class ConvStem(nn.Sequential):
    """Two overlapping 3x3 convolutions to stride 4. (B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
        )


class ConvDownsample(nn.Sequential):
    """An overlapping 3x3 convolution to half the size. (B, in_dim, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(nn.Conv2d(in_dim, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim))


class PatchEmbedding(nn.Sequential):
    """Non-overlapping 4x4 patches, as in Swin. (B, in_chans, H, W) -> (B, dim, H // 4, W // 4)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(nn.Conv2d(in_chans, dim, 4, stride=4), nn.BatchNorm2d(dim))


class PatchMerging(nn.Sequential):
    """Non-overlapping 2x2 patches. (B, in_dim, H, W) -> (B, dim, H // 2, W // 2)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(nn.BatchNorm2d(in_dim), nn.Conv2d(in_dim, dim, 2, stride=2))
