import math

import pytest
import timm
import torch

from debiformer.explain import tracing
from debiformer.layers import BiLevelRoutingAttention, DeformableBiLevelRoutingAttention
from debiformer.ops import reference


def layers():
    return [
        BiLevelRoutingAttention(8, 2, (2, 3), 2),
        BiLevelRoutingAttention(8, 2, (2, 3), 6),
        BiLevelRoutingAttention(8, 2, (2, 3), 2, soft_routing=True),
        DeformableBiLevelRoutingAttention(8, 2, (2, 3), 2, point_stride=2, offset_kernel_size=3, offset_groups=2, bias_grid=5),
    ]


def test_tracing_changes_nothing_and_finds_every_routing_layer():
    model = timm.create_model("debiformer_nano", num_classes=3).eval()
    x = torch.randn(2, 3, 80, 64)
    with torch.no_grad():
        expected = model(x)
        with tracing(model) as traces:
            assert torch.equal(model(x), expected)
    assert list(traces) == [f"stages.{s}.blocks.{b}.mixer" for s, b in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]]
    assert [t.size for t in traces.values()] == [(20, 16)] * 2 + [(10, 8)] * 2 + [(5, 4)] * 2 + [(3, 2)]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_attention_lies_on_the_routed_regions_alone(index, size):
    torch.manual_seed(index)
    layer = torch.nn.ModuleList([layers()[index]]).eval()[0]
    x = torch.randn(1, *size, 8)
    with tracing(torch.nn.Sequential(layer)) as traces:
        layer(x)
    (trace,) = traces.values()
    routed = set(trace.routes(1, 2))
    weights = trace.attention(1, 2)
    assert weights.shape == size
    assert (weights >= 0).all()
    if (size[0] % 2, size[1] % 3) == (0, 0) and not trace.layer.soft_routing:
        assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    if isinstance(trace.layer, BiLevelRoutingAttention):
        for i in range(size[0]):
            for j in range(size[1]):
                assert (weights[i, j] > 0) == (trace.region(i, j) in routed)


def test_weights_reproduce_the_output_of_the_layer():
    """Attention of a query times the values is what the layer's attention returned, head average aside: with one head they are equal."""
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(8, 1, (2, 2), 2).double()
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    with tracing(torch.nn.Sequential(layer)) as traces:
        y = layer(x)
    (trace,) = traces.values()
    v = layer.qkv(x)[..., 16:]
    mixed = torch.stack([torch.stack([(trace.attention(i, j)[..., None] * v[0]).sum((0, 1)) for j in range(6)]) for i in range(4)])
    torch.testing.assert_close(layer.proj(mixed[None] + layer.local_context(v)), y)


