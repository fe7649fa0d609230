"""Patch embedding and downsampling between stages; all on maps (B, C, H, W)."""

from copy import deepcopy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ConvNorm(nn.Sequential):
    """Convolutions and batch norms in a row, which become convolutions alone for inference."""

    def reparameterize(self) -> None:
        """Fold every batch norm into the convolution beside it, exactly; `timm.models.reparameterize_model` calls this.

        Raises:
            RuntimeError: In training mode, where the norms depend on the batch.
        """
        if self.training:
            raise RuntimeError("batch norms fold into convolutions in eval mode only: call model.eval() first")
        for i, (first, second) in enumerate(pairwise(list(self))):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                self[i], self[i + 1] = fuse_conv_bn_eval(first, second), nn.Identity()
            elif isinstance(first, nn.BatchNorm2d) and isinstance(second, nn.Conv2d):
                self[i], self[i + 1] = nn.Identity(), fuse_bn_conv_eval(first, second)


@torch.no_grad()
def fuse_bn_conv_eval(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution without padding that does what `norm` and then `conv` do."""
    of_norm, fused = norm.state_dict(), deepcopy(conv)
    factor = of_norm["weight"] / (of_norm["running_var"] + norm.eps).sqrt()
    shift = of_norm["bias"] - of_norm["running_mean"] * factor
    of_conv = fused.state_dict()  # in the memory of the parameters
    of_conv["bias"].add_(torch.einsum("oihw,i->o", of_conv["weight"], shift))
    of_conv["weight"].mul_(factor[:, None, None])
    return fused


class ConvStem(ConvNorm):
    """Two overlapping 3x3 convolutions to stride 4. (B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
        )


class ConvDownsample(ConvNorm):
    """An overlapping 3x3 convolution to half the size. (B, in_dim, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(nn.Conv2d(in_dim, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim))


class PatchEmbedding(ConvNorm):
    """Non-overlapping 4x4 patches, as in Swin. (B, in_chans, H, W) -> (B, dim, H // 4, W // 4)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(nn.Conv2d(in_chans, dim, 4, stride=4), nn.BatchNorm2d(dim))


class PatchMerging(ConvNorm):
    """Non-overlapping 2x2 patches. (B, in_dim, H, W) -> (B, dim, H // 2, W // 2)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(nn.BatchNorm2d(in_dim), nn.Conv2d(in_dim, dim, 2, stride=2))
