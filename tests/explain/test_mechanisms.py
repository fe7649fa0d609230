"""Every other attention layer, traced: its weights times its values are what it gave, and a rollout is the product of the matrices."""

import pytest
import timm
import torch
import torch.nn.functional as F

from debiformer.explain import rollout, tracing
from debiformer.layers import FullAttention
from debiformer.layers.sparse import (
    AxialAttention,
    CrissCrossAttention,
    CrossShapedWindowAttention,
    DeformableAttention,
    GridAttention,
    SubsampledAttention,
    WindowAttention,
)

DIM, HEADS, SIZE = 16, 2, (9, 10)
ON_PIXELS = {
    "window": lambda: WindowAttention(DIM, HEADS, 4),
    "shifted window": lambda: WindowAttention(DIM, HEADS, 4, shift=2),
    "grid": lambda: GridAttention(DIM, HEADS, 4),
    "row": lambda: AxialAttention(DIM, HEADS, "row"),
    "criss-cross": lambda: CrissCrossAttention(DIM, HEADS),
    "stripes": lambda: CrossShapedWindowAttention(DIM, HEADS, 3),
    "whole map": lambda: CrossShapedWindowAttention(DIM, HEADS, None),
    "full": lambda: FullAttention(DIM, HEADS),
}


def traced(layer, x):
    """The trace of one layer, and its output."""
    with tracing(torch.nn.Sequential(layer)) as traces:
        y = layer(x)
    (trace,) = traces.values()
    return trace, y


def matrices(trace, image=0):
    """Attention (heads, N, N) of every pixel, asked for one by one."""
    height, width = trace.size
    heads = len(trace.spread(torch.ones(trace.size), image))
    rows = [[trace.attention(i, j, image, head).flatten() for i in range(height) for j in range(width)] for head in range(heads)]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("name", ON_PIXELS)
