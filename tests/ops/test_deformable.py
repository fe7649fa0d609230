import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from debiformer.ops import chunks, deformable_attention, reference, reference_points, sample_points
from debiformer.ops.deformable import position_bias

BACKENDS = ("auto", "eager", "reference")


def bilinear(image, x, y):
    """A 2-D list of numbers read at (x, y) in [-1, 1], corners aligned, zero outside."""
    height, width = len(image), len(image[0])
    column, row = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
    total = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += image[i][j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


def random_points(*shape):
    """On, within and beyond the border."""
    points = 2.6 * torch.rand(*shape, 2, dtype=torch.float64) - 1.3
    on_border = torch.rand(points.shape) < 0.2
    return torch.where(on_border, points.sign(), points)


def test_reference_points_are_cell_centres():
    points = reference_points(2, 4, dtype=torch.float64, device=torch.device("cpu"))
    assert points[..., 0].tolist() == [[-0.75, -0.25, 0.25, 0.75]] * 2
    assert points[..., 1].tolist() == [[-0.5] * 4, [0.5] * 4]


@pytest.mark.parametrize("backend", BACKENDS)
@given(size=st.tuples(st.integers(1, 6), st.integers(1, 6)), groups=st.integers(1, 3), grid=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_samples_are_bilinear(backend, size, groups, grid):
    x, points = torch.randn(2, *size, 2 * groups, dtype=torch.float64), random_points(2, groups, *grid)
    samples = sample_points(x, points, backend=backend)
    assert samples.shape == (2, *grid, 2 * groups)
    for b, c, i, j in ((b, c, i, j) for b in range(2) for c in range(2 * groups) for i in range(grid[0]) for j in range(grid[1])):
        expected = bilinear(x[b, :, :, c].tolist(), *points[b, c // 2, i, j].tolist())
        assert samples[b, i, j, c].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_points_that_are_not_finite_give_values_that_are_not(bad):
    points = torch.tensor([[0.0, 0.0], [bad, 0.0]]).view(1, 1, 1, 2, 2)
    samples = sample_points(torch.ones(1, 3, 3, 2), points)
    assert samples[0, 0, 0].tolist() == [1, 1]
    assert not samples[0, 0, 1].isfinite().any()


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_sample_gradients(backend):
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    points = (1.8 * torch.rand(2, 2, 2, 3, 2, dtype=torch.float64) - 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, p: sample_points(x, p, backend=backend), (x, points))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_of_a_map_less_precise_than_its_points(dtype):
    """Whole tokens are gathered then: values and gradients of `grid_sample`, at the border too, where the derivative has a kink."""
    x = torch.randn(2, 4, 5, 6).to(dtype)
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.0, 0.2], [0.0, 0.0]], dtype=torch.float64)
    points = torch.cat([random_points(2, 3, 2, 2), corners.view(1, 1, 2, 2, 2).expand(2, 3, -1, -1, -1)], dim=2)
    cotangent = torch.randn(2, 4, 2, 6).to(dtype)
    expected, found = [], []
    for maps, results in ((x.double(), expected), (x, found)):
        inputs = maps.clone().requires_grad_(), points.clone().requires_grad_()
        if maps.dtype == points.dtype:
            grids = torch.nn.functional.grid_sample(
                inputs[0].unflatten(-1, (3, 2)).permute(0, 3, 4, 1, 2).flatten(0, 1), inputs[1].flatten(0, 1), align_corners=True
            )
            out = grids.unflatten(0, (2, 3)).permute(0, 3, 4, 1, 2).flatten(3)
        else:
            out = sample_points(*inputs)
            assert out.dtype == dtype
        results += [out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() / b.norm() < {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]


def random_case(batch, groups, heads_per_group, size, points, table=(5, 7), width=3):
    heads = groups * heads_per_group
    q = torch.randn(batch, heads, size[0] * size[1], width, dtype=torch.float64)
    k, v = (torch.randn(batch, heads, points, width, dtype=torch.float64) for _ in range(2))
    return q, k, v, random_points(batch, groups, points), torch.randn(heads, *table, dtype=torch.float64), size


shapes = st.fixed_dictionaries(
    dict(
        batch=st.integers(1, 2),
        groups=st.integers(1, 2),
        heads_per_group=st.integers(1, 2),
        size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        points=st.integers(1, 5),
        table=st.sampled_from([(1, 1), (3, 3), (5, 3), (3, 7)]),
    )
)


@pytest.mark.parametrize("bias", [position_bias, reference.position_bias])
@given(shape=shapes)
def test_bias_is_the_table_at_half_the_displacement(bias, shape):
    q, _, _, points, table, (height, width) = random_case(**shape)
    found = bias(points, table, (height, width))
    for b, h, n, m in (
        (b, h, n, m) for b in range(q.shape[0]) for h in range(q.shape[1]) for n in range(q.shape[2]) for m in range(points.shape[2])
    ):
        i, j = divmod(n, width)
        y, x = (2 * at / (size - 1) - 1 if size > 1 else 0.0 for at, size in ((i, height), (j, width)))
        px, py = points[b, h // shape["heads_per_group"], m].tolist()
        assert found[b, h, n, m].item() == pytest.approx(bilinear(table[h].tolist(), (x - px) / 2, (y - py) / 2), abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=shapes)
def test_attention_is_softmax_of_logits_and_bias(backend, shape):
    q, k, v, points, table, size = random_case(**shape)
    weights = (0.3 * torch.einsum("bhnd,bhmd->bhnm", q, k) + reference.position_bias(points, table, size)).exp()
    expected = torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(deformable_attention(q, k, v, points, table, size, scale=0.3, backend=backend), expected)


def test_native_table_holds_one_entry_for_each_displacement():
    """A query on a 3x4 grid and a point on a pixel of it: the table entry of their displacement in pixels."""
    table = torch.arange(35.0, dtype=torch.float64).view(1, 5, 7)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 3).double(), torch.linspace(-1, 1, 4).double(), indexing="ij")
    points = torch.stack([x, y], dim=-1).view(1, 1, 12, 2)
    bias = position_bias(points, table, (3, 4))[0, 0]
    for n in range(12):
        for m in range(12):
            rows, cols = n // 4 - m // 4, n % 4 - m % 4
            assert bias[n, m].item() == pytest.approx(table[0, 2 + rows, 3 + cols].item(), abs=1e-5)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_attention_gradients(backend):
    q, k, v, _, table, size = random_case(2, 2, 1, (2, 3), 4)
    points = 1.8 * torch.rand(2, 2, 4, 2, dtype=torch.float64) - 0.9
    inputs = [x.requires_grad_() for x in (q, k, v, points, table)]
    assert torch.autograd.gradcheck(lambda *x: deformable_attention(*x, size, backend=backend), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_half_and_single_precision_agree_with_reference(dtype, tolerance):
    """Relative L2 error, gradients included; points and table stay in float32, as the layers keep them."""
    q, k, v, points, table, size = random_case(2, 2, 2, (9, 11), 30, (17, 21), width=32)
    points = 1.9 * torch.rand(points.shape, dtype=torch.float32) - 0.95
    rounded = [x.to(dtype).requires_grad_() for x in (q, k, v)] + [points.requires_grad_(), table.float().requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    cotangent = torch.randn_like(q).to(dtype)
    found, expected = deformable_attention(*rounded, size), deformable_attention(*exact, size, backend="reference")
    found.backward(cotangent)
    expected.backward(cotangent.double())
    for a, b in [(found, expected), *((x.grad, y.grad) for x, y in zip(rounded, exact, strict=True))]:
        assert (a.double() - b).norm() / b.norm() < tolerance


def test_bad_input_names_the_problem():
    q, k, v, points, table, size = random_case(2, 2, 1, (2, 3), 4)
    bad = [
        ((q[0], k, v, points, table, size), r"expected q \(B, H, N, D\)"),
        ((q, k, v[:, :, :2], points, table, size), "k and v in M"),
        ((q[..., :2], k, v, points, table, size), "q and k in D"),
        ((q, k, v, points[:, :, :3], table, size), r"points must be \(B, G, M, 2\)"),
        ((q, k, v, points, table[:1], size), "one table of odd height and width for each of the 2 heads"),
        ((q, k, v, points, table, (2, 4)), r"grid_size=\(2, 4\) does not hold the 6 queries"),
        ((q.float(), k, v, points, table, size), r"float32, torch\.float64"),
        ((q, k, v, points[:, :0], table, size), "G dividing the heads"),
        ((q, k, v, points, table[:, :4], size), "one table of odd height"),
        ((q, k, v, points.long(), table, size), r"points and bias_table must be floating-point; got torch\.int64"),
        ((q, k, v, points, table, 6), "grid_size=6 does not hold the 6 queries"),
        ((q, k, v, points, table, (-2, -3)), "does not hold the 6 queries"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            deformable_attention(*arguments)
    with pytest.raises(ValueError, match="backend='fast' is not one of auto, triton, eager, reference"):
        deformable_attention(q, k, v, points, table, size, backend="fast")
    x = torch.zeros(2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"expected x \(B, H, W, C\) and points \(B, G, h, w, 2\)"):
        sample_points(x, torch.zeros(1, 1, 2, 2, 2))
    with pytest.raises(ValueError, match=r"x and points must be floating-point on one device; got torch\.int64"):
        sample_points(x.long(), torch.zeros(2, 1, 2, 2, 2))
    with pytest.raises(ValueError, match="the 0 groups of points do not divide"):
        sample_points(x, torch.zeros(2, 0, 2, 2, 2))
    with pytest.raises(ValueError, match="the 2 groups of points do not divide the 3 channels"):
        sample_points(x, torch.zeros(2, 2, 2, 2, 2))


def test_chunks_change_nothing(monkeypatch):
    """A few rows of queries at a time, computed again in the backward pass: the same output and gradients as the reference."""
    monkeypatch.setattr(chunks, "CHUNK", 100)
    monkeypatch.setattr(chunks, "KEPT", 100)
    q, k, v = (torch.randn(2, 4, n, 3, dtype=torch.float64, requires_grad=True) for n in (35, 6, 6))
    points, table = random_points(2, 2, 6).requires_grad_(), torch.randn(4, 5, 9, dtype=torch.float64, requires_grad=True)
    inputs = (q, k, v, points, table)
    found, expected = (deformable_attention(*inputs, (5, 7), backend=backend) for backend in ("eager", "reference"))
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(out, inputs, cotangent) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(deformable_attention(*inputs, (5, 7)), expected)
