"""DeBiFormer (Long et al., ACCV 2024): bi-level routing attention and its deformable form in turns.

Presets follow the released code, which the paper's text and tables differ from in three places: base uses offset groups 1, 2, 3, 6
(paper: 1, 2, 4, 8); offsets have one channel, added to x and y (paper: two; `DBRA(offset_channels=2)`); and base has 95.5 M parameters
(paper: 77 M).
"""

from timm.models import generate_default_cfgs, register_model
from torch import nn

from .pyramid import Pyramid, create, pretrained_cfg
from .stages import BRA, DBRA, Stage

__all__ = ["DeBiFormer"]


class DeBiFormer(Pyramid):
    """DeBiFormer: convolutional feed-forwards, and PyTorch's own initialisation, as released."""


# A depth of d counts d pairs of mixers, as the paper does: 2d blocks here.
TINY = (
    Stage(1, 64, (BRA(topk=1), DBRA(topk=4, point_stride=8, offset_kernel_size=9, offset_groups=1)), mlp_ratio=3),
    Stage(1, 128, (BRA(topk=4), DBRA(topk=8, point_stride=4, offset_kernel_size=7, offset_groups=2)), mlp_ratio=3),
    Stage(4, 256, (BRA(topk=16), DBRA(topk=16, point_stride=2, offset_kernel_size=5, offset_groups=4)), mlp_ratio=3),
    Stage(1, 512, (DBRA(topk=49, point_stride=1, offset_kernel_size=3, offset_groups=8),) * 2, mlp_ratio=3),
)
SMALL = (
    Stage(2, 64, (BRA(topk=1), DBRA(topk=4, point_stride=8, offset_kernel_size=9, offset_groups=1)), mlp_ratio=3),
    Stage(2, 128, (BRA(topk=4), DBRA(topk=8, point_stride=4, offset_kernel_size=7, offset_groups=2)), mlp_ratio=3),
    Stage(9, 256, (BRA(topk=16), DBRA(topk=16, point_stride=2, offset_kernel_size=5, offset_groups=4)), mlp_ratio=3),
    Stage(3, 512, (DBRA(topk=49, point_stride=1, offset_kernel_size=3, offset_groups=8),) * 2, mlp_ratio=2, agent_mlp_ratio=1),
)
BASE = (
    Stage(2, 96, (BRA(topk=1), DBRA(topk=4, point_stride=8, offset_kernel_size=9, offset_groups=1)), mlp_ratio=3),
    Stage(2, 192, (BRA(topk=4), DBRA(topk=8, point_stride=4, offset_kernel_size=7, offset_groups=2)), mlp_ratio=3),
    Stage(9, 384, (BRA(topk=16), DBRA(topk=16, point_stride=2, offset_kernel_size=5, offset_groups=3)), mlp_ratio=3),
    Stage(2, 768, (DBRA(topk=49, point_stride=1, offset_kernel_size=3, offset_groups=6),) * 2, mlp_ratio=3),
)
# Not from the paper: this library's own, for CPUs, tests and small images.
NANO = (
    Stage(1, 32, (BRA(topk=2), DBRA(topk=4, point_stride=4, offset_kernel_size=7, offset_groups=1)), mlp_ratio=2, agent_mlp_ratio=2),
    Stage(1, 64, (BRA(topk=4), DBRA(topk=8, point_stride=2, offset_kernel_size=5, offset_groups=2)), mlp_ratio=2, agent_mlp_ratio=2),
    Stage(1, 128, (BRA(topk=16), DBRA(topk=16, point_stride=1, offset_kernel_size=3, offset_groups=4)), mlp_ratio=2, agent_mlp_ratio=2),
    Stage(1, 192, (DBRA(topk=16, point_stride=1, offset_kernel_size=3, offset_groups=6),), mlp_ratio=2, agent_mlp_ratio=1),
)

_RELEASE = dict(origin_url="https://github.com/maclong01/DeBiFormer", paper_ids="arXiv:2410.08582", license="apache-2.0")
_CFGS: dict[str, dict] = {
    "debiformer_tiny": dict(description="DeBiFormer-T of the paper", **_RELEASE),
    "debiformer_small": dict(description="DeBiFormer-S of the paper", **_RELEASE),
    "debiformer_base": dict(description="DeBiFormer-B as released", **_RELEASE),
    "debiformer_nano": dict(
        description="not from the paper: a small one for CPUs and small images",
        input_size=(3, 64, 64),
        pool_size=(2, 2),
        license="apache-2.0",
    ),
}
default_cfgs = generate_default_cfgs({f"{name}.untrained": pretrained_cfg(**cfg) for name, cfg in _CFGS.items()})


@register_model
def debiformer_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeBiFormer-T: 21.5 M parameters, 2.6 GMACs at 224."""
    return create(DeBiFormer, "debiformer_tiny", TINY, pretrained, **kwargs)


@register_model
def debiformer_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeBiFormer-S: 44.0 M parameters, 5.4 GMACs at 224."""
    return create(DeBiFormer, "debiformer_small", SMALL, pretrained, **kwargs)


@register_model
def debiformer_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeBiFormer-B: 95.5 M parameters as released (77 M in the paper's table), 11.7 GMACs at 224."""
    return create(DeBiFormer, "debiformer_base", BASE, pretrained, **kwargs)


@register_model
def debiformer_nano(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeBiFormer-nano, not from the paper: this library's own for CPUs and small images."""
    return create(DeBiFormer, "debiformer_nano", NANO, pretrained, **({"region_grid": 4} | kwargs))
