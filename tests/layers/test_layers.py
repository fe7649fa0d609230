"""What the layers promise beyond parity: any size, either layout, options, and errors that say what to do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from debiformer.layers import (
    BiLevelRoutingAttention,
    ConvFeedForward,
    DeformableBiLevelRoutingAttention,
    FullAttention,
    OffsetNetwork,
    ResidualDepthwiseConv2d,
)
from debiformer.ops import pad_to_grid, partition, reference, reference_points

SMALL_DBRA = dict(point_stride=2, offset_kernel_size=3, offset_groups=2, bias_grid=(5, 4))


def both(**kwargs):
    yield BiLevelRoutingAttention(8, 2, (2, 3), 2, **kwargs)
    yield DeformableBiLevelRoutingAttention(8, 2, (2, 3), 2, **SMALL_DBRA, **kwargs)


@settings(deadline=None, max_examples=25)
@given(size=st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_any_size_in_either_layout(size):
    x = torch.randn(2, *size, 8)
    for layer in both():
        y = layer(x)
        assert y.shape == x.shape
        assert y.isfinite().all()
        layer.layout = "NCHW"
        torch.testing.assert_close(layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), y)


def test_the_grid_changes_without_touching_parameters():
    for layer in both():
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        x = torch.randn(1, 8, 8, 8)
        coarse = layer(x)
        layer.set_region_grid(4)
        assert layer.region_grid == (4, 4)
        assert not torch.equal(layer(x), coarse)
        layer.set_region_grid((2, 3))
        assert torch.equal(layer(x), coarse)
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
        with pytest.raises(ValueError, match=r"topk=2 is not between 1 and the 1 regions of region_grid=\(1, 1\)"):
            layer.set_region_grid(1)


def test_soft_routing_weighs_keys_and_values_by_softmax_of_affinity():
    """As the published code's soft routing does, written out; and the choice gets a gradient through it."""
    layer = BiLevelRoutingAttention(8, 2, (2, 2), 2, soft_routing=True).double()
    x = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    routes, affinities = reference.route(partition(q, (2, 2)).mean(2), partition(k, (2, 2)).mean(2), 2)
    heads = [partition(t, (2, 2)).unflatten(-1, (2, 4)).permute(0, 3, 1, 2, 4) for t in (q, k, v)]
    weights = (8**-0.5 * affinities).softmax(dim=-1)
    out = reference.routed_attention(*heads, routes, 8**-0.5, weights).permute(0, 2, 3, 1, 4).flatten(-2)
    expected = layer.proj(reference.merge(out, (2, 2), (4, 6)) + layer.local_context(v))
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), _hard(layer, x))


def _hard(layer, x):
    layer.soft_routing = False
    out = layer(x)
    layer.soft_routing = True
    return out


def test_routing_to_all_regions_is_full_attention_plus_context():
    layer = BiLevelRoutingAttention(8, 2, (2, 2), 4).double()
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    q, k, v = (t.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for t in layer.qkv(x).chunk(3, dim=-1))
    attention = (8**-0.5 * q @ k.transpose(-1, -2)).softmax(dim=-1) @ v
    context = layer.local_context(layer.qkv(x)[..., 16:])
    torch.testing.assert_close(layer(x), layer.proj(attention.transpose(1, 2).reshape(x.shape) + context))


def test_released_offsets_move_points_along_the_diagonal_and_the_papers_do_not():
    q = torch.randn(2, 9, 7, 8)
    for channels, diagonal in ((1, True), (2, False)):
        torch.manual_seed(0)
        points = OffsetNetwork(8, kernel_size=3, stride=2, groups=2, channels=channels)(q)
        assert points.shape == (2, 2, 5, 4, 2)
        assert points.abs().max() <= 1
        moved = points - reference_points(5, 4, dtype=points.dtype, device=points.device)
        inside = (points.abs() < 1).all(dim=-1)
        assert torch.allclose(moved[..., 0][inside], moved[..., 1][inside], atol=1e-6) is diagonal


