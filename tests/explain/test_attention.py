import pytest
import timm
import torch

from debiformer.explain import tracing
from debiformer.layers import BiLevelRoutingAttention, DeformableBiLevelRoutingAttention


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
def test_weights_are_those_of_the_forward_pass(index, size):
    """A pixel changes a query's output exactly where the traced attention gives it weight, as far as routing is concerned."""
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
    if trace.deformable is None:
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


def test_composed_attention_of_the_deformable_layer():
    """With zero offsets and one agent for the whole grid cell structure known, composing by hand gives the same map."""
    torch.manual_seed(0)
    layer = DeformableBiLevelRoutingAttention(8, 2, (2, 2), 2, point_stride=1, offset_kernel_size=3, offset_groups=1, bias_grid=4)
    x = torch.randn(1, 4, 4, 8)
    with tracing(torch.nn.Sequential(layer)) as traces:
        layer(x)
    (trace,) = traces.values()
    to_agents = trace.point_weights()[0]
    torch.testing.assert_close(to_agents.sum(-1), torch.ones(16))
    q, k, routes = (trace.routed[n] for n in ("q", "k", "routes"))
    agents = torch.zeros(16, 4, 4)
    for region in range(4):
        logits = trace.routed["scale"] * q[0, :, region] @ k[0][:, routes[0, region]].flatten(1, 2).transpose(-1, -2)
        weights = logits.softmax(-1).mean(0)  # (4 agents, 2 regions x 4 tokens)
        for t in range(4):
            agent = (region // 2 * 2 + t // 2) * 4 + region % 2 * 2 + t % 2
            for j, target in enumerate(routes[0, region].tolist()):
                rows, cols = slice(target // 2 * 2, target // 2 * 2 + 2), slice(target % 2 * 2, target % 2 * 2 + 2)
                agents[agent, rows, cols] = weights[t, 4 * j : 4 * j + 4].view(2, 2)
    torch.testing.assert_close(trace.attention(2, 1), torch.einsum("a,ahw->hw", to_agents[2 * 4 + 1], agents))


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


def test_bad_queries_say_what_is_valid():
    layer = layers()[0]
    with tracing(torch.nn.Sequential(layer)) as traces:
        layer(torch.randn(1, 4, 6, 8))
    (trace,) = traces.values()
    with pytest.raises(ValueError, match=r"query \(4, 0\) is not on the 4x6 map of 0"):
        trace.attention(4, 0)
    with pytest.raises(ValueError, match="0 has no points: it is a BiLevelRoutingAttention"):
        trace.points()
