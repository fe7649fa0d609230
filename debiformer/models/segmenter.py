"""A backbone with a head for semantic segmentation."""

from typing import Any, NamedTuple

import timm
from torch import Tensor, nn

from .heads import FCNHead, SemanticFPNHead, UPerNetHead
from .heads.semantic_fpn import enlarge

STRIDES = [4, 8, 16, 32]  # of the maps that the heads take
HEADS = ("semantic_fpn", "upernet")


class SegmenterOutput(NamedTuple):
    """Logits (B, num_classes, H, W) of the head, and in training those of the auxiliary head."""

    logits: Tensor
    auxiliary: Tensor | None


class Segmenter(nn.Module):
    """Images (B, 3, H, W) to logits of every pixel.

    UPerNet is trained with a second loss, on the third stage; Semantic FPN with its own alone.

    Args:
        backbone: Any pyramid of timm's: maps at strides 4, 8, 16 and 32.
        head: semantic_fpn or upernet.
        num_classes: Classes.
        pretrained: Whether the backbone begins with the weights that timm knows for it.
        backbone_args: Further arguments of the backbone's constructor.
        head_args: Further arguments of the head's constructor.

    Raises:
        ValueError: If there is no such head, or the backbone is no pyramid.
    """

    def __init__(
        self,
        backbone: str,
        head: str,
        num_classes: int,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        head_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head={head!r} is none of {', '.join(HEADS)}")
        self.backbone = create_pyramid(backbone, pretrained, **(backbone_args or {}))
        channels = self.backbone.feature_info.channels()
        make = SemanticFPNHead if head == "semantic_fpn" else UPerNetHead
        self.head = make(channels, num_classes, **(head_args or {}))
        self.auxiliary = FCNHead(channels[2], num_classes) if head == "upernet" else None

    def forward(self, images: Tensor) -> SegmenterOutput:
        """Images (B, 3, H, W) to logits of the same height and width."""
        maps = self.backbone(images)
        size = images.shape[2:]
        auxiliary = self.auxiliary(maps[2]) if self.auxiliary is not None and self.training else None
        return SegmenterOutput(enlarge(self.head(maps), size), None if auxiliary is None else enlarge(auxiliary, size))


def create_pyramid(name: str, pretrained: bool = False, **options: Any) -> Any:
    """A timm backbone that gives its maps at strides 4, 8, 16 and 32 as (B, C, H, W).

    Raises:
        ValueError: If it has no such maps.
    """
    backbone = timm.create_model(name, pretrained, features_only=True, feature_cls="getter", out_indices=(-4, -3, -2, -1), **options)
    strides = backbone.feature_info.reduction()
    if strides != STRIDES:
        raise ValueError(f"backbone={name!r} gives maps at strides {strides}, not {STRIDES}: take a hierarchical one")
    return backbone
