"""The layers compile whole, and one graph serves every size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from debiformer.layers import BiLevelRoutingAttention, DeformableBiLevelRoutingAttention

LAYERS = {
    "bra": lambda: BiLevelRoutingAttention(16, 2, 4, 3),
    "bra_nchw_soft": lambda: BiLevelRoutingAttention(16, 2, 4, 3, layout="NCHW", soft_routing=True),
    "dbra": lambda: DeformableBiLevelRoutingAttention(16, 2, 4, 3, point_stride=2, offset_kernel_size=3, offset_groups=2, bias_grid=8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_for_all_sizes(name):
    layer = LAYERS[name]().eval()
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for batch, height, width in ((2, 21, 19), (3, 33, 40), (5, 9, 64), (2, 20, 24)):
        x = torch.randn(batch, height, width, 16)
        x = x.permute(0, 3, 1, 2) if layer.layout == "NCHW" else x
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_has_the_gradients_of_all_sizes(name):
    layer = LAYERS[name]().double()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for batch, height, width in ((2, 21, 19), (3, 32, 40), (2, 33, 20)):  # padded, not padded, padded below
        x = torch.randn(batch, height, width, 16, dtype=torch.float64)
        x = (x.permute(0, 3, 1, 2) if layer.layout == "NCHW" else x).requires_grad_()
        cotangent, inputs = torch.randn_like(x), [x, *layer.parameters()]
        found, expected = (torch.autograd.grad(run(x), inputs, cotangent) for run in (compiled, layer))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
