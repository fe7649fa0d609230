import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from debiformer.ops import chunks, routed_attention

BACKENDS = ("auto", "eager", "reference")


def random_case(batch, heads, regions, tokens, key_regions, key_tokens, topk, width=3, dtype=torch.float64):
    q = torch.randn(batch, heads, regions, tokens, width, dtype=dtype)
    k, v = (torch.randn(batch, heads, key_regions, key_tokens, width, dtype=dtype) for _ in range(2))
    routes = torch.stack([torch.randperm(key_regions)[:topk] for _ in range(batch * regions)]).view(batch, regions, topk)
    return q, k, v, routes


def by_hand(q, k, v, routes, scale, weights=None):
    """One query token at a time, with Python's own arithmetic."""
    out = torch.empty_like(q)
    for b, h, r, t in (
        (b, h, r, t) for b in range(q.shape[0]) for h in range(q.shape[1]) for r in range(q.shape[2]) for t in range(q.shape[3])
    ):
        pairs = []
        for j, region in enumerate(routes[b, r].tolist()):
            w = 1.0 if weights is None else weights[b, r, j].item()
            for token in range(k.shape[3]):
                key, value = ([w * x for x in y[b, h, region, token].tolist()] for y in (k, v))
                pairs.append((math.exp(scale * sum(a * c for a, c in zip(q[b, h, r, t].tolist(), key, strict=True))), value))
        total = sum(e for e, _ in pairs)
        out[b, h, r, t] = torch.tensor([sum(e * value[d] for e, value in pairs) / total for d in range(q.shape[4])])
    return out


shapes = st.fixed_dictionaries(
    dict(
        batch=st.integers(1, 2),
        heads=st.integers(1, 2),
        regions=st.integers(1, 4),
        tokens=st.integers(1, 3),
        key_regions=st.integers(1, 4),
        key_tokens=st.integers(1, 3),
    )
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("soft", [False, True])
@given(shape=shapes, data=st.data())
def test_same_as_by_hand(backend, soft, shape, data):
    case = random_case(**shape, topk=data.draw(st.integers(1, shape["key_regions"])))
    weights = torch.rand(case[3].shape, dtype=torch.float64) if soft else None
    out = routed_attention(*case, scale=0.7, route_weights=weights, backend=backend)
    torch.testing.assert_close(out, by_hand(*case, 0.7, weights))


@pytest.mark.parametrize("backend", BACKENDS)
def test_routing_everywhere_is_dense_attention(backend):
    q, k, v, routes = random_case(2, 2, 6, 5, 6, 5, topk=6, width=8)
    dense = scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3))
    for everywhere in (routes, None):
        torch.testing.assert_close(routed_attention(q, k, v, everywhere, backend=backend).flatten(2, 3), dense)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topk", [2, 4])
def test_identity_values_give_the_weights(backend, topk):
    q, k, v, routes = random_case(2, 2, 3, 2, 4, 2, topk)
    identity = torch.eye(8, dtype=torch.float64).view(4, 2, 8).expand(2, 2, 4, 2, 8)
    weights = routed_attention(q, k, identity, routes, backend=backend)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 3, 2, dtype=torch.float64))
    torch.testing.assert_close(
        torch.einsum("bhrts,bhse->bhrte", weights, v.flatten(2, 3)), routed_attention(q, k, v, routes, backend=backend)
    )


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("topk", [2, 3])
def test_gradients(backend, topk):
    q, k, v, routes = random_case(2, 2, 2, 2, 3, 2, topk)
    weights = torch.rand(routes.shape, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, weights)]
    assert torch.autograd.gradcheck(lambda q, k, v, w: routed_attention(q, k, v, routes, backend=backend, route_weights=w), inputs)
    assert torch.autograd.gradcheck(lambda q, k, v: routed_attention(q, k, v, routes, backend=backend), inputs[:3])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_half_and_single_precision_agree_with_reference(dtype, tolerance):
    """Relative L2 error, gradients included."""
    case = random_case(2, 4, 9, 16, 9, 16, topk=3, width=32)
    exact, rounded = [x.clone().requires_grad_() for x in case[:3]], [x.to(dtype).requires_grad_() for x in case[:3]]
    exact = [x.detach().to(dtype).double().requires_grad_() for x in exact]  # the same rounded inputs
    cotangent = torch.randn_like(case[0]).to(dtype)
    expected = routed_attention(*exact, case[3], backend="reference")
    found = routed_attention(*rounded, case[3])
    expected.backward(cotangent.double())
    found.backward(cotangent)
    for a, b in [(found, expected), *((x.grad, y.grad) for x, y in zip(rounded, exact, strict=True))]:
        assert (a.double() - b).norm() / b.norm() < tolerance


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("soft", [False, True])
def test_chunks_change_nothing(tokens, soft, monkeypatch):
    """A few regions at a time, computed again in the backward pass: the same output and gradients as the reference."""
    monkeypatch.setattr(chunks, "CHUNK", 64)
    monkeypatch.setattr(chunks, "KEPT", 64)
    *qkv, routes = random_case(2, 2, 6, tokens, 6, 3, topk=2)
    weights = torch.rand(routes.shape, dtype=torch.float64) if soft else None
    inputs = [x.requires_grad_() for x in (*qkv, *([weights] if soft else []))]
    found, expected = (routed_attention(*qkv, routes, route_weights=weights, backend=backend) for backend in ("eager", "reference"))
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(out, inputs, cotangent) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(routed_attention(*qkv, routes, route_weights=weights), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_region_listed_twice_counts_twice(backend, tokens):
    q, k, v, _ = random_case(2, 2, 4, tokens, 4, 3, topk=2)
    routes = torch.tensor([[0, 0, 1], [2, 2, 2], [3, 1, 3], [0, 1, 2]]).expand(2, -1, -1)
    torch.testing.assert_close(routed_attention(q, k, v, routes, scale=0.7, backend=backend), by_hand(q, k, v, routes, 0.7))


def test_bad_input_names_the_problem():
    q, k, v, routes = random_case(2, 1, 4, 2, 4, 2, topk=2)
    bad = [
        ((q[0], k, v, routes), ValueError, r"expected q \(B, H, R, T, D\)"),
        ((q, k, v[:, :, :2], routes), ValueError, "k and v in R' and T'"),
        ((q[..., :2], k, v, routes), ValueError, "q and k in D"),
        ((q, k, v, routes[:1]), ValueError, "with the B and R of q"),
        ((q, k.float(), v, routes), ValueError, r"float64, torch\.float32"),
        ((q, k, v, routes.int()), ValueError, "int64"),
        ((q, k, v, routes[..., :0]), ValueError, "K of at least 1"),
        ((q, k, v, routes + 2), IndexError, "leave the 4 key regions"),
        ((q, k, v, routes - 4), IndexError, "leave the 4 key regions"),
    ]
    for arguments, error, message in bad:
        with pytest.raises(error, match=message):
            routed_attention(*arguments)
    with pytest.raises(ValueError, match=r"backend='cuda' is not one of auto, triton, eager, reference"):
        routed_attention(q, k, v, routes, backend="cuda")
