"""The mechanisms of Table 5: against timm's own with the same weights, and against dense attention under the mask that defines each."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from debiformer.layers.sparse import (
    AxialAttention,
    CrissCrossAttention,
    CrossShapedWindowAttention,
    DeformableAttention,
    GridAttention,
    SubsampledAttention,
    WindowAttention,
)
from debiformer.ops import chunks

SIZES = [(14, 21), (20, 33), (33, 20), (9, 5), (1, 8), (8, 1), (1, 1)]
DIM, HEADS = 24, 2


def places(height, width):
    """Rows and columns (N,) of all pixels."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return y.flatten(), x.flatten()


def same(*values):
    """(N, N): whether two pixels agree in all of these (N,)."""
    return torch.stack([v[:, None] == v for v in values]).all(0)


def in_windows(size, height, width, shift=0):
    y, x = places(height, width)
    return same(
        (y - shift * (height > size)).div(size, rounding_mode="floor"), (x - shift * (width > size)).div(size, rounding_mode="floor")
    )


def in_grid(size, height, width):
    y, x = places(height, width)
    return same(y % -(-height // size), x % -(-width // size))


def in_stripes(across, width_of_stripe, height, width):
    y, x = places(height, width)
    return same((y if across else x) // width_of_stripe)


def in_row(height, width):
    return same(places(height, width)[0])


def in_column(height, width):
    return same(places(height, width)[1])


def dense(q, k, v, heads, mask, bias=0):
    """softmax(D ** -0.5 q k^T + bias) v where the mask (N, N) is, on maps (B, H, W, C)."""
    q, k, v = (x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5 + bias
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2)


def displacement_bias(table, rows, cols):
    """(heads, N, N) from a table of every displacement between pixels at these places; those out of reach have none."""
    reach_y, reach_x = table.shape[1] // 2, table.shape[2] // 2
    dy, dx = rows[:, None] - rows, cols[:, None] - cols
    near = (dy.abs() <= reach_y) & (dx.abs() <= reach_x)
    return table[:, (dy + reach_y).clamp(0, 2 * reach_y), (dx + reach_x).clamp(0, 2 * reach_x)] * near


def window_bias(layer, height, width):
    return displacement_bias(layer.bias_table, *places(height, width))


def grid_bias(layer, height, width):
    """Displacement is counted in cells."""
    y, x = places(height, width)
    return displacement_bias(layer.bias_table, y // -(-height // layer.grid_size), x // -(-width // layer.grid_size))


MASKED = {
    "window": (lambda: WindowAttention(DIM, HEADS), lambda *size: in_windows(7, *size), window_bias),
    "shifted": (lambda: WindowAttention(DIM, HEADS, shift=3), lambda *size: in_windows(7, *size, shift=3), window_bias),
    "plain window": (lambda: WindowAttention(DIM, HEADS, 5, relative_bias=False), lambda *size: in_windows(5, *size), None),
    "grid": (lambda: GridAttention(DIM, HEADS), lambda *size: in_grid(7, *size), grid_bias),
    "row": (lambda: AxialAttention(DIM, HEADS, "row"), in_row, None),
    "column": (lambda: AxialAttention(DIM, HEADS, "column"), in_column, None),
    "criss-cross": (lambda: CrissCrossAttention(DIM, HEADS), lambda *size: in_row(*size) | in_column(*size), None),
}


def randomised(layer):
    """In float64, with weights that are felt."""
    layer = layer.double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MASKED)
def test_attention_is_dense_attention_under_the_mask(name, size):
    make, mask, bias = MASKED[name]
    layer, x = randomised(make()), torch.randn(2, *size, DIM, dtype=torch.float64, requires_grad=True)
    q, k, v = layer.qkv(x).chunk(3, -1)
    check_gradients(layer, x, layer.proj(dense(q, k, v, HEADS, mask(*size), bias(layer, *size) if bias else 0)).view_as(x))


def check_gradients(layer, x, expected):
    """The layer gives what is expected, and its gradients are those of what is expected."""
    out, sides = layer(x), [x, *layer.parameters()]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
    found = torch.autograd.grad(out.square().sum(), sides)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), sides), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stripe", [1, 2, 7, None])
def test_cross_shaped_windows_are_two_kinds_of_stripes_and_their_convolutions(stripe, size):
    layer = randomised(CrossShapedWindowAttention(DIM, HEADS, stripe))
    x = torch.randn(2, *size, DIM, dtype=torch.float64, requires_grad=True)
    q, k, v = (part.chunk(1 if stripe is None else 2, -1) for part in layer.qkv(x).chunk(3, -1))
    expected = []
    for i, convolution in enumerate(layer.local_context):
        width = stripe or max(size)
        mask = in_stripes(i == 0, width, *size)
        attended = dense(q[i], k[i], v[i], HEADS // len(layer.local_context), mask).view_as(q[i])
        # Each stripe is convolved by itself.
        parts = v[i].permute(0, 3, 1, 2).split(width, dim=2 + i)
        expected.append(attended + torch.cat([convolution(part) for part in parts], dim=2 + i).permute(0, 2, 3, 1))
    check_gradients(layer, x, layer.proj(torch.cat(expected, -1)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 2)])
def test_deformable_attention_is_what_its_equations_say(stride, groups, size):
    layer = randomised(DeformableAttention(DIM, HEADS, point_stride=stride, offset_groups=groups, bias_grid=6, max_offset=1.5))
    x = torch.randn(2, *size, DIM, dtype=torch.float64, requires_grad=True)
    q = layer.query(x)
    net, rows, cols = layer.offset_network, -(-size[0] // stride), -(-size[1] // stride)
    # Offsets of at most one and a half cells, from queries summarised by a strided filter.
    each = q.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    cells = F.conv2d(each, net.depthwise.weight, stride=stride, padding=2, groups=DIM // groups).permute(0, 2, 3, 1)
    offsets = net.project(F.gelu(net.norm(cells))).tanh() * 1.5
    y, x_place = places(rows, cols)
    points = torch.stack([2 * (x_place.double() + 0.5) / cols - 1, 2 * (y.double() + 0.5) / rows - 1], -1)
    points = points + offsets.flatten(1, 2) * torch.tensor([2 / cols, 2 / rows], dtype=torch.float64)  # (B * G, M, 2)
    maps = x.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    sampled = (
        F.grid_sample(maps, points.unsqueeze(1), align_corners=True).squeeze(2).unflatten(0, (2, groups)).flatten(1, 2).transpose(1, 2)
    )
    k, v = layer.key_value(sampled).chunk(2, -1)
    # The bias of a query and a point: the table at half their displacement.
    y, x_place = places(*size)
    at = torch.stack([n.double() * 2 / max(e - 1, 1) - 1 if e > 1 else n.double() for n, e in ((x_place, size[1]), (y, size[0]))], -1)
    between = (at[None, :, None] - points[:, None]) / 2
    tables = layer.bias_table.unflatten(0, (groups, -1)).repeat(2, 1, 1, 1)
    bias = F.grid_sample(tables, between, align_corners=True).unflatten(0, (2, groups)).flatten(1, 2)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q.flatten(1, 2), k, v))
    weights = ((q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5 + bias).softmax(-1)
    check_gradients(layer, x, layer.proj((weights @ v).transpose(1, 2).flatten(2)).view_as(x))


def loaded(theirs, ours, names):
    """Our layer with the weights of timm's, by names of both; every parameter has one."""
    given, wanted = theirs.state_dict(), ours.state_dict()
    assert set(names) == set(wanted)
    ours.load_state_dict({name: given[theirs].reshape_as(wanted[name]) for name, theirs in names.items()})
    return ours.double()


PLAIN = {f"{part}.{leaf}": f"{part}.{leaf}" for part in ("qkv", "proj") for leaf in ("weight", "bias")}


@pytest.mark.parametrize("shift", [0, 3])
def test_windows_are_those_of_timms_swin(shift):
    from timm.models.swin_transformer import SwinTransformerBlock

    block = SwinTransformerBlock(DIM, (14, 21), num_heads=HEADS, window_size=7, shift_size=shift)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    ours = WindowAttention(DIM, HEADS, shift=shift)
    # Theirs has heads last.
    given = {name: value for name, value in block.attn.state_dict().items() if name != "relative_position_bias_table"}
    given["bias_table"] = block.attn.relative_position_bias_table.T.reshape_as(ours.bias_table)
    ours.load_state_dict(given)
    x = torch.randn(2, 14, 21, DIM)
    # Swin hides what is apart by a score of -100.
    torch.testing.assert_close(ours(x), block._attn(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["block", "grid"])
def test_blocks_and_grids_are_those_of_timms_maxvit(kind):
    from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

    cfg = MaxxVitTransformerCfg(dim_head=DIM // HEADS, window_size=(7, 7), grid_size=(7, 7), rel_pos_type="bias", head_first=False)
    theirs = PartitionAttentionCl(DIM, kind, cfg)
    torch.nn.init.normal_(theirs.attn.rel_pos.relative_position_bias_table)
    ours = WindowAttention(DIM, HEADS) if kind == "block" else GridAttention(DIM, HEADS)
    given = {name: value for name, value in theirs.attn.state_dict().items() if not name.startswith("rel_pos")}
    given["bias_table"] = theirs.attn.rel_pos.relative_position_bias_table.T.reshape_as(ours.bias_table)
    ours.load_state_dict(given)
    x = torch.randn(2, 14, 21, DIM)
    torch.testing.assert_close(ours(x), theirs._partition_attn(x), rtol=1e-4, atol=1e-5)


def test_windows_without_a_bias_are_those_of_timms_twins():
    from timm.models.twins import LocallyGroupedAttn

    theirs = LocallyGroupedAttn(DIM, HEADS, ws=7).double()
    ours = loaded(theirs, WindowAttention(DIM, HEADS, relative_bias=False), PLAIN)
    x = torch.randn(2, 14, 21, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x.flatten(1, 2), (14, 21)).view_as(x))


@pytest.mark.parametrize("stride", [1, 4])
def test_subsampled_attention_is_that_of_timms_twins(stride):
    from timm.models.twins import GlobalSubSampleAttn

    theirs = GlobalSubSampleAttn(DIM, HEADS, sr_ratio=stride).double()
    parts = {"query": "q", "key_value": "kv", "proj": "proj"} | ({"summary": "sr", "norm": "norm"} if stride > 1 else {})
    names = {f"{ours}.{leaf}": f"{name}.{leaf}" for ours, name in parts.items() for leaf in ("weight", "bias")}
    ours = loaded(theirs, SubsampledAttention(DIM, HEADS, stride), names)
    x = torch.randn(2, 16, 24, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x.flatten(1, 2), (16, 24)).view_as(x))


def test_subsampled_attention_sees_what_the_border_cuts_off():
    layer = SubsampledAttention(DIM, HEADS, 4)
    x = torch.randn(1, 6, 3, DIM)
    changed = x.clone()
    changed[:, 5, 2] += 1
    assert (layer(changed) - layer(x))[:, :5].abs().max() > 0


EVERY = [
    lambda: WindowAttention(DIM, HEADS, shift=3),
    lambda: GridAttention(DIM, HEADS),
    lambda: CrissCrossAttention(DIM, HEADS),
    lambda: CrossShapedWindowAttention(DIM, HEADS, 4),
    lambda: DeformableAttention(DIM, HEADS),
    lambda: AxialAttention(DIM, HEADS, "row"),
    lambda: SubsampledAttention(DIM, HEADS, 4),
]
CHUNKED = 5  # of these: the last two leave their weights to a fused kernel


@pytest.mark.parametrize("make", EVERY[:CHUNKED])
@pytest.mark.parametrize("train", [False, True])
def test_a_few_rows_at_a_time_come_to_the_same(make, train, monkeypatch):
    """Where intermediates would be large; in training, they are then computed again."""
    layer, x = randomised(make()), torch.randn(2, 15, 10, DIM, dtype=torch.float64, requires_grad=train)

    def run():
        with torch.set_grad_enabled(train):
            out = layer(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])] if train else [out]

    whole = run()
    monkeypatch.setattr(chunks, "CHUNK", 5000)
    monkeypatch.setattr(chunks, "KEPT", 5000)
    steps = []
    softmax = torch.softmax  # of the criss-cross; all others go through
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given, **options: steps.append(1) or attend(*given, **options))
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, **options: steps.append(1) or softmax(x, **options))
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert len(steps) > 3


