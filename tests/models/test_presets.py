"""The presets against the published models, and against the interface that timm's users expect."""

from unittest import mock

import pytest
import timm
import torch
from goldens import Golden
from torch.utils.flop_counter import FlopCounterMode

from debiformer.layers.region_routing import RegionRouting
from debiformer.ops import use_backend

PUBLISHED = {  # parameters, and MACs at 224: half of what torch.utils.flop_counter counts for the published code
    "debiformer_tiny": (21_495_598, 2_635_981_312),
    "debiformer_small": (44_008_028, 5_402_961_920),
    "debiformer_base": (95_501_926, 11_688_364_032),
    "biformer_tiny": (13_142_760, 2_215_901_568),
    "biformer_small": (25_536_232, 4_463_629_568),
    "biformer_base": (56_804_968, 9_758_990_208),
    "biformer_stl": (28_372_552, 4_573_874_496),
}
ALL = [*PUBLISHED, "debiformer_nano"]
WIDTHS = [32, 64, 128, 192]


def nano(**kwargs):
    return timm.create_model("debiformer_nano", **kwargs).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_those_of_the_published_code(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        # The plain form: faster ones trade some multiplications for less copying.
        with use_backend("reference"), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    # The published code also computes the affinities of regions that are all routed to anyway.
    everywhere = (m for m in model.modules() if isinstance(m, RegionRouting) and m.topk == 49)
    macs = counter.get_total_flops() / 2 + sum(49 * 49 * layer.dim for layer in everywhere)
    assert (sum(p.numel() for p in model.parameters()), macs) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("debiformer_tiny", "debi_cls_tiny"),
        ("debiformer_small", "debi_cls_small"),
        ("biformer_tiny", "biformer_tiny"),
        ("biformer_stl", "biformer_stl"),
    ],
)
def test_macs_agree_with_those_recorded_with_the_golden_vectors(name, case):
    recorded = Golden(case).meta["macs_by_operator"]
    assert PUBLISHED[name][1] == sum(recorded.get(operator, 0) for operator in ("conv", "linear", "matmul", "einsum", "bmm"))


@pytest.mark.parametrize("name", ALL)
def test_features_of_every_preset(name):
    model = timm.create_model(name, features_only=True, in_chans=1).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 1, 64, 96))
    assert [tuple(m.shape) for m in maps] == [
        (1, c, 64 // r, 96 // r) for c, r in zip(model.feature_info.channels(), (4, 8, 16, 32), strict=True)
    ]
    assert model.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("size", [(32, 32), (32, 200), (161, 33), (97, 64)])
@pytest.mark.parametrize("grid", [4, (5, 7), 9])
def test_any_size_and_grid(size, grid):
    y = nano(num_classes=5, region_grid=grid)(torch.randn(1, 3, *size))
    assert y.shape == (1, 5)
    assert y.isfinite().all()


def test_out_indices_pool_and_classifier():
    x = torch.randn(1, 3, 64, 64)
    assert [m.shape[1] for m in nano(features_only=True, out_indices=(1, 2))(x)] == [64, 128]
    assert [m.shape[1] for m in nano(features_only=True, out_indices=(-1,))(x)] == [192]
    assert nano(num_classes=0)(x).shape == (1, 192)
    assert nano(num_classes=0, global_pool="")(x).shape == (1, 192, 2, 2)
    model = nano()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(pooled, model.forward_features(x).mean((2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    model.reset_classifier(7, "max")
    assert model(x).shape == (1, 7)
    assert model.num_classes == 7
    assert nano(drop_rate=0.5).head.drop.p == 0.5


def test_intermediates():
    model, x = nano(), torch.randn(1, 3, 64, 64)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == WIDTHS
    torch.testing.assert_close(model.norm(maps[-1]), final)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[-1], final)
    assert torch.equal(normed[0], maps[0])
    early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert len(early) == 2
    assert torch.equal(early[1], maps[1])
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_feature_norms_change_the_outputs_only():
    torch.manual_seed(0)
    dense = nano(feature_norms=True, num_classes=0)
    assert not [name for name in dense.state_dict() if name.startswith(("norm.", "head."))]
    x = torch.randn(2, 3, 64, 64)
    _, maps = dense.forward_intermediates(x)
    normed = dense.forward_intermediates(x, norm=True, intermediates_only=True)
    for plain, out in zip(maps, normed, strict=True):
        torch.testing.assert_close(out, torch.nn.functional.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2]).permute(0, 3, 1, 2))
    features = nano(feature_norms=True, features_only=True)
    features.model.load_state_dict(dense.state_dict())
    for a, b in zip(features(x), normed, strict=True):
        torch.testing.assert_close(a, b)
    kept = nano(feature_norms=True, features_only=True, out_indices=(0, 1))
    assert len(kept.model.feature_norms) == len(kept.model.stages) == 2
    assert len(kept(x)) == 2


def test_region_grid_is_an_argument_and_changes_later():
    model, x = nano(region_grid=4), torch.randn(1, 3, 64, 64)
    other = nano(region_grid=(4, 5))
    other.load_state_dict(model.state_dict())
    expected = other(x)
    assert not torch.equal(model(x), expected)
    model.set_region_grid((4, 5))
    assert model.region_grid == (4, 5)
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match=r"region_grid=\(3, 3\) has 9 regions, fewer than the topk=16 of a layer"):
        model.set_region_grid(3)
    assert torch.equal(model(x), expected)


