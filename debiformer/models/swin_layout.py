"""The Swin-T layout with other mixers: non-overlapping patches, depths 2, 2, 6, 2, width 96, no position encoding."""

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..layers import PatchEmbedding, PatchMerging
from .biformer import BiFormer
from .pyramid import create, pretrained_cfg
from .stages import BRA, Full, Stage

__all__ = ["SwinLayout"]


class SwinLayout(BiFormer):
    """A Swin-T pyramid around the mixers of `stages`."""

    stem_layer = PatchEmbedding
    downsample_layer = PatchMerging
    position = False


BIFORMER_STL = (
    Stage(2, 96, (BRA(topk=1),), mlp_ratio=4),
    Stage(2, 192, (BRA(topk=4),), mlp_ratio=4),
    Stage(6, 384, (BRA(topk=16),), mlp_ratio=4),
    Stage(2, 768, (Full(),), mlp_ratio=4),
)

default_cfgs = generate_default_cfgs(
    {
        "biformer_stl.untrained": pretrained_cfg(
            description="bi-level routing attention in the Swin-T layout, of the BiFormer paper",
            origin_url="https://github.com/rayleizhu/BiFormer",
            paper_ids="arXiv:2303.08810",
            license="mit",
        )
    }
)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> nn.Module:
    """BiFormer-STL: 28.4 M parameters, 4.6 GMACs at 224."""
    return create(SwinLayout, "biformer_stl", BIFORMER_STL, pretrained, **kwargs)
