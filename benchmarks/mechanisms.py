"""The nine mechanisms of Table 5 at the size of DeBiFormer-nano, for images of 64 pixels; `cifar10.py table5` trains them.

The Swin-T layout with 2, 2, 2, 2 blocks of 32, 64, 128, 256 channels, whose maps are 16, 8, 4 and 2 pixels wide: windows, grids and region
grids of 4 instead of 7, shifts of 2, stripes of 1, 2, 4 and all pixels, strides and top-k of DeBiFormer-nano. So that budgets are equal,
the agents' feed-forward of deformable bi-level routing has ratio 1, and its last map of 2x2 pixels, which has no regions to route between,
full attention as that of bi-level routing.
"""

from typing import Any

import timm
import torch
from memory import MB, extra_memory
from timm.models import register_model
from torch import nn

from debiformer.cli import bench
from debiformer.layers.sparse import (
    AxialAttention,
    CrissCrossAttention,
    CrossShapedWindowAttention,
    DeformableAttention,
    GridAttention,
    SubsampledAttention,
    WindowAttention,
)
from debiformer.models.pyramid import create
from debiformer.models.stages import BRA, DBRA, Full, Layer, Mixer, Stage
from debiformer.models.swin_layout import SwinLayout

WINDOWS, SHIFTED = Layer(WindowAttention, dict(window_size=4)), Layer(WindowAttention, dict(window_size=4, shift=2))
MIXERS: dict[str, tuple[tuple[Mixer, ...], ...]] = {
    "shifted_window": ((WINDOWS, SHIFTED),) * 4,
    "spatially_separable": tuple(
        (Layer(WindowAttention, dict(window_size=4, relative_bias=False)), Layer(SubsampledAttention, dict(stride=s))) for s in (8, 4, 2, 1)
    ),
    "sequential_axial": ((Layer(AxialAttention, dict(axis="row")), Layer(AxialAttention, dict(axis="column"))),) * 4,
    "criss_cross": ((Layer(CrissCrossAttention),),) * 4,
    "cross_shaped_window": tuple(
        (Layer(CrossShapedWindowAttention, dict(stripe_width=w, num_heads=h)),) for w, h in ((1, 2), (2, 2), (4, 4), (None, 8))
    ),
    "deformable": (
        (WINDOWS, SHIFTED),
        (WINDOWS, SHIFTED),
        (WINDOWS, Layer(DeformableAttention, dict(offset_kernel_size=5, offset_groups=2, bias_grid=4))),
        (WINDOWS, Layer(DeformableAttention, dict(offset_kernel_size=3, offset_groups=4, bias_grid=2))),
    ),
    "block_grid": ((WINDOWS, Layer(GridAttention, dict(grid_size=4))),) * 4,
    "bi_level_routing": ((BRA(topk=2),), (BRA(topk=4),), (BRA(topk=16),), (Full(),)),
    "deformable_bi_level_routing": (
        (BRA(topk=2), DBRA(topk=4, point_stride=4, offset_kernel_size=7, offset_groups=1)),
        (BRA(topk=4), DBRA(topk=8, point_stride=2, offset_kernel_size=5, offset_groups=2)),
        (BRA(topk=16), DBRA(topk=16, point_stride=1, offset_kernel_size=3, offset_groups=4)),
        (Full(),),
    ),
}


@register_model
def layout_for_cifar(mixer: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The small layout with a mechanism."""
    stages = tuple(Stage(2 // len(mixers), 32 << i, mixers, mlp_ratio=4, agent_mlp_ratio=1) for i, mixers in enumerate(MIXERS[mixer]))
    return create(SwinLayout, "swin_layout", stages, pretrained, **({"region_grid": 4} | kwargs))


def peak_memory(mixer: str, threads: int, batch: int = 64) -> float:
    """MB that a training step takes above the model, in this process."""
    torch.set_num_threads(threads)
    model = timm.create_model("layout_for_cifar", mixer=mixer, num_classes=10).train()
    bench.training(model, torch.randn(2, 3, 64, 64))()
    model.zero_grad(set_to_none=True)
    step = bench.training(model, torch.randn(batch, 3, 64, 64))
    return extra_memory(step, "cpu") / MB


def speeds(threads: int, rounds: int = 5, batch: int = 64) -> dict[str, dict[str, float]]:
    """Images per second of every mechanism, all of them by turns."""
    torch.set_num_threads(threads)
    x = torch.randn(batch, 3, 64, 64)
    models = {mixer: timm.create_model("layout_for_cifar", mixer=mixer, num_classes=10) for mixer in MIXERS}
    found: dict[str, dict[str, float]] = {mixer: {} for mixer in MIXERS}
    for column, step, train in (("images/s", bench.inference, False), ("training images/s", bench.training, True)):
        runs = {mixer: step(model.train(train), x) for mixer, model in models.items()}
        for mixer, seconds in bench.alternate(runs, rounds).items():
            found[mixer][column] = round(batch / seconds)
    return found
