import sys

import pytest
import torch

from debiformer.ops import bi_level_attention, merge, partition, route, routed_attention
from debiformer.ops.observation import watch

GRID = (3, 2)


def maps(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(2, *size, 8, dtype=dtype) for size in ((3, 4), (6, 8), (6, 8))]


@pytest.mark.parametrize("gather_cost", [-1, 24], ids=["gathered", "masked"])
@pytest.mark.parametrize("soft", [False, True])
def test_it_is_its_four_steps(soft, gather_cost, monkeypatch):
    """Cut, route by the means, attend, lay back (BiFormer, eqs. 3-6), with queries on a coarser map."""
    monkeypatch.setattr(sys.modules[bi_level_attention.__module__], "GATHER_COST", gather_cost)
    q, k, v = (partition(x, GRID) for x in maps())
    routes, affinities = route(q.mean(2), k.mean(2), 2)
    weights = (0.3 * affinities).softmax(-1) if soft else None
    heads = (x.unflatten(-1, (2, 4)).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    out = routed_attention(*heads, routes, scale=0.3, route_weights=weights, backend="reference")
    expected = merge(out.permute(0, 2, 3, 1, 4).flatten(3), GRID, (3, 4))
    torch.testing.assert_close(bi_level_attention(*maps(), GRID, 2, 2, scale=0.3, soft_routing=soft), expected)


def test_with_all_regions_it_is_full_attention():
    q, k, v = (x.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for x in maps())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 3, 4, 8)
    torch.testing.assert_close(bi_level_attention(*maps(), GRID, 6, 2), expected)


@pytest.mark.parametrize("strided", [False, True])
def test_what_the_compiler_sees(strided):
    """The shapes, strides and gradients that compiled graphs rely on, by PyTorch's own check."""
    x, regions = maps()[1], partition(maps()[1], GRID)
    if strided:
        x, regions = torch.randn(2, 6, 8, 24, dtype=torch.float64).chunk(3, -1)[1], torch.randn(2, 6, 8, 24, dtype=torch.float64)[..., 8:16]
    torch.library.opcheck(torch.ops.debiformer.partition, (x.requires_grad_(), *GRID))
    single = torch.randn(2, *GRID, 8, requires_grad=True)  # a token in each region: a view, were it not copied
    torch.library.opcheck(torch.ops.debiformer.partition, (single, *GRID))
    torch.library.opcheck(torch.ops.debiformer.merge, (regions.requires_grad_(), *GRID, 6, 8))
    torch.library.opcheck(torch.ops.debiformer.bi_level_attention, (*maps(), *GRID, 2, 2, 0.3, False, "auto"))


@pytest.mark.parametrize("topk", [2, 6])
def test_a_watcher_sees_the_same_whichever_way_it_goes(topk, monkeypatch):
    def watched(gather_cost):
        monkeypatch.setattr(sys.modules[bi_level_attention.__module__], "GATHER_COST", gather_cost)
        seen = []
        with watch(lambda name, **arguments: seen.append(arguments)):
            bi_level_attention(*maps(), GRID, topk, 2)
        return seen

    (gathered,), (masked,) = watched(-1), watched(1000)
    assert gathered.keys() == masked.keys()
    for name in ("q", "k", "v", "routes"):
        torch.testing.assert_close(masked[name], gathered[name])
    assert gathered["scale"] == masked["scale"]
