"""The Swin-T layout with any mechanism of DeBiFormer's Table 5: non-overlapping patches, blocks 2, 2, 6, 2, widths from 96, MLP ratio 4."""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..layers import PatchEmbedding, PatchMerging
from ..layers.sparse import (
    AxialAttention,
    CrissCrossAttention,
    CrossShapedWindowAttention,
    DeformableAttention,
    GridAttention,
    SubsampledAttention,
    WindowAttention,
)
from ..nearest import did_you_mean
from .biformer import BiFormer
from .pyramid import create, pretrained_cfg
from .stages import BRA, DBRA, Full, Layer, Mixer, Stage

__all__ = ["SwinLayout"]


class SwinLayout(BiFormer):
    """A Swin-T pyramid around the mixers of `stages`."""

    stem_layer = PatchEmbedding
    downsample_layer = PatchMerging
    position = False
    rate_per_block = True


DEPTHS, WIDTHS = (2, 2, 6, 2), (96, 192, 384, 768)
WINDOWS = Layer(WindowAttention)
SHIFTED_WINDOWS = Layer(WindowAttention, dict(shift=3))
# The mixers of a block, or of two blocks in turns, for each stage.
MIXERS: dict[str, tuple[tuple[Mixer, ...], ...]] = {
    "shifted_window": ((WINDOWS, SHIFTED_WINDOWS),) * 4,
    "spatially_separable": tuple(
        (Layer(WindowAttention, dict(relative_bias=False)), Layer(SubsampledAttention, dict(stride=stride))) for stride in (8, 4, 2, 1)
    ),
    "sequential_axial": ((Layer(AxialAttention, dict(axis="row")), Layer(AxialAttention, dict(axis="column"))),) * 4,
    "criss_cross": ((Layer(CrissCrossAttention),),) * 4,
    # The first stage's three heads have no half.
    "cross_shaped_window": (
        (Layer(CrossShapedWindowAttention, dict(stripe_width=1, num_heads=4)),),
        *((Layer(CrossShapedWindowAttention, dict(stripe_width=width)),) for width in (2, 7, None)),
    ),
    # Points in the two later stages only, as in DAT-T.
    "deformable": (
        (WINDOWS, SHIFTED_WINDOWS),
        (WINDOWS, SHIFTED_WINDOWS),
        (WINDOWS, Layer(DeformableAttention, dict(offset_kernel_size=5, offset_groups=3, bias_grid=14))),
        (WINDOWS, Layer(DeformableAttention, dict(offset_kernel_size=3, offset_groups=6, bias_grid=7))),
    ),
    "block_grid": ((WINDOWS, Layer(GridAttention)),) * 4,
    "bi_level_routing": ((BRA(topk=1),), (BRA(topk=4),), (BRA(topk=16),), (Full(),)),
    "bi_level_routing_nchw": ((BRA(topk=1),), (BRA(topk=4),), (BRA(topk=16),), (Full(value_context=True),)),
    # The mixers of DeBiFormer-B, which has these widths.
    "deformable_bi_level_routing": (
        (BRA(topk=1), DBRA(topk=4, point_stride=8, offset_kernel_size=9, offset_groups=1)),
        (BRA(topk=4), DBRA(topk=8, point_stride=4, offset_kernel_size=7, offset_groups=2)),
        (BRA(topk=16), DBRA(topk=16, point_stride=2, offset_kernel_size=5, offset_groups=3)),
        (DBRA(topk=49, point_stride=1, offset_kernel_size=3, offset_groups=6),),
    ),
}
_CFGS: dict[str, dict[str, Any]] = {
    "swin_layout": dict(description="the Swin-T layout with the mechanism that `mixer` names"),
    "shifted_window_stl": dict(description="windows and shifted windows in turns (Swin), in the Swin-T layout"),
    "spatially_separable_stl": dict(description="windows and a coarse map in turns (Twins-SVT), in the Swin-T layout"),
    "sequential_axial_stl": dict(description="rows and columns in turns, in the Swin-T layout"),
    "criss_cross_stl": dict(description="row and column at once (CCNet), in the Swin-T layout"),
    "cross_shaped_window_stl": dict(description="stripes across and down at once (CSWin), in the Swin-T layout"),
    "deformable_stl": dict(description="windows and learned points in turns (DAT), in the Swin-T layout"),
    "block_grid_stl": dict(description="windows and a grid in turns (MaxViT), in the Swin-T layout"),
    "debiformer_stl": dict(description="DeBiFormer's mixers in the Swin-T layout", paper_ids="arXiv:2410.08582"),
}
_CFGS |= {
    name: dict(description=description, origin_url="https://github.com/rayleizhu/BiFormer", paper_ids="arXiv:2303.08810", license="mit")
    for name, description in {
        "biformer_stl": "bi-level routing attention in the Swin-T layout, of the BiFormer paper",
        "biformer_stl_nchw": "its second published form, which convolves the values in the last stage too",
    }.items()
}
default_cfgs = generate_default_cfgs({f"{name}.untrained": pretrained_cfg(**cfg) for name, cfg in _CFGS.items()})


