"""DeBiFormer (Long et al., ACCV 2024): bi-level routing attention and its deformable form in turns.

Presets follow the released code, which the paper's text and tables differ from in three places: base uses offset groups 1, 2, 3, 6
(paper: 1, 2, 4, 8); offsets have one channel, added to x and y (paper: two; `DBRA(offset_channels=2)`); and base has 95.5 M parameters
(paper: 77 M). `vary` makes the rows of the paper's ablations of them; every preset takes its arguments.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..layers.region_routing import check_positive
from .pyramid import Pyramid, create, pretrained_cfg
from .stages import BRA, DBRA, Stage

__all__ = ["DeBiFormer", "vary"]


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


def vary(
    stages: Sequence[Stage],
    pattern: Sequence[str] | None = None,
    bra_topk: Sequence[int] | None = None,
    dbra_topk: Sequence[int] | None = None,
) -> tuple[Stage, ...]:
    """The stages of a preset with other mixers or other top-k, as in the paper's Tables 6 and 7.

    Wherever a mixer is placed, it has the numbers that the preset gives its kind in that stage. In the last stage, which has no BRA, a BRA
    has the top-k of the DBRA: all regions.

    Args:
        stages: A preset, with a DBRA in every stage.
        pattern: A word for each stage, one letter for each of its mixers in turn: B for BRA, * for DBRA. Released: B*, B*, B*, **.
        bra_topk, dbra_topk: Top-k of each stage's BRA and DBRA; the number of a stage without such a mixer has no effect.

    Raises:
        ValueError: If a word or a number is missing or wrong.
    """
    for argument, topks in (("bra_topk", bra_topk), ("dbra_topk", dbra_topk)):
        if topks is not None and (not isinstance(topks, Sequence) or len(topks) != len(stages)):
            raise ValueError(f"{argument}={topks!r} needs a number for each of the {len(stages)} stages")
        check_positive(**{f"{argument}[{i}]": k for i, k in enumerate(topks or ())})
    if pattern is not None and (isinstance(pattern, str) or len(pattern) != len(stages)):
        raise ValueError(f"pattern={pattern!r} needs a word for each of the {len(stages)} stages, such as ('B*', 'B*', 'B*', '**')")
    varied = []
    for i, stage in enumerate(stages):
        word = pattern[i] if pattern else "".join("B" if isinstance(mixer, BRA) else "*" for mixer in stage.mixers)
        if len(word) != len(stage.mixers) or set(word) - set("B*"):
            raise ValueError(f"pattern={pattern!r}: {word!r} must be {len(stage.mixers)} of the letters B (BRA) and * (DBRA)")
        dbra = next(mixer for mixer in stage.mixers if isinstance(mixer, DBRA))
        bra = next((mixer for mixer in stage.mixers if isinstance(mixer, BRA)), BRA(dbra.topk))
        if bra_topk:
            bra = replace(bra, topk=bra_topk[i])
        if dbra_topk:
            dbra = replace(dbra, topk=dbra_topk[i])
        varied.append(replace(stage, mixers=tuple(bra if letter == "B" else dbra for letter in word)))
    return tuple(varied)


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


def _create(name: str, stages: tuple[Stage, ...], pretrained: bool, **kwargs: Any) -> nn.Module:
    """A preset, with the arguments of `vary` among those of its constructor."""
    variation = {argument: kwargs.pop(argument, None) for argument in ("pattern", "bra_topk", "dbra_topk")}
    return create(DeBiFormer, name, vary(stages, **variation), pretrained, **kwargs)


@register_model
def debiformer_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeBiFormer-T: 21.5 M parameters, 2.6 GMACs at 224."""
    return _create("debiformer_tiny", TINY, pretrained, **kwargs)


@register_model
def debiformer_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeBiFormer-S: 44.0 M parameters, 5.4 GMACs at 224."""
    return _create("debiformer_small", SMALL, pretrained, **kwargs)


@register_model
def debiformer_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeBiFormer-B: 95.5 M parameters as released (77 M in the paper's table), 11.7 GMACs at 224."""
    return _create("debiformer_base", BASE, pretrained, **kwargs)


@register_model
def debiformer_nano(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeBiFormer-nano, not from the paper: this library's own for CPUs and small images."""
    return _create("debiformer_nano", NANO, pretrained, **({"region_grid": 4} | kwargs))