def test_weights_times_values_are_what_the_layer_gave(name):
    torch.manual_seed(0)
    layer, x = ON_PIXELS[name]().double(), torch.randn(2, *SIZE, DIM, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if convolutions := getattr(layer, "local_context", None):  # what is added to the attention
        for parameter in convolutions.parameters():
            torch.nn.init.zeros_(parameter)
    trace, y = traced(layer, x)
    weights = matrices(trace, image=1)
    values = layer.qkv(x)[1].chunk(3, -1)[2].flatten(0, 1).unflatten(-1, (HEADS, -1)).transpose(0, 1)
    expected = layer.proj((weights @ values).transpose(0, 1).flatten(1)).view_as(y[1])
    torch.testing.assert_close(y[1], expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_attention_to_cells_is_shared_by_their_pixels():
    torch.manual_seed(0)
    layer, x = SubsampledAttention(DIM, HEADS, 3).double(), torch.randn(1, *SIZE, DIM, dtype=torch.float64)
    trace, _ = traced(layer, x)
    q = layer.query(x).flatten(1, 2).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    cells = layer.norm(layer.summary(F.pad(x, (0, 0, 0, 2)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    k = layer.key_value(cells.flatten(1, 2))[..., :DIM].unflatten(-1, (HEADS, -1)).transpose(1, 2)
    weights = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)[0, :, 4 * SIZE[1] + 7].unflatten(1, (3, 4))
    expected = weights.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :9, :10] / 9
    for head in range(HEADS):
        torch.testing.assert_close(trace.attention(4, 7, head=head), expected[head])


def test_attention_to_points_lands_on_the_pixels_that_are_read_there():
    """Against the corners of every point, weighed by hand."""
    torch.manual_seed(0)
    layer = DeformableAttention(DIM, HEADS, point_stride=2, offset_groups=2, bias_grid=5).double()
    trace, _ = traced(layer, torch.randn(1, *SIZE, DIM, dtype=torch.float64))
    points, start = trace.points()
    assert points.shape == start.shape == (2, 5, 5, 2)
    call = trace.call("deformable_attention")
    one = {name: value for name, value in call.items() if name not in ("v", "scale")}
    listened = torch.zeros(HEADS, 25, dtype=torch.float64)
    from debiformer.ops import reference

    bias = reference.position_bias(one["points"], one["bias_table"], one["grid_size"])
    listened = (call["scale"] * one["q"] @ one["k"].transpose(-1, -2) + bias).softmax(-1)[0, :, 3 * SIZE[1] + 8]
    for head in range(HEADS):
        expected = torch.zeros(SIZE, dtype=torch.float64)
        for weight, (x, y) in zip(listened[head], points[head].flatten(0, 1), strict=True):
            column, row = (x + 1) / 2 * (SIZE[1] - 1), (y + 1) / 2 * (SIZE[0] - 1)
            for i in (int(row.floor()), int(row.floor()) + 1):
                for j in (int(column.floor()), int(column.floor()) + 1):
                    if 0 <= i < SIZE[0] and 0 <= j < SIZE[1]:
                        expected[i, j] += weight * (1 - (row - i).abs()) * (1 - (column - j).abs())
        torch.testing.assert_close(trace.attention(3, 8, head=head), expected)
    assert trace.importance().sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    "name", ["debiformer_nano", "biformer_stl", "cross_shaped_window_stl", "deformable_stl", "spatially_separable_stl"]
)
def test_models_are_traced_layer_by_layer_and_unchanged(name):
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = model(x)
        with tracing(model) as traces:
            assert torch.equal(model(x), expected)
        assert [*traces] == [f"stages.{s}.blocks.{b}.mixer" for s, stage in enumerate(model.stages) for b in range(len(stage.blocks))]
        for trace in traces.values():
            weights = trace.attention(1, 2)
            assert weights.shape == trace.size
            assert (weights >= -1e-7).all()
            assert weights.sum() <= 1 + 1e-5
        found = rollout(traces)
    assert found.shape == traces["stages.0.blocks.0.mixer"].size
    assert found.sum().item() == pytest.approx(1, abs=1e-4)


def test_rollout_is_the_product_of_mixed_matrices():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(WindowAttention(DIM, HEADS, 4, shift=2), CrissCrossAttention(DIM, HEADS)).double()
    with tracing(layers) as traces:
        layers(torch.randn(1, *SIZE, DIM, dtype=torch.float64))
    first, second = (matrices(trace).mean(0) for trace in traces.values())
    eye = torch.eye(90, dtype=torch.float64)
    weights = torch.zeros(SIZE, dtype=torch.float64)
    weights[4, 4], weights[0, 9] = 2, 1
    expected = weights.flatten() @ (0.3 * eye + 0.7 * second) @ (0.3 * eye + 0.7 * first)
    torch.testing.assert_close(rollout(traces, weights, residual=0.3), expected.view(SIZE))


def test_bad_requests_say_what_is_valid():
    trace, _ = traced(WindowAttention(DIM, HEADS, 4), torch.randn(1, *SIZE, DIM))
    with pytest.raises(ValueError, match="head 2 is not one of the 2 of 0, from 0 on"):
        trace.attention(0, 0, head=2)
    with pytest.raises(ValueError, match=r"query \(0, 10\) is not on the 9x10 map of 0"):
        trace.attention(0, 10)
    for question in (trace.points, trace.importance, lambda: trace.routes(0, 0), lambda: trace.affinities(0, 0)):
        with pytest.raises(ValueError, match=r"0 has no (points|routes): it is a WindowAttention"):
            question()
    with pytest.raises(ValueError, match="nothing is traced"):
        rollout({})
    with pytest.raises(ValueError, match=r"weights \(3, 3\) are not of the last map, which is 9x10"):
        rollout({"0": trace}, torch.ones(3, 3))
    with pytest.raises(ValueError, match="residual=2 is not from 0 to 1"):
        rollout({"0": trace}, residual=2)
