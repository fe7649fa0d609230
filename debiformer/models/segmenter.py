"""A backbone with a head for semantic segmentation."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor, nn

from ..nearest import check_names
from .backbone import Backbone
from .heads import FCNHead, SemanticFPNHead, UPerNetHead
from .heads.pixels import enlarge
from .heads.published import SEMANTIC_FPN, UPERNET, heads_in_our_names

HEADS = ("semantic_fpn", "upernet")


class Segmenter(nn.Module):
    """Images (B, 3, H, W) to logits of every pixel.

    UPerNet is trained with a second loss, on the third stage; Semantic FPN with its own alone.

    Args:
        backbone: A hierarchical timm model.
        head: semantic_fpn or upernet.
        num_classes: Classes.
        pretrained, freeze_norms: As for `Backbone`.
        backbone_args: Further arguments of the backbone's constructor.
        head_args: Further arguments of the head's constructor.

    Raises:
        FileNotFoundError: If there is no file of pretrained weights.
        ValueError: If there is no such head, or no such backbone.
    """

    backbone_prefix = "backbone.maps.model."

    def __init__(
        self,
        backbone: str,
        head: str,
        num_classes: int,
        pretrained: bool | str = False,
        freeze_norms: bool = False,
        backbone_args: dict[str, Any] | None = None,
        head_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head={head!r} is none of {', '.join(HEADS)}")
        self.backbone = Backbone(backbone, pretrained, freeze_norms, **(backbone_args or {}))
        channels = self.backbone.channels
        make = SemanticFPNHead if head == "semantic_fpn" else UPerNetHead
        known = [name for name in signature(make).parameters if name not in ("in_channels", "num_classes")]
        check_names("head_args", head_args or {}, head, known)
        self.head = make(channels, num_classes, **(head_args or {}))
        self.auxiliary = FCNHead(channels[2], num_classes) if head == "upernet" else None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) to logits (B, num_classes, H, W); in training, with those of the auxiliary head where there is one."""
        maps = self.backbone(images)
        logits = enlarge(self.head(maps), images.shape[2:])
        if self.auxiliary is None or not self.training:
            return logits
        return logits, enlarge(self.auxiliary(maps[2]), images.shape[2:])

    def from_published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of mmsegmentation's heads in the names of ours; see `load_published`."""
        return heads_in_our_names(tensors, SEMANTIC_FPN if isinstance(self.head, SemanticFPNHead) else UPERNET)

    def no_weight_decay(self) -> set[str]:
        """Names of the backbone's parameters that its authors train without weight decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks of the backbone again in the backward pass rather than keep what they need."""
        self.backbone.set_grad_checkpointing(enable)
