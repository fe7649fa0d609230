import pytest
import torch
from kernels import DEVICE, assert_close_to_reference, in_all_dtypes, relative_error, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from debiformer.ops import deformable_attention, reference

pytest.importorskip("triton", reason="Triton is not installed")

# B, groups, heads of a group, grid, M, table, D
CASES = {
    "several rectangles of queries": (1, 1, 2, (10, 9), 9, (19, 17), 8),
    "one row of queries": (2, 1, 1, (1, 5), 3, (3, 9), 16),
    "one column of queries": (1, 2, 1, (5, 1), 4, (9, 1), 5),
    "one query, one point": (1, 1, 1, (1, 1), 1, (1, 1), 1),
    "wide grid, small table": (1, 1, 1, (2, 40), 7, (3, 5), 16),
    "grid below the table's": (1, 2, 1, (3, 4), 20, (13, 21), 24),
    "several tiles of points": (1, 1, 1, (6, 7), 70, (11, 13), 32),
}


def random_case(batch, groups, heads_per_group, grid, count, table, width, dtype=torch.float32):
    """Heads are slices, as in the layers; points lie in and around [-1, 1]."""
    heads = groups * heads_per_group
    q = torch.randn(batch, grid[0] * grid[1], 2 * heads, width, device=DEVICE).to(dtype)[:, :, :heads].transpose(1, 2)
    k, v = torch.randn(batch, count, 2 * heads, width, device=DEVICE).to(dtype).transpose(1, 2).chunk(2, dim=1)
    points = 2.6 * torch.rand(batch, groups, count, 2, device=DEVICE) - 1.3
    return (q, k, v, points, torch.randn(heads, *table, device=DEVICE)), grid


def fused(grid, scale=0.3):
    return lambda *x: deformable_attention(*x, grid, scale=scale, backend="triton")


def exact(grid, scale=0.3):
    return lambda *x: reference.deformable_attention(*x, grid, scale)


@in_all_dtypes(CASES)
def test_same_as_reference(case, dtype):
    inputs, grid = random_case(*CASES[case], dtype=dtype)
    assert_close_to_reference(fused(grid), exact(grid), inputs)


def test_points_and_table_may_be_in_half_precision():
    (q, k, v, points, table), grid = random_case(1, 1, 1, (3, 4), 5, (5, 7), 8, torch.bfloat16)
    assert_close_to_reference(fused(grid), exact(grid), (q, k, v, points.bfloat16(), table.bfloat16()))


def test_native_table_and_points_on_pixels():
    """The bias is then an entry of the table; no gradient of the points, which have a kink there."""
    (q, k, v, _, table), grid = random_case(1, 1, 2, (3, 4), 12, (5, 7), 8)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 4), indexing="ij")
    points = torch.stack([x, y], dim=-1).view(1, 1, 12, 2).to(DEVICE)
    found = with_gradients(lambda q, k, v, table: fused(grid)(q, k, v, points, table), (q, k, v, table))
    expected = with_gradients(lambda q, k, v, table: exact(grid)(q, k, v, points.double(), table), [a.double() for a in (q, k, v, table)])
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


def test_points_far_off_see_no_bias():
    (q, k, v, _, table), grid = random_case(1, 1, 1, (3, 4), 5, (5, 7), 8)
    far = torch.tensor([[9.0, 0.0], [-9.0, 0.0], [0.0, 9.0], [0.0, -9.0], [1e9, -1e9]], device=DEVICE).view(1, 1, 5, 2)
    found = fused(grid)(q, k, v, far, table)
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3))


@pytest.mark.parametrize("count", [20, 70])
def test_gradients_of_logits_a_few_at_a_time(count, monkeypatch):
    """One tile of points of one image at a time, and few programs, must give what all at once gives."""
    from debiformer.ops.triton import deformable_attention as kernels
    from debiformer.ops.triton import launch

    monkeypatch.setattr(kernels, "LOGIT_GRADIENT_BYTES", 1)
    monkeypatch.setattr(launch, "PROGRAMS", 3)
    inputs, grid = random_case(2, 1, 1, (3, 7), count, (9, 13), 8)
    assert_close_to_reference(fused(grid), exact(grid), inputs)


def test_heads_merge_without_a_copy():
    inputs, grid = random_case(2, 2, 1, (3, 4), 5, (5, 7), 8)
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = fused(grid)(*inputs)
    d_q, d_k, d_v, *_ = torch.autograd.grad(out.square().sum(), inputs)
    for x in (out, d_q, d_k, d_v):
        assert x.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dims", [(), (3,), (0, 1, 2, 3)])
def test_expanded_incoming_gradients(dims):
    inputs, grid = random_case(2, 1, 2, (2, 3), 4, (3, 5), 8)
    shape = [1 if i in dims else n for i, n in enumerate(inputs[0].shape)]
    cotangent = torch.randn(shape, device=DEVICE).expand(inputs[0].shape)
    found = with_gradients(fused(grid), inputs, cotangent)
    expected = with_gradients(exact(grid), [x.double() for x in inputs], cotangent.double())
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


def test_gradients_are_the_same_bits_every_time():
    inputs, grid = random_case(1, 1, 2, (5, 6), 20, (11, 13), 16)
    first, second = (with_gradients(fused(grid), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_registration():
    from debiformer.ops.triton.deformable_attention import forward

    inputs, grid = random_case(1, 2, 1, (2, 3), 4, (3, 5), 8)
    out, lse = forward(*inputs, grid, 0.3)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.debiformer.deformable_attention.default, (*leaves, *grid, 0.3))
    arguments = (*inputs, out, lse, torch.randn_like(out), *grid, 0.3)
    torch.library.opcheck(torch.ops.debiformer.deformable_attention_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    torch.compiler.reset()

    def attend(q, k, v, points, table, height):
        return deformable_attention(q, k, v, points, table, (height, q.shape[2] // height), backend="triton").square()

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for grid in ((2, 3), (3, 4)):
        inputs, _ = random_case(2, 2, 1, grid, 5, (5, 7), 8)
        found = with_gradients(lambda *x, height=grid[0]: compiled(*x, height), inputs)
        expected = with_gradients(lambda *x, grid=grid: deformable_attention(*x, grid, backend="reference").square(), inputs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_leaves_points_and_table_as_they_are():
    inputs, grid = random_case(2, 1, 2, (4, 5), 6, (7, 9), 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = with_gradients(fused(grid), inputs)
    assert [x.dtype for x in found] == [torch.bfloat16] + 5 * [torch.float32]
    rounded = [x.bfloat16().double() for x in inputs[:3]] + [x.double() for x in inputs[3:]]
    expected = with_gradients(exact(grid), rounded)
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 5e-3


def test_float_operations_are_counted():
    inputs, grid = random_case(2, 1, 2, (3, 4), 5, (5, 7), 8)
    with FlopCounterMode(display=False) as counter:
        with_gradients(fused(grid), inputs)
    assert counter.get_total_flops() == (2 + 5) * 2 * (2 * 2 * 12) * 5 * 8


def test_an_empty_batch_stays_empty():
    inputs, grid = random_case(1, 1, 2, (3, 4), 5, (5, 7), 8)
    inputs = [x[:0] for x in inputs[:4]] + [inputs[4]]
    found = with_gradients(fused(grid), inputs)
    assert [x.shape for x in found] == [inputs[0].shape, *(x.shape for x in inputs)]
    assert not found[-1].any()