@pytest.mark.parametrize("make", EVERY[:4])
def test_one_graph_serves_every_size(make):
    """But for a map that becomes a single window."""
    torch.compiler.reset()
    layer, counter = make(), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for size in ((4, 56, 48), (5, 64, 64), (6, 57, 68)):
        x = torch.randn(*size, DIM)
        for axis in range(3):
            torch._dynamo.mark_dynamic(x, axis)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("make", EVERY)
def test_half_precision_is_near(make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(2, 15, 10, DIM)
    torch.nn.init.zeros_(layer.proj.bias)

    def run():
        out = layer(x)
        return [out, *torch.autograd.grad(out.float().square().sum(), [layer.proj.weight, layer.proj.bias])]

    with torch.autocast("cpu", torch.bfloat16):
        half = run()
    assert half[0].dtype == torch.bfloat16
    for ours, whole in zip(half, run(), strict=True):
        assert (ours.float() - whole).norm() / whole.norm() < 0.02


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowAttention(DIM, 5), "num_heads=5 does not divide dim=24"),
        (lambda: WindowAttention(DIM, HEADS, window_size=0), "window_size=0 is not a positive integer"),
        (lambda: WindowAttention(DIM, HEADS, shift=7), "shift=7 is not from 0 to below window_size=7"),
        (lambda: GridAttention(DIM, HEADS, grid_size=-1), "grid_size=-1 is not"),
        (lambda: AxialAttention(DIM, HEADS, "rows"), "axis='rows' is neither 'row' nor 'column'"),
        (lambda: CrossShapedWindowAttention(DIM, 3, 2), "num_heads=3 is odd"),
        (lambda: CrossShapedWindowAttention(DIM, 2, 0), "stripe_width=0 is not"),
        (lambda: SubsampledAttention(DIM, HEADS, 0), "stride=0 is not"),
        (lambda: DeformableAttention(DIM, HEADS, offset_groups=4), "offset_groups=4 does not divide num_heads=2"),
        (lambda: DeformableAttention(DIM, HEADS, max_offset=0), "max_offset=0 is not above 0"),
        (lambda: DeformableAttention(DIM, HEADS, bias_grid=0), "bias_grid=0 is not"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
