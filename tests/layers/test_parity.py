"""Every published layer: same output, same gradients of input and parameters."""

import pytest
from goldens import Golden, cases
from kernels import DEVICE

from debiformer.layers import BiLevelRoutingAttention, DeformableBiLevelRoutingAttention, FullAttention
from debiformer.models.checkpoints import our_name

LAYERS = {
    "op_bra_legacy": lambda: BiLevelRoutingAttention(64, 2, 7, 4),
    "op_bra_legacy_autopad": lambda: BiLevelRoutingAttention(64, 2, 7, 4),
    "op_bra_nchw": lambda: BiLevelRoutingAttention(64, 2, 7, 4, layout="NCHW"),
    "op_attention_lepe": lambda: FullAttention(128, 8),
    "op_dbra_64": lambda: dbra(64, 2, topk=4, stride=8, kernel=9, groups=1, bias_grid=56),
    "op_dbra_128_autopad": lambda: dbra(128, 4, topk=8, stride=4, kernel=7, groups=2, bias_grid=28),
    "op_dbra_512": lambda: dbra(512, 16, topk=49, stride=1, kernel=3, groups=8, bias_grid=7, agent_mlp_ratio=1),
}


def dbra(dim, heads, topk, stride, kernel, groups, bias_grid, agent_mlp_ratio=3):
    return DeformableBiLevelRoutingAttention(
        dim,
        heads,
        7,
        topk,
        point_stride=stride,
        offset_kernel_size=kernel,
        offset_groups=groups,
        bias_grid=bias_grid,
        agent_mlp_ratio=agent_mlp_ratio,
    )


def test_every_layer_case_is_tried():
    assert set(cases("op_")) == set(LAYERS)


def loaded(case, golden):
    """The layer with the golden weights, and our name of each of theirs."""
    layer = LAYERS[case]()
    prefix = "stages.0.blocks.0.attn."
    ours = {key: our_name(prefix + key, paired=False).removeprefix("stages.0.blocks.0.mixer.") for key in golden.state_dict}
    expected = layer.state_dict()
    layer.load_state_dict({ours[key]: t.reshape(expected[ours[key]].shape) for key, t in golden.state_dict.items()})
    return layer, ours


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", LAYERS)
def test_layer(case, backend):
    golden = Golden(case)
    layer, ours = loaded(case, golden)
    layer = layer.double()
    layer.backend = backend
    nhwc = golden.meta["layout"] == "NHWC"
    x = golden.input().double().requires_grad_()
    y = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if nhwc else layer(x)
    (y * golden.cotangent()).sum().backward()
    parameters = dict(layer.named_parameters())
    found = {"output": y, "grad_input": x.grad}
    for key, shape, *_ in golden.meta["state_dict"]:
        found[f"grad/{key}"] = parameters[ours[key]].grad.reshape(shape)
    assert found.keys() == golden.meta["outputs"].keys()
    for name, value in found.items():
        assert golden.error(name, value) < 1e-6, name  # recorded in float32


@pytest.mark.parametrize("case", ["op_bra_legacy", "op_dbra_512"])
def test_layer_on_the_fused_kernels(case):
    """In float32, which is the most precise that they take."""
    pytest.importorskip("triton")
    golden = Golden(case)
    layer, _ = loaded(case, golden)
    layer.backend = "triton"
    layer, x = layer.to(DEVICE), golden.input().to(DEVICE).requires_grad_()
    y = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if golden.meta["layout"] == "NHWC" else layer(x)
    (y * golden.cotangent().to(DEVICE)).sum().backward()
    assert golden.error("output", y.cpu()) < 1e-4
    assert golden.error("grad_input", x.grad.cpu()) < 1e-4
