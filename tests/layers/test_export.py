"""Exported graphs, which are written in a form of their own, against the layers and models themselves."""

import pytest
import timm
import torch

from debiformer.layers import BiLevelRoutingAttention, DeformableBiLevelRoutingAttention
from debiformer.ops import chunks


@pytest.mark.parametrize("topk", [1, 9, 16])  # gathered, masked, everywhere
@pytest.mark.parametrize("size", [(8, 8), (13, 10), (24, 16)])
@pytest.mark.parametrize("groups", [None, 1, 2])
def test_graph_gives_what_the_layer_gives(topk, size, groups):
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(8, 2, 4, topk)
    if groups:
        layer = DeformableBiLevelRoutingAttention(8, 2, 4, topk, point_stride=2, offset_kernel_size=3, offset_groups=groups, bias_grid=8)
    layer, x = layer.double().eval(), torch.randn(2, *size, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("groups", [None, 2])
def test_a_large_map_is_exported_in_chunks(groups, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 512)
    test_graph_gives_what_the_layer_gives(1, (13, 10), groups)


def test_openvino_gives_what_the_model_gives():
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, x = timm.create_model("debiformer_tiny").eval().fuse_for_inference(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        graph = openvino.convert_model(torch.export.export(model, (x,)), input=[tuple(x.shape)])
        expected = model(x)
    run = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE"})
    torch.testing.assert_close(torch.from_numpy(run([x.numpy()])[0].copy()), expected, rtol=1e-4, atol=1e-5)
