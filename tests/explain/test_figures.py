"""Figures say what the arrays say: checked in the drawn artists, not in pixels."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pytest
import timm
import torch
from matplotlib.colors import to_hex
from PIL import Image

from debiformer.explain import tracing
from debiformer.explain.figures import COLOURS, draw_attention, draw_detections, draw_points, draw_routes, pixel


@pytest.fixture
def traces():
    torch.manual_seed(0)
    model = timm.create_model("debiformer_nano", num_classes=3).eval()
    with torch.no_grad(), tracing(model) as traces:
        model(torch.randn(1, 3, 64, 80))
    return traces


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


IMAGE = Image.new("RGB", (80, 64), (10, 120, 200))


def test_queries_fall_on_pixels_of_the_map(traces):
    trace = traces["stages.0.blocks.0.mixer"]
    assert trace.size == (16, 20)
    assert [pixel(trace, q) for q in [(0, 0), (0.999, 0.999), (1, 1), (0.5, 0.25)]] == [(0, 0), (15, 19), (15, 19), (4, 10)]


def test_routed_regions_are_outlined_where_they_lie(traces, axes):
    trace, query = traces["stages.0.blocks.0.mixer"], (0.3, 0.6)
    draw_routes(axes, IMAGE, trace, query)
    row, column = pixel(trace, query)
    drawn = {round(p.get_y() * 4) * 4 + round(p.get_x() * 4) for p in axes.patches if to_hex(p.get_edgecolor()) == COLOURS[1].lower()}
    assert drawn | {trace.region(row, column)} == {*trace.routes(row, column), trace.region(row, column)}
    assert all(p.get_width() == p.get_height() == 0.25 for p in axes.patches)


def test_points_end_where_they_were_sampled(traces, axes):
    trace = traces["stages.1.blocks.1.mixer"]
    draw_points(axes, IMAGE, trace)
    points, _ = trace.points()
    scale = torch.tensor([trace.padded[1] / trace.size[1], trace.padded[0] / trace.size[0]])
    expected = ((points + 1) / 2 * scale).flatten(0, 2)
    drawn = torch.tensor([c.get_offsets().data[0].tolist() for c in axes.collections])
    torch.testing.assert_close(drawn, expected, atol=1e-6, rtol=0)


def test_attention_is_drawn_relative_to_its_peak(traces, axes):
    trace = traces["stages.0.blocks.1.mixer"]
    draw_attention(axes, IMAGE, trace, (0.4, 0.4))
    shown = torch.from_numpy(axes.images[-1].get_array().data)
    weights = trace.attention(*pixel(trace, (0.4, 0.4)))
    torch.testing.assert_close(shown, weights / weights.max())


def test_wrong_labels_are_crossed_out_and_named(axes):
    boxes = [("a", 1, 1, 9, 9), ("b", 20, 20, 30, 30)]
    draw_detections(axes, IMAGE, boxes, ["a", "a"], {"a": "#000000", "b": "#ffffff"})
    assert [t.get_text() for t in axes.texts] == ["is b"]
