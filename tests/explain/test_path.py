"""The figure of a query's path: what it draws, for every kind of layer, padded images among them, and what it refuses."""

import matplotlib

matplotlib.use("agg")

import pytest
import timm
import torch
from matplotlib.colors import to_hex
from PIL import Image

from debiformer.explain.figures import COLOURS
from debiformer.explain.look import look
from debiformer.explain.path import path_figure

IMAGE = Image.new("RGB", (80, 64), (10, 120, 200))


def seen(name="debiformer_nano", covered=(1.0, 1.0)):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    return look(model, IMAGE, torch.randn(1, 3, 64, 80), covered)


@pytest.mark.parametrize(
    ("name", "stage", "block", "panels"),
    [
        ("debiformer_nano", 1, 2, 4),
        ("debiformer_nano", 1, 1, 3),
        ("deformable_stl", 3, 2, 3),
        ("criss_cross_stl", 2, 1, 2),
        ("biformer_stl", 4, 1, 2),
    ],
)
def test_every_layer_has_its_steps(name, stage, block, panels):
    figure = path_figure(seen(name), stage, block, 30, 20, head=0)
    assert len(figure.axes) == panels
    assert all(axes.get_title() for axes in figure.axes)
    assert f"Stage {stage}, block {block}" in figure.get_suptitle()
    for axes in figure.axes:  # a star on the query
        (x,), (y,) = axes.lines[-1].get_data()
        assert (x, y) == (30 / 80, 20 / 64)
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 1), (1, 0))


def test_points_are_as_large_as_they_are_heard():
    found = seen()
    trace = found.trace(1, 2)
    figure = path_figure(found, 1, 2, 30, 20)
    (drawn,) = figure.axes[1].collections
    weights = trace.heard(*found.pixel(trace, 30, 20)).flatten()
    torch.testing.assert_close(torch.from_numpy(drawn.get_sizes()), 8 + 150 * weights / weights.max())
    places = (trace.points()[0].flatten(0, 2) + 1) / 2 * torch.tensor([trace.padded[1] / trace.size[1], trace.padded[0] / trace.size[0]])
    torch.testing.assert_close(torch.from_numpy(drawn.get_offsets().data).float(), places)


def test_routes_are_outlined_and_the_attention_lies_on_them():
    found = seen()
    trace = found.trace(1, 1)
    figure = path_figure(found, 1, 1, 30, 20)
    outlined = {
        round(p.get_y() * 4) * 4 + round(p.get_x() * 4)
        for p in figure.axes[1].patches
        if to_hex(p.get_edgecolor()) in (COLOURS[0].lower(), "#000000")
    }
    row, column = found.pixel(trace, 30, 20)
    assert outlined == {*trace.routes(row, column), trace.region(row, column)}
    shown = torch.from_numpy(figure.axes[2].images[-1].get_array().data)
    weights = trace.attention(row, column)
    torch.testing.assert_close(shown, weights / weights.max())


def test_what_padding_has_of_a_map_is_not_shown():
    found = seen(covered=(0.5, 0.8))
    trace = found.trace(1, 1)
    assert found.pixel(trace, 79, 63) == (7, 15)
    assert found.on_image(torch.zeros(trace.size)).shape == (8, 16)


def test_bad_requests_say_what_is_valid():
    found = seen()
    for arguments, message in [
        ((5, 1, 0, 0), "stage 5 is none of 1, 2, 3, 4"),
        ((1, 3, 0, 0), "block 3 of stage 1 is none of 1, 2"),
        ((1, 1, 80, 0), "query 80,0 is not on the image, which is 80 wide and 64 high"),
        ((1, 1, 0, -1), "query 0,-1 is not on the image"),
        ((2, 1, 0, 0, 2), "head 2 is not one of the 2 of stages.1.blocks.0.mixer, from 0 on"),
    ]:
        with pytest.raises(ValueError, match=message):
            path_figure(found, *arguments)
    with pytest.raises(ValueError, match="ResNet has no attention layers that can be traced"):
        look(timm.create_model("resnet18").eval(), IMAGE, torch.randn(1, 3, 64, 64))
