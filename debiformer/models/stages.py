"""What a stage is made of: its mixers, as data, and the block around each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from timm.layers import DropPath
from torch import Tensor, nn

from ..layers import BiLevelRoutingAttention, DeformableBiLevelRoutingAttention, FullAttention, ResidualDepthwiseConv2d
from ..ops.regions import Grid


class Mixer(Protocol):
    """An attention layer as data."""

    def build(self, stage: "Stage", region_grid: Grid, bias_grid: int) -> nn.Module:
        """The layer, in a stage, with regions of this grid and a bias table for maps of this height and width."""
        ...


@dataclass(frozen=True)
class BRA:
    """Bi-level routing attention to `topk` regions."""

    topk: int

    def build(self, stage: "Stage", region_grid: Grid, bias_grid: int) -> nn.Module:
        return BiLevelRoutingAttention(stage.dim, stage.num_heads, region_grid, self.topk)


@dataclass(frozen=True)
class DBRA:
    """Deformable bi-level routing attention: one agent every `point_stride` pixels, each routed to `topk` regions."""

    topk: int
    point_stride: int
    offset_kernel_size: int
    offset_groups: int
    offset_channels: int = 1

    def build(self, stage: "Stage", region_grid: Grid, bias_grid: int) -> nn.Module:
        return DeformableBiLevelRoutingAttention(
            stage.dim,
            stage.num_heads,
            region_grid,
            self.topk,
            point_stride=self.point_stride,
            offset_kernel_size=self.offset_kernel_size,
            offset_groups=self.offset_groups,
            bias_grid=bias_grid,
            agent_mlp_ratio=stage.agent_mlp_ratio,
            offset_channels=self.offset_channels,
        )


@dataclass(frozen=True)
class Full:
    """Full attention with local context enhancement, 8 heads at every width, as published."""

    value_context: bool = False

    def build(self, stage: "Stage", region_grid: Grid, bias_grid: int) -> nn.Module:
        return FullAttention(stage.dim, value_context=self.value_context)


@dataclass(frozen=True)
class Layer:
    """Any other layer, made as layer(dim, num_heads, **options) with the heads of the stage where the options have none."""

    layer: Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, stage: "Stage", region_grid: Grid, bias_grid: int) -> nn.Module:
        return self.layer(stage.dim, **({"num_heads": stage.num_heads} | dict(self.options)))


@dataclass(frozen=True)
class Stage:
    """One stage of a pyramid.

    `depth` counts repetitions of `mixers`, as both papers count: a DeBiFormer stage of depth 2 with mixers (BRA, DBRA) has four blocks, a
    BiFormer stage of depth 2 with mixers (BRA,) has two. Every block is one mixer and one feed-forward.
    """

    depth: int
    dim: int
    mixers: tuple[Mixer, ...]
    mlp_ratio: float
    agent_mlp_ratio: float = 3

    @property
    def num_heads(self) -> int:
        """Heads of 32 channels, as in all published models."""
        return self.dim // 32


class Block(nn.Module):
    """Position, mixer and feed-forward, each added to the map; (B, H, W, C) -> the same."""

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, position: bool, drop_path: float) -> None:
        super().__init__()
        # Zero padding at the border tells a token where it is.
        self.position = ResidualDepthwiseConv2d(dim, kernel_size=3) if position else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.position(x)
        size = x.shape[1:3]
        # Norms and sums run on tokens (B, N, C): an exported graph of them in four dimensions would be taken for one of NCHW maps, and
        # its inference engine would permute them.
        tokens = x.flatten(1, 2)
        tokens = tokens + self.drop_path(self.mixer(self.norm1(tokens).unflatten(1, size)).flatten(1, 2))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens).unflatten(1, size)).flatten(1, 2))
        return tokens.unflatten(1, size)


def build_blocks(
    stage: Stage, feed_forward: Callable[[int, float], nn.Module], position: bool, region_grid: Grid, bias_grid: int, drop_path: list[float]
) -> list[Block]:
    """The blocks of a stage, with a rate of `drop_path` for each."""
    return [
        Block(stage.dim, mixer.build(stage, region_grid, bias_grid), feed_forward(stage.dim, stage.mlp_ratio), position, rate)
        for mixer, rate in zip(stage.mixers * stage.depth, drop_path, strict=True)
    ]