@pytest.mark.parametrize(("size", "stride", "groups"), [((4, 6), 1, 1), ((5, 7), 2, 2), ((3, 4), 2, 1)])
def test_composed_attention_of_the_deformable_layer(size, stride, groups):
    """Both levels written out with dense weights, padding of map and agents included, for the second image of a batch."""
    torch.manual_seed(0)
    grid = (2, 3)
    layer = DeformableBiLevelRoutingAttention(
        8, 2, grid, 2, point_stride=stride, offset_kernel_size=3, offset_groups=groups, bias_grid=4
    ).double()
    with tracing(torch.nn.Sequential(layer)) as traces:
        layer(torch.randn(2, *size, 8, dtype=torch.float64))
    (trace,) = traces.values()
    call = trace.call("deformable_attention")
    bias = reference.position_bias(call["points"], call["bias_table"], call["grid_size"])
    to_agents = (call["scale"] * call["q"] @ call["k"].transpose(-1, -2) + bias).softmax(-1)[1].mean(0)
    q, k, routes = (trace.call("routed_attention")[name][1] for name in ("q", "k", "routes"))
    regions = []
    for region in range(6):
        mask = torch.full((6,), float("-inf"), dtype=torch.float64)
        mask[routes[region]] = 0
        logits = trace.call("routed_attention")["scale"] * q[:, region] @ k.flatten(1, 2).transpose(-1, -2)
        regions.append((logits + mask.repeat_interleave(k.shape[2])).softmax(-1).mean(0))
    stacked = torch.stack(regions)[None]  # (1, R, agents of a region, tokens of all regions)
    agent_grid = [math.ceil(n / stride) for n in trace.padded]
    padded_agents = [math.ceil(n / g) * g for n, g in zip(agent_grid, grid, strict=True)]
    agents = reference.merge(stacked, grid, tuple(padded_agents))[0].flatten(0, 1)
    for row, column in [(0, 0), (size[0] - 1, size[1] - 1), (1, 2)]:
        on_tokens = to_agents[row * trace.padded[1] + column] @ agents
        expected = reference.merge(on_tokens.view(1, 6, -1, 1), grid, trace.padded)[0, : size[0], : size[1], 0]
        torch.testing.assert_close(trace.attention(row, column, image=1), expected)
        listened = to_agents[row * trace.padded[1] + column].view(padded_agents)
        torch.testing.assert_close(trace.heard(row, column, image=1), listened[: trace.agents[0], : trace.agents[1]])
    height, width = trace.agents
    expected = to_agents.mean(0).view(padded_agents)[:height, :width]
    torch.testing.assert_close(trace.importance(image=1), expected)


def test_points_start_from_cell_centres_and_move_by_the_offsets():
    torch.manual_seed(0)
    layer = layers()[3]
    with tracing(torch.nn.Sequential(layer)) as traces:
        layer(torch.randn(2, 5, 7, 8))
    (trace,) = traces.values()
    points, start = trace.points(image=1)
    assert points.shape == start.shape == (2, 3, 5, 2)  # the padded 6x9 map at stride 2
    assert start[0, 0, :, 0].tolist() == pytest.approx([-0.8, -0.4, 0, 0.4, 0.8], abs=1e-6)
    moved = (points - start)[points.abs().amax(-1) < 1]
    torch.testing.assert_close(moved[:, 0], moved[:, 1])


def test_routes_are_the_regions_of_the_largest_affinities():
    torch.manual_seed(0)
    layer = layers()[0]
    x = torch.randn(2, 4, 6, 8)
    with tracing(torch.nn.Sequential(layer)) as traces:
        layer(x)
    (trace,) = traces.values()
    found = trace.affinities(1, 2, image=1)
    q, k, _ = (reference.partition(part, (2, 3)).mean(2)[1] for part in layer.qkv(x).chunk(3, -1))
    torch.testing.assert_close(found.flatten(), k @ q[trace.region(1, 2)])
    assert trace.routes(1, 2, image=1) == found.flatten().argsort(descending=True)[:2].tolist()


def test_bad_queries_say_what_is_valid():
    layer = layers()[0]
    with tracing(torch.nn.Sequential(layer)) as traces:
        layer(torch.randn(1, 4, 6, 8))
    (trace,) = traces.values()
    with pytest.raises(ValueError, match=r"query \(4, 0\) is not on the 4x6 map of 0"):
        trace.attention(4, 0)
    for image in (1, -1):
        with pytest.raises(ValueError, match=rf"image {image} is not one of the 1 traced in 0"):
            trace.attention(0, 0, image)
    for question in (trace.points, trace.importance):
        with pytest.raises(ValueError, match=r"0 has no points: it is a BiLevelRoutingAttention"):
            question()


def test_a_trace_stays_true_when_the_layer_changes():
    layer = layers()[0]
    with tracing(torch.nn.Sequential(layer)) as traces:
        layer(torch.randn(1, 4, 6, 8))
    (trace,) = traces.values()
    before = trace.attention(1, 2)
    layer.set_region_grid(4)
    assert torch.equal(trace.attention(1, 2), before)
