import sys

import pytest
import torch

from debiformer.ops import bi_level_attention, deformable_attention, merge, partition, route, routed_attention
from debiformer.ops.observation import watch

GRID = (3, 2)


def maps(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(2, *size, 8, dtype=dtype) for size in ((3, 4), (6, 8), (6, 8))]


MODULE = sys.modules[bi_level_attention.__module__]


@pytest.mark.parametrize(("soft", "way"), [(False, "gathered"), (True, "gathered"), (False, "masked")])
def test_it_is_its_four_steps(soft, way, monkeypatch):
    """Cut, route by the means, attend, lay back (BiFormer, eqs. 3-6), with queries on a coarser map."""
    monkeypatch.setattr(MODULE, "GATHER_COST", -1 if way == "gathered" else 1000)
    monkeypatch.delattr(MODULE, "_masked" if way == "gathered" else "routed_attention")  # the other way is not taken
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
        monkeypatch.setattr(MODULE, "GATHER_COST", gather_cost)
        seen = []
        with watch(lambda name, **arguments: seen.append(arguments)):
            bi_level_attention(*maps(), GRID, topk, 2)
        return seen

    (gathered,), (masked,) = watched(-1), watched(1000)
    assert gathered.keys() == masked.keys()
    for name in ("q", "k", "v", "routes"):
        torch.testing.assert_close(masked[name], gathered[name])
    assert gathered["scale"] == masked["scale"]


def test_a_watcher_sees_nothing_of_what_is_compiled():
    torch.compiler.reset()
    compiled, seen = torch.compile(bi_level_attention, fullgraph=True, backend="aot_eager"), []
    with torch.no_grad(), watch(lambda name, **arguments: seen.append(name)):
        out = compiled(*maps(), GRID, 2, 2)
    torch.testing.assert_close(out, bi_level_attention(*maps(), GRID, 2, 2))
    assert not seen


@pytest.mark.parametrize("gather_cost", [-1, 1000], ids=["gathered", "masked"])
def test_bad_input_names_the_problem(gather_cost, monkeypatch):
    monkeypatch.setattr(MODULE, "GATHER_COST", gather_cost)
    q, k, v = maps()
    bad = [
        ((q, k, v.transpose(1, 2)), {}, r"expected q .* got q \(2, 3, 4, 8\), k \(2, 6, 8, 8\), v \(2, 8, 6, 8\)"),
        ((q, k[:1], v[:1]), {}, "expected q"),
        ((q, k.float(), v), {}, r"one floating-point dtype; got .*float32"),
        ((q, k, v), {"num_heads": 0}, "num_heads=0"),
        ((q, k, v), {"num_heads": 3}, "num_heads=3 does not divide the 8 channels"),
        ((q, k, v), {"topk": 0}, "topk=0"),
        ((q, k, v), {"topk": 7}, "topk=7 is not between 1 and the 6 regions"),
        ((q, k, v), {"region_grid": (4, 2), "topk": 8}, "pad_to_grid"),
    ]
    for given, options, message in bad:
        with pytest.raises(ValueError, match=message):
            bi_level_attention(*given, **dict(region_grid=GRID, topk=2, num_heads=2) | options)


def test_compiled_operations_follow_autocast():
    """As eager ones do, whose attention PyTorch casts; called alone, with float32 maps."""
    torch.compiler.reset()
    whole, precise = maps(torch.float32), maps()
    q, k, v = (x.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for x in whole)
    points, table = torch.rand(2, 1, 48, 2), torch.randn(2, 5, 7)
    regions = [x.unsqueeze(2) for x in (q, k, v)]
    calls = [
        lambda: bi_level_attention(*whole, GRID, 2, 2),
        lambda: routed_attention(*regions, torch.zeros(2, 1, 1, dtype=torch.int64)),
        lambda: deformable_attention(q, k, v, points, table, (3, 4)),
    ]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for call in calls:
            eager, compiled = call(), torch.compile(call, fullgraph=True, backend="aot_eager")()
            assert eager.dtype == compiled.dtype == torch.bfloat16
            torch.testing.assert_close(compiled, eager)
        exact = torch.compile(lambda: bi_level_attention(*precise, GRID, 2, 2), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(exact, bi_level_attention(*precise, GRID, 2, 2))  # float64 stays what it is


def test_what_the_compiler_sees_of_the_eager_operations():
    q, k, v = (x.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for x in maps())
    points, table = torch.rand(2, 1, 48, 2, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    routes = torch.zeros(2, 1, 1, dtype=torch.int64)
    torch.library.opcheck(torch.ops.debiformer.eager_routed_attention, (*(x.unsqueeze(2) for x in (q, k, v)), routes, 0.3, None))
    torch.library.opcheck(torch.ops.debiformer.eager_deformable_attention, (q, k, v, points, table, 3, 4, 0.3))
    torch.library.opcheck(torch.ops.debiformer.eager_sample_points, (maps()[1], points.view(2, 1, 6, 8, 2)))
