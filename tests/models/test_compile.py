"""Whole models compile without a graph break, and their blocks share graphs."""

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

import debiformer  # noqa: F401  # registers the presets


def images(batch, height, width):
    return torch.randn(batch, 3, height, width)


@pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny", "biformer_stl"])
def test_a_whole_model_is_one_graph(name):
    torch.compiler.reset()
    model, counter = timm.create_model(name, num_classes=5).eval(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = images(2, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_training_compiles_to_the_same_gradients():
    torch.compiler.reset()
    model = timm.create_model("debiformer_nano", num_classes=5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(2, 64, 96)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for eager, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4)


def test_blocks_of_a_stage_share_a_graph():
    torch.compiler.reset()
    model, counter = timm.create_model("debiformer_tiny", num_classes=5).eval(), CompileCounter()
    plain = timm.create_model("debiformer_tiny", num_classes=5).eval()
    plain.load_state_dict(model.state_dict())
    assert model.compile_blocks(backend=counter) is model
    with torch.inference_mode():  # elsewhere a stage's first block, whose input is a view, has a graph of its own
        x = images(2, 64, 96)
        torch.testing.assert_close(model(x), plain(x))
        assert counter.frame_count == 7  # 14 blocks: two kinds in three stages, one in the last
        x = images(2, 96, 128)
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("debiformer_nano", False),
        ("biformer_stl", False),
        pytest.param("debiformer_nano", True, marks=pytest.mark.thorough),
        pytest.param("biformer_stl", True, marks=pytest.mark.thorough),
    ],
)
def test_one_graph_serves_every_size(name, train):
    """Batch, height and width are dynamic; the sizes take in maps that the grid divides and maps that it does not."""
    torch.compiler.reset()
    model, counter = timm.create_model(name, num_classes=5).train(train), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch, height, width in ((4, 224, 192), (5, 256, 256), (6, 225, 270)):  # below four images PyTorch's convolutions ask for another
        x = images(batch, height, width)
        for axis in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, axis)
        with torch.set_grad_enabled(train):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_blocks_compile_for_every_size():
    torch.compiler.reset()
    model, counter = timm.create_model("debiformer_nano", num_classes=5).eval(), CompileCounter()
    plain = timm.create_model("debiformer_nano", num_classes=5).eval()
    plain.load_state_dict(model.state_dict())
    model.compile_blocks(backend=counter, dynamic=True)
    counts = []
    with torch.inference_mode():
        for size in ((4, 64, 96), (5, 80, 80), (6, 97, 130)):
            x = images(*size)
            torch.testing.assert_close(model(x), plain(x))
            counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
