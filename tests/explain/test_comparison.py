"""Models side by side: a panel each, with what that model's arrays say."""

import matplotlib

matplotlib.use("agg")

import pytest
import timm
import torch
from PIL import Image

from debiformer.explain import rollout
from debiformer.explain.comparison import attention_side_by_side, evidence_side_by_side
from debiformer.explain.look import look

IMAGE = Image.new("RGB", (64, 64), (10, 120, 200))


@pytest.fixture(scope="module")
def looks():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    names = ("criss_cross_stl", "debiformer_stl")
    return {name: look(timm.create_model(name, num_classes=3).eval(), IMAGE, x) for name in names}


def shown(axes):
    return torch.from_numpy(axes.images[-1].get_array().data)


def test_a_layer_of_each(looks):
    figure = attention_side_by_side(looks, 1, 2, 30, 20)
    assert [axes.get_title() for axes in figure.axes] == ["the image", *looks]
    for axes, seen in zip(figure.axes[1:], looks.values(), strict=True):
        trace = seen.trace(1, 2)
        weights = trace.attention(*seen.pixel(trace, 30, 20))
        torch.testing.assert_close(shown(axes), weights / weights.max())


def test_a_stage_of_each(looks):
    figure = attention_side_by_side(looks, 1, None, 30, 20)
    seen = looks["criss_cross_stl"]
    first, second = (seen.trace(1, block) for block in (1, 2))
    weights = rollout({"a": first, "b": second}, first.one(*seen.pixel(first, 30, 20)), residual=0.2)
    torch.testing.assert_close(shown(figure.axes[1]), weights / weights.max())


def test_maps_of_each(looks):
    maps = {name: torch.rand(64, 64) for name in looks}
    figure = evidence_side_by_side(looks, maps, "evidence for a", columns=2)
    assert figure.get_suptitle() == "evidence for a"
    assert len(figure.axes) == 4
    for axes, values in zip(figure.axes[1:], maps.values(), strict=False):
        torch.testing.assert_close(shown(axes), values / values.max())
    with pytest.raises(ValueError, match="maps of a do not go with looks of criss_cross_stl, debiformer_stl"):
        evidence_side_by_side(looks, {"a": torch.rand(2, 2)}, "")
