"""Presets with other patterns of mixers and other top-k, counted by hand."""

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from debiformer.cli import bench
from debiformer.layers import BiLevelRoutingAttention, DeformableBiLevelRoutingAttention
from debiformer.models.debiformer import BASE, NANO, SMALL, TINY, vary
from debiformer.models.stages import BRA

RELEASED = dict(pattern=("B*", "B*", "B*", "**"), bra_topk=(1, 4, 16, 49), dbra_topk=(4, 8, 16, 49))
MIXERS = {"B": BiLevelRoutingAttention, "*": DeformableBiLevelRoutingAttention}


def parameters(name="debiformer_tiny", **kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, **kwargs).parameters())


def macs(**kwargs):
    return bench.count("debiformer_tiny", (224, 224), kwargs)[1]


def bra(dim):
    """Queries, keys and values, local context, projection."""
    return 3 * dim * (dim + 1) + 26 * dim + dim * (dim + 1)


def dbra(dim, heads, kernel, groups, bias_grid, ratio=3):
    """The same, the offset network, four projections of agents, two norms, their feed-forward, and the bias table."""
    offsets = (kernel**2 + 2 + 1) * dim // groups
    hidden = ratio * dim
    feed_forward = hidden * (dim + 1) + 10 * hidden + dim * (hidden + 1)
    return bra(dim) + offsets + 4 * dim * (dim + 1) + 4 * dim + feed_forward + heads * (2 * bias_grid - 1) ** 2


MORE = [  # parameters that a DBRA has more than a BRA in each stage of tiny
    dbra(64, 2, 9, 1, 56) - bra(64),
    dbra(128, 4, 7, 2, 28) - bra(128),
    dbra(256, 8, 5, 4, 14) - bra(256),
    dbra(512, 16, 3, 8, 7) - bra(512),
]


@pytest.mark.parametrize("stages", [TINY, SMALL, BASE, NANO])
def test_a_preset_is_what_it_was(stages):
    assert vary(stages) == stages
    if stages is not NANO:
        assert vary(stages, **RELEASED) == stages


@pytest.mark.parametrize(
    ("pattern", "more"),
    [
        (("BB", "BB", "BB", "BB"), -MORE[0] - MORE[1] - 4 * MORE[2] - 2 * MORE[3]),
        (("BB", "B*", "B*", "*B"), -MORE[0] - MORE[3]),
        (("**", "**", "**", "**"), MORE[0] + MORE[1] + 4 * MORE[2]),
    ],
)
def test_parameters_of_patterns(pattern, more):
    assert parameters(pattern=pattern) == 21_495_598 + more


def test_patterns_place_the_mixers():
    pattern = ["BB", "*B", "B*", "BB"]
    with torch.device("meta"):
        model = timm.create_model("debiformer_tiny", pattern=pattern)
    for stage, word, depth in zip(model.stages, pattern, (1, 1, 4, 1), strict=True):
        assert [type(block.mixer) for block in stage.blocks] == [MIXERS[letter] for letter in word] * depth
    assert [block.mixer.topk for stage in model.stages for block in stage.blocks] == [1, 1, 8, 4, *[16, 16] * 4, 49, 49]
    assert vary(NANO, ("**", "BB", "**", "B"))[3].mixers == (BRA(topk=16),)


def test_topk_changes_attention_alone():
    """Each query, or each of 49 agents, meets the keys of k regions, and their values: regions of 8x8, 4x4, 2x2 and 1x1 pixels."""
    bra_topk, dbra_topk = (4, 8, 32, 49), (1, 16, 8, 40)
    more_bra = 2 * (3 * 56**2 * 64 * 64 + 4 * 28**2 * 16 * 128 + 4 * 16 * 14**2 * 4 * 256)
    more_dbra = 2 * 49 * (-3 * 64 * 64 + 8 * 16 * 128 - 4 * 8 * 4 * 256 - 2 * 9 * 1 * 512)
    affinities = 2 * 49 * 49 * 512  # of the last stage, where the released ones route to all regions
    released = macs()
    assert macs(bra_topk=bra_topk) == released + more_bra
    assert macs(dbra_topk=dbra_topk) == released + more_dbra + affinities
    assert macs(**RELEASED) == released
    assert parameters(bra_topk=bra_topk, dbra_topk=dbra_topk) == 21_495_598


def test_a_checkpoint_fits_every_topk():
    model = timm.create_model("debiformer_nano", bra_topk=(1, 1, 1, 1), dbra_topk=[2, 2, 2, 2])
    model.load_state_dict(timm.create_model("debiformer_nano").state_dict())
    assert [block.mixer.topk for stage in model.stages for block in stage.blocks] == [1, 2] * 3 + [2]


def test_one_step_of_training():
    model = timm.create_model("debiformer_nano", num_classes=4, pattern=("**", "BB", "*B", "B"), bra_topk=(1, 2, 8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    before = cross_entropy(model(images), labels)
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert cross_entropy(model(images), labels) < before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(pattern=("BB", "B*", "B*")), r"pattern=\('BB', 'B\*', 'B\*'\) needs a word for each of the 4 stages"),
        (dict(pattern="BB*B"), "pattern='BB\\*B' needs a word for each of the 4 stages, such as"),
        (dict(pattern=("BB", "BBB", "B*", "**")), r"'BBB' must be 2 of the letters B \(BRA\) and \* \(DBRA\)"),
        (dict(pattern=("BB", "B*", "D*", "**")), "'D\\*' must be 2 of the letters"),
        (dict(bra_topk=(1, 4, 16)), r"bra_topk=\(1, 4, 16\) needs a number for each of the 4 stages"),
        (dict(dbra_topk=4), "dbra_topk=4 needs a number for each of the 4 stages"),
        (dict(dbra_topk=(4, 0, 16, 49)), r"dbra_topk\[1\]=0 is not a positive integer"),
        (dict(dbra_topk=(4, 8, 16, 50)), "topk=50 is not between 1 and the 49 regions"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("debiformer_tiny", **arguments)
