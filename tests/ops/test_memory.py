"""Memory is bounded by chunks, whatever the size of the map: no intermediate is larger than one, or than a few maps."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from debiformer.layers import BiLevelRoutingAttention
from debiformer.ops import chunks, deformable_attention


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **kwargs or {})
        for x in out if isinstance(out, list | tuple) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 2**16)
    monkeypatch.setattr(chunks, "KEPT", 2**16)


@pytest.mark.usefixtures("small_chunks")
def test_routing_layer():
    """The layer that is reported as taking 100 GB, on a smaller map: gathered keys would be 4 maps, logits 35."""
    layer, x = BiLevelRoutingAttention(dim=20, num_heads=4, region_grid=7, topk=4, layout="NCHW"), torch.randn(1, 20, 150, 125)
    with Largest() as largest:
        layer(x.requires_grad_()).sum().backward()
    padded = 154 * 126 * 20
    assert largest.elements <= 3 * padded  # queries, keys and values in one


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("train", [False, True])
def test_deformable_attention(train):
    """The bias of every pair would be 627,200 elements."""
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=train) for n in (6400, 49, 49))
    points, table = torch.rand(1, 2, 49, 2), torch.randn(2, 13, 13, requires_grad=train)
    with Largest() as largest:
        out = deformable_attention(q, k, v, points, table, (80, 80))
        if train:
            out.sum().backward()
    assert largest.elements <= max(chunks.CHUNK, q.numel())