def test_gradient_checkpointing_changes_nothing():
    model, x = nano().train(), torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(stage.grad_checkpointing for stage in model.stages)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointed_blocks_stay_on_their_backend():
    """The backward pass computes them again after the block that chose the backend has ended."""
    model, x = nano().train(), torch.randn(2, 3, 64, 64)
    model.set_grad_checkpointing(True)
    with use_backend("reference"):
        loss = model(x).square().mean()
    with mock.patch.dict("debiformer.ops.deformable.IMPLEMENTATIONS", eager=None):
        loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny", "biformer_stl"])
def test_training_touches_every_parameter(name):
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.1)
    model(torch.randn(2, 3, 64, 64)).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_stochastic_depth_rises_linearly_and_is_shared_by_a_pair():
    model = timm.create_model("debiformer_tiny", drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([r for i in range(7) for r in (0.05 * i, 0.05 * i)])


def test_decay_and_layer_groups():
    from timm.optim import create_optimizer_v2, param_groups_layer_decay

    model = nano()
    exempt = model.no_weight_decay()
    assert {"stages.0.blocks.1.mixer.bias_table", "norm.weight", "stages.0.blocks.0.norm1.weight", "stem.1.bias"} <= exempt
    assert "stages.0.blocks.0.mixer.qkv.weight" not in exempt
    decayed = {
        id(p)
        for g in create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups
        if g["weight_decay"]
        for p in g["params"]
    }
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1 and not name.endswith("bias_table")), name
    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5, weight_decay=0.0):
        scales |= {id(p): group["lr_scale"] for p in group["params"]}
    by_name = {name: scales[id(p)] for name, p in model.named_parameters()}
    order = [
        "stem.0.weight",
        "stages.0.blocks.0.mlp.fc1.weight",
        "stages.0.blocks.1.mlp.fc1.weight",
        "stages.2.blocks.0.norm1.weight",
        "head.fc.weight",
    ]
    assert [by_name[n] for n in order] == sorted(by_name[n] for n in order)
    assert len({by_name[n] for n in order}) == len(order)
    assert by_name["head.fc.weight"] == 1


def test_wrong_arguments_are_named():
    for kwargs in (dict(drop_path_rate=1.0), dict(drop_path_rate=-0.1), dict(num_classes=-1), dict(in_chans=0)):
        with pytest.raises(ValueError, match="=".join(map(str, *kwargs.items()))):
            nano(**kwargs)
    with pytest.raises(ValueError, match="no classifier of 5 classes for a dense backbone"):
        nano(feature_norms=True, num_classes=0).reset_classifier(5)


@pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny", "criss_cross_stl", "cross_shaped_window_stl", "deformable_stl"])
def test_an_empty_batch_gives_no_logits(name):
    assert timm.create_model(name, num_classes=3).eval()(torch.zeros(0, 3, 64, 64)).shape == (0, 3)


def test_pixels_that_are_not_numbers_give_logits_that_are_not():
    assert nano(num_classes=3)(torch.full((1, 3, 64, 64), float("nan"))).isnan().all()


def test_wrong_images_are_named():
    model = nano()
    for shape, message in [
        ((3, 64, 64), r"expected images \(B, 3, H, W\), got shape \(3, 64, 64\)"),
        ((1, 1, 64, 64), r"got shape \(1, 1, 64, 64\)"),
        ((1, 3, 64, 31), "at least 32x32 pixels, got 64x31"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(shape))


@pytest.mark.parametrize("name", ["debiformer_nano", "shifted_window_stl", "criss_cross_stl", "cross_shaped_window_stl", "deformable_stl"])
def test_torchvision_extracts_features(name):
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = timm.create_model(name, num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    tracing = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    extractor = create_feature_extractor(model, {"stages.1": "s", "head": "logits"}, tracer_kwargs=tracing)
    with torch.no_grad():
        out = extractor(x)
        assert torch.equal(out["logits"], model(x))
        assert torch.equal(out["s"], model.forward_intermediates(x, intermediates_only=True)[1])


@pytest.mark.parametrize("name", ["debiformer_nano", "biformer_tiny", "biformer_stl", "block_grid_stl"])
def test_fusing_changes_the_norms_and_not_the_logits(name):
    model = timm.create_model(name, num_classes=7).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                torch.nn.init.uniform_(values, 0.5, 1.5)
    with pytest.raises(RuntimeError, match=r"model\.eval\(\) first"):
        model.fuse_for_inference()
    x = torch.randn(2, 3, 70, 90, dtype=torch.float64)
    with torch.no_grad():
        logits = model.eval()(x)
        assert model.fuse_for_inference() is model
        torch.testing.assert_close(model(x), logits)
    remaining = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert remaining == [model.norm]