def test_points_stay_in_float32_in_half_precision():
    network = OffsetNetwork(8, kernel_size=3, stride=2, groups=2).bfloat16()
    assert network(torch.randn(1, 8, 8, 8).bfloat16()).dtype == torch.float32
    for layer in both():
        x = torch.randn(1, 9, 7, 8)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = layer(x)
        exact = layer(x)
        assert mixed.dtype == torch.bfloat16
        assert (mixed - exact).norm() / exact.norm() < 0.05


def test_every_parameter_gets_a_gradient():
    for layer in [
        *both(),
        *both(soft_routing=True),
        *both(layout="NCHW"),
        FullAttention(8, 2),
        ConvFeedForward(8, 2),
        ResidualDepthwiseConv2d(8, 3),
    ]:
        layer(torch.randn(2, 8, 8, 8)).sum().backward()
        assert [n for n, p in layer.named_parameters() if p.grad is None] == []


def test_an_empty_batch_stays_empty():
    for layer in [*both(), FullAttention(8, 2)]:
        assert layer(torch.zeros(0, 4, 6, 8)).shape == (0, 4, 6, 8)


def test_padding_takes_part_as_published():
    """A map that the grid does not divide equals the zero-padded map, cropped."""
    layer = BiLevelRoutingAttention(8, 2, (2, 3), 2)
    x = torch.randn(1, 5, 7, 8)
    torch.testing.assert_close(layer(x), layer(pad_to_grid(x, (2, 3)))[:, :5, :7])


def test_bad_arguments_name_the_numbers():
    bad = [
        (dict(dim=10, num_heads=3), "num_heads=3 does not divide dim=10"),
        (dict(dim=8, num_heads=2, region_grid=2, topk=5), r"topk=5 is not between 1 and the 4 regions of region_grid=\(2, 2\)"),
        (dict(dim=8, num_heads=2, region_grid=2, topk=0), "topk=0"),
        (dict(dim=8, num_heads=2, region_grid=(2, 0)), r"region_grid=\(2, 0\)"),
        (dict(dim=8, num_heads=0), "num_heads=0 is not a positive integer"),
        (dict(dim=8, num_heads=2, topk=2.0), "topk=2.0 is not a positive integer"),
        (dict(dim=8, num_heads=2, backend="fast"), "backend='fast' is not one of auto, triton, eager, reference"),
        (dict(dim=8, num_heads=2, layout="CHW"), "layout='CHW' is neither 'NHWC' nor 'NCHW'"),
    ]
    for kwargs, message in bad:
        for layer in (BiLevelRoutingAttention, DeformableBiLevelRoutingAttention):
            with pytest.raises(ValueError, match=message):
                layer(**kwargs)
    for kwargs, message in [
        (dict(offset_groups=3), "offset_groups=3 does not divide num_heads=2"),
        (dict(offset_kernel_size=4), "offset_kernel_size=4 is even"),
        (dict(offset_channels=3), "offset_channels=3"),
        (dict(offset_groups=0), "offset_groups=0 is not a positive integer"),
        (dict(point_stride=0), "point_stride=0 is not a positive integer"),
        (dict(offset_kernel_size=-3), "offset_kernel_size=-3 is not a positive integer"),
        (dict(bias_grid=0), "bias_grid=0 is not a positive integer or a pair"),
        (dict(agent_mlp_ratio=-1), "mlp ratio=-1 is not above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            DeformableBiLevelRoutingAttention(8, 2, **kwargs)
    with pytest.raises(ValueError, match="num_heads=8 does not divide dim=12"):
        FullAttention(12)


def test_a_map_in_the_wrong_layout_is_recognised():
    for layer in both():
        with pytest.raises(ValueError, match=r"expected a NHWC map with 8 channels \(layout='NHWC'\), got shape \(1, 8, 4, 4\)"):
            layer(torch.zeros(1, 8, 4, 4))
    with pytest.raises(ValueError, match="expected a NCHW map"):
        BiLevelRoutingAttention(8, 2, layout="NCHW")(torch.zeros(1, 4, 4, 8))