def build(name: str, mixer: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """The Swin-T layout with a mechanism.

    Raises:
        ValueError: If there is no such mechanism, or a grid of regions is given to one that has none.
    """
    if mixer not in MIXERS:
        raise ValueError(f"mixer={mixer!r} is no mechanism: {did_you_mean(mixer, MIXERS)}")
    mixers = MIXERS[mixer]
    if "region_grid" in kwargs and not any(isinstance(m, BRA | DBRA) for stage in mixers for m in stage):
        raise ValueError(f"region_grid={kwargs['region_grid']!r} for mixer={mixer!r}, which has no regions: leave it out")
    stages = tuple(Stage(depth // len(m), dim, m, mlp_ratio=4) for depth, dim, m in zip(DEPTHS, WIDTHS, mixers, strict=True))
    return create(SwinLayout, name, stages, pretrained, **kwargs)


@register_model
def swin_layout(pretrained: bool = False, mixer: str = "shifted_window", **kwargs) -> nn.Module:
    """The Swin-T layout with the mechanism `mixer`, a key of `MIXERS`; each has a name of its own too."""
    return build("swin_layout", mixer, pretrained, **kwargs)


@register_model
def shifted_window_stl(pretrained: bool = False, **kwargs) -> nn.Module:
    """Shifted windows (Swin) in the Swin-T layout: 28.3 M parameters, 4.5 GMACs at 224."""
    return build("shifted_window_stl", "shifted_window", pretrained, **kwargs)


@register_model
def spatially_separable_stl(pretrained: bool = False, **kwargs) -> nn.Module:
    """Spatially separable attention (Twins-SVT) in the Swin-T layout: 31.2 M parameters, 4.4 GMACs at 224."""
    return build("spatially_separable_stl", "spatially_separable", pretrained, **kwargs)


@register_model
def sequential_axial_stl(pretrained: bool = False, **kwargs) -> nn.Module:
    """Sequential axial attention in the Swin-T layout: 28.3 M parameters, 4.4 GMACs at 224."""
    return build("sequential_axial_stl", "sequential_axial", pretrained, **kwargs)


@register_model
def criss_cross_stl(pretrained: bool = False, **kwargs) -> nn.Module:
    """Criss-cross attention (CCNet) in the Swin-T layout: 28.3 M parameters, 4.5 GMACs at 224."""
    return build("criss_cross_stl", "criss_cross", pretrained, **kwargs)


@register_model
def cross_shaped_window_stl(pretrained: bool = False, **kwargs) -> nn.Module:
    """Cross-shaped windows (CSWin) in the Swin-T layout: 28.3 M parameters, 4.6 GMACs at 224."""
    return build("cross_shaped_window_stl", "cross_shaped_window", pretrained, **kwargs)


@register_model
def deformable_stl(pretrained: bool = False, **kwargs) -> nn.Module:
    """Deformable attention (DAT) in the Swin-T layout: 28.3 M parameters, 4.6 GMACs at 224."""
    return build("deformable_stl", "deformable", pretrained, **kwargs)


@register_model
def block_grid_stl(pretrained: bool = False, **kwargs) -> nn.Module:
    """Block-grid attention (MaxViT) in the Swin-T layout: 28.3 M parameters, 4.5 GMACs at 224."""
    return build("block_grid_stl", "block_grid", pretrained, **kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> nn.Module:
    """BiFormer-STL: 28.4 M parameters, 4.6 GMACs at 224."""
    return build("biformer_stl", "bi_level_routing", pretrained, **kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs) -> nn.Module:
    """BiFormer-STL in its second published form, whose last stage convolves the values: as large as the first."""
    return build("biformer_stl_nchw", "bi_level_routing_nchw", pretrained, **kwargs)


@register_model
def debiformer_stl(pretrained: bool = False, **kwargs) -> nn.Module:
    """Deformable bi-level routing in the Swin-T layout: 45.3 M parameters, 5.4 GMACs at 224."""
    return build("debiformer_stl", "deformable_bi_level_routing", pretrained, **kwargs)
