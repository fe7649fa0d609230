import pytest
import torch
from kernels import DEVICE, assert_close_to_reference, in_all_dtypes, relative_error, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from debiformer.ops import choose_backend, reference, routed_attention

pytest.importorskip("triton", reason="Triton is not installed")

# B, H, R, T, R', T', K, D
CASES = {
    "one key tile": (2, 2, 3, 9, 3, 9, 2, 32),
    "several key tiles": (1, 1, 3, 5, 3, 50, 2, 16),
    "several query tiles": (1, 1, 2, 70, 2, 3, 1, 16),
    "one query to a region": (1, 2, 5, 1, 5, 4, 3, 16),
    "single keys": (1, 1, 4, 3, 9, 1, 5, 8),
    "fewer query regions, odd width": (2, 1, 2, 4, 7, 6, 3, 24),
    "more query regions, narrow": (1, 3, 4, 2, 2, 5, 1, 5),
    "one of everything": (1, 1, 1, 1, 1, 1, 1, 1),
}


def random_case(batch, heads, regions, tokens, key_regions, key_tokens, topk, width, dtype=torch.float32):
    """Heads are slices of maps that hold queries, keys and values, as in the layers."""
    q = torch.randn(batch, regions, tokens, 3 * heads * width, device=DEVICE).to(dtype)
    kv = torch.randn(batch, key_regions, key_tokens, 3 * heads * width, device=DEVICE).to(dtype)
    q, _, _ = q.unflatten(-1, (3 * heads, width)).permute(0, 3, 1, 2, 4).chunk(3, dim=1)
    _, k, v = kv.unflatten(-1, (3 * heads, width)).permute(0, 3, 1, 2, 4).chunk(3, dim=1)
    routes = torch.stack([torch.randperm(key_regions)[:topk] for _ in range(batch * regions)]).view(batch, regions, topk)
    return q, k, v, routes.to(DEVICE)


def fused(routes, scale=0.3):
    return lambda q, k, v: routed_attention(q, k, v, routes, scale=scale, backend="triton")


def exact(routes, scale=0.3):
    return lambda q, k, v: reference.routed_attention(q, k, v, routes, scale)


@in_all_dtypes(CASES)
def test_same_as_reference(case, dtype):
    *qkv, routes = random_case(*CASES[case], dtype=dtype)
    assert_close_to_reference(fused(routes), exact(routes), qkv)


@pytest.mark.parametrize(
    "routes", [[[2, 2, 0], [2, 2, 2], [1, 2, 2]], [[3, 3, 3], [3, 3, 3], [3, 3, 3]], [[0, 1, 2], [3, 2, 1], [0, 3, 1]]]
)
def test_regions_may_be_listed_twice_or_never(routes):
    q, k, v, _ = random_case(1, 2, 3, 4, 4, 3, 3, 8)
    routes = torch.tensor([routes], device=DEVICE)
    assert_close_to_reference(fused(routes), exact(routes), (q, k, v))


@pytest.mark.parametrize("layout", ["contiguous", "channels apart", "one head for all", "one image for all"])
def test_any_strides(layout):
    *qkv, routes = random_case(2, 2, 4, 3, 4, 3, 2, 8)
    if layout == "contiguous":
        qkv = [x.contiguous() for x in qkv]
    elif layout == "channels apart":
        qkv = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in qkv]
    else:
        first = (slice(None), slice(1)) if layout == "one head for all" else (slice(1),)
        qkv = [x[first].expand(x.shape) for x in qkv]
    out = fused(routes)(*qkv)
    assert relative_error(out, exact(routes)(*(x.double() for x in qkv))) < 1e-5


def test_heads_merge_without_a_copy():
    *qkv, routes = random_case(2, 2, 4, 3, 4, 5, 2, 8)
    inputs = [x.detach().requires_grad_() for x in qkv]
    out = fused(routes)(*inputs)
    for x in (out, *torch.autograd.grad(out.square().sum(), inputs)):
        assert x.permute(0, 2, 3, 1, 4).is_contiguous()


@pytest.mark.parametrize("dims", [(), (4,), (0, 1, 2, 3, 4)])
def test_expanded_incoming_gradients(dims):
    *qkv, routes = random_case(2, 2, 3, 2, 3, 2, 2, 8)
    shape = [1 if i in dims else n for i, n in enumerate(qkv[0].shape)]
    cotangent = torch.randn(shape, device=DEVICE).expand(qkv[0].shape)
    found = with_gradients(fused(routes), qkv, cotangent)
    expected = with_gradients(exact(routes), [x.double() for x in qkv], cotangent.double())
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


def test_gradients_are_the_same_bits_every_time():
    *qkv, routes = random_case(1, 2, 4, 5, 4, 20, 2, 16)
    first, second = (with_gradients(fused(routes), qkv) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_logits_do_not_overflow():
    *qkv, routes = random_case(1, 1, 2, 3, 2, 40, 2, 16)
    qkv = [30 * qkv[0], 30 * qkv[1], qkv[2]]
    assert relative_error(fused(routes)(*qkv), exact(routes)(*(x.double() for x in qkv))) < 1e-3


def test_registration():
    from debiformer.ops.triton.routed_attention import forward

    *qkv, routes = random_case(2, 2, 3, 2, 3, 4, 2, 8)
    out, lse = forward(*qkv, routes, 0.3)
    inputs = [x.detach().requires_grad_() for x in qkv]
    torch.library.opcheck(torch.ops.debiformer.routed_attention.default, (*inputs, routes, 0.3))
    arguments = (*qkv, routes, out, lse, torch.randn_like(out), 0.3)
    torch.library.opcheck(torch.ops.debiformer.routed_attention_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v, routes: routed_attention(q, k, v, routes, backend="triton").square(),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    for tokens in (2, 3):
        *qkv, routes = random_case(2, 2, 3, tokens, 3, 4, 2, 8)
        found = with_gradients(lambda *x, routes=routes: compiled(*x, routes), qkv)
        expected = with_gradients(lambda *x, routes=routes: routed_attention(*x, routes, backend="eager").square(), qkv)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast():
    *qkv, routes = random_case(2, 2, 3, 2, 3, 4, 2, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = with_gradients(fused(routes), qkv)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    expected = with_gradients(exact(routes), [x.double() for x in qkv])
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 2e-2


def test_float_operations_are_counted():
    *qkv, routes = random_case(2, 2, 3, 5, 4, 6, 2, 8)
    with FlopCounterMode(display=False) as counter:
        with_gradients(fused(routes), qkv)
    one_product = 2 * (2 * 2 * 3 * 5) * (2 * 6) * 8
    assert counter.get_total_flops() == (2 + 5) * one_product


def test_all_regions_routed_to_is_dense_attention():
    q, k, v, _ = random_case(1, 2, 3, 4, 3, 5, 2, 8)
    assert choose_backend("routed_attention", q, k, v, None, backend="triton").backend == "eager"
    out = routed_attention(q, k, v, None, backend="triton")
    everywhere = torch.arange(3, device=DEVICE).expand(1, 3, 3)
    torch.testing.assert_close(out, routed_attention(q, k, v, everywhere, backend="triton"))


def test_an_empty_batch_stays_empty():
    *qkv, routes = (x[:0] for x in random_case(1, 2, 3, 4, 3, 5, 2, 8))
    assert [x.shape for x in with_gradients(fused(routes), qkv)] == [qkv[0].shape, *(x.shape for x in qkv)]
