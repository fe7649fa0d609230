"""BiFormer (Zhu et al., CVPR 2023): bi-level routing attention in three stages, full attention in the last."""

from functools import partial

from timm.layers import Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .pyramid import Pyramid, create, pretrained_cfg
from .stages import BRA, Full, Mixer, Stage

__all__ = ["BiFormer"]


def plain_feed_forward(dim: int, ratio: float) -> nn.Module:
    """Linear, GELU, linear."""
    return Mlp(dim, int(dim * ratio))


class BiFormer(Pyramid):
    """BiFormer: plain feed-forwards, linear layers from a truncated normal, as released."""

    feed_forward = staticmethod(plain_feed_forward)
    feature_norm_eps = 1e-6

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.apply(init_linear)


def init_linear(module: nn.Module) -> None:
    """Weights of linear layers from a normal of standard deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def stages(depths: tuple[int, ...], width: int) -> tuple[Stage, ...]:
    """The published layout: top-1, 4 and 16 routing, then full attention. A depth of d counts d blocks, as the paper does."""
    mixers: tuple[Mixer, ...] = (BRA(topk=1), BRA(topk=4), BRA(topk=16), Full())
    return tuple(Stage(depth, width << i, (mixer,), mlp_ratio=3) for i, (depth, mixer) in enumerate(zip(depths, mixers, strict=True)))


TINY = stages((2, 2, 8, 2), width=64)
SMALL = stages((4, 4, 18, 4), width=64)
BASE = stages((4, 4, 18, 4), width=96)

_release = partial(pretrained_cfg, origin_url="https://github.com/rayleizhu/BiFormer", paper_ids="arXiv:2303.08810", license="mit")
default_cfgs = generate_default_cfgs(
    {
        "biformer_tiny.untrained": _release(description="BiFormer-T of the paper"),
        "biformer_small.untrained": _release(description="BiFormer-S of the paper"),
        "biformer_base.untrained": _release(description="BiFormer-B of the paper"),
    }
)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """BiFormer-T: 13.1 M parameters, 2.2 GMACs at 224."""
    return create(BiFormer, "biformer_tiny", TINY, pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """BiFormer-S: 25.5 M parameters, 4.5 GMACs at 224."""
    return create(BiFormer, "biformer_small", SMALL, pretrained, **kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """BiFormer-B: 56.8 M parameters, 9.8 GMACs at 224."""
    return create(BiFormer, "biformer_base", BASE, pretrained, **kwargs)
