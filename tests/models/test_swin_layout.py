"""The nine mechanisms in the Swin-T layout: timm's interface, the published forms, and what the layout leaves alike."""

import pytest
import timm
import torch
from torch import nn

import debiformer
from debiformer.layers import BiLevelRoutingAttention, DeformableBiLevelRoutingAttention
from debiformer.models.swin_layout import MIXERS

NAMES = {  # parameters
    "shifted_window_stl": 28_285_666,
    "spatially_separable_stl": 31_215_784,
    "sequential_axial_stl": 28_262_344,
    "criss_cross_stl": 28_262_344,
    "cross_shaped_window_stl": 28_306_504,
    "deformable_stl": 28_318_626,
    "block_grid_stl": 28_285_666,
    "biformer_stl": 28_372_552,
    "debiformer_stl": 45_299_461,
}
MECHANISMS = dict(zip([*NAMES][:7], [*MIXERS][:7], strict=True)) | {
    "biformer_stl": "bi_level_routing",
    "biformer_stl_nchw": "bi_level_routing_nchw",
    "debiformer_stl": "deformable_bi_level_routing",
}
EVERY = [*NAMES, "biformer_stl_nchw"]


@pytest.mark.parametrize("name", EVERY)
def test_a_mechanism_has_a_name_and_is_an_argument(name):
    with torch.device("meta"):
        named, given = timm.create_model(name), timm.create_model("swin_layout", mixer=MECHANISMS[name])
    shapes = [{key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (named, given)]
    assert shapes[0] == shapes[1]
    assert [len(stage.blocks) for stage in named.stages] == [2, 2, 6, 2]
    assert all(isinstance(block.position, nn.Identity) for stage in named.stages for block in stage.blocks)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_not_the_mechanism_is_alike(name):
    """Patches, norms, feed-forwards and classifier: what Table 5 keeps equal."""
    with torch.device("meta"):
        model, swin = timm.create_model(name), timm.create_model("shifted_window_stl")
    rest = [{key: tuple(value.shape) for key, value in m.state_dict().items() if ".mixer." not in key} for m in (model, swin)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [(32, 200), (97, 64)])
def test_any_size(name, size):
    model = timm.create_model(name, num_classes=5).eval()
    with torch.no_grad():
        y = model(torch.randn(1, 3, *size))
    assert y.shape == (1, 5)
    assert y.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_timms_interface(name):
    model = timm.create_model(name, features_only=True, in_chans=1, out_indices=(1, 3)).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 1, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 192, 8, 12), (1, 768, 2, 3)]
    assert model.feature_info.reduction() == [8, 32]


@pytest.mark.parametrize("name", EVERY)
def test_training_touches_every_parameter_with_and_without_checkpointing(name):
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.0)
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bias_tables_do_not_decay():
    exempt = timm.create_model("deformable_stl").no_weight_decay()
    assert {"stages.0.blocks.1.mixer.bias_table", "stages.2.blocks.1.mixer.bias_table"} <= exempt


def test_what_a_layer_has_is_counted_by_hand():
    """Against the layout with nothing but projections: a head has 13 x 13 biases in windows of 7."""
    heads, widths, depths = (3, 6, 12, 24), (96, 192, 384, 768), (2, 2, 6, 2)
    plain = NAMES["sequential_axial_stl"]
    assert NAMES["criss_cross_stl"] == plain
    assert NAMES["shifted_window_stl"] == plain + sum(169 * h * d for h, d in zip(heads, depths, strict=True)) == NAMES["block_grid_stl"]
    # Depthwise 3x3 filters and their biases.
    assert NAMES["cross_shaped_window_stl"] == plain + sum(10 * w * d for w, d in zip(widths, depths, strict=True))
    # Strided convolutions and a norm, where the stride is not 1, in every second block.
    cells = sum((s * s * w * w + 3 * w) * d // 2 for s, w, d in zip((8, 4, 2), widths, depths, strict=False))
    assert NAMES["spatially_separable_stl"] == plain + cells
    for name, expected in NAMES.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in timm.create_model(name).parameters()) == expected, name


def test_routing_is_where_it_should_be():
    def mixers(name):
        with torch.device("meta"):
            return [[type(block.mixer) for block in stage.blocks] for stage in timm.create_model(name).stages]

    bra, dbra = BiLevelRoutingAttention, DeformableBiLevelRoutingAttention
    assert mixers("biformer_stl")[:3] == [[bra] * 2, [bra] * 2, [bra] * 6]
    assert mixers("debiformer_stl") == [[bra, dbra], [bra, dbra], [bra, dbra] * 3, [dbra] * 2]


def test_both_published_forms_of_biformer_stl_load_and_are_told_apart():
    """The second convolves the values in the last stage, under the name by which the first convolves the input."""
    torch.manual_seed(0)
    source = timm.create_model("biformer_stl_nchw", num_classes=4).double().eval()
    names = {
        "mixer.local_context": "attn.lepe",
        "mixer.value_context": "attn.lepe",
        "mixer.proj": "attn.output_linear",
        "mixer.qkv": "attn.qkv_linear",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }
    published = {}
    for key, value in source.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if key.startswith("stages.3"):
            key = key.replace("qkv_linear", "qkv").replace("output_linear", "proj")
        key = key.replace("stem.", "downsample_layers.0.").replace("head.fc.", "head.")
        for i in (1, 2, 3):
            key = key.replace(f"stages.{i}.downsample.", f"downsample_layers.{i}.")
        inside = any(part in key for part in ("attn", "mlp")) and value.ndim == 2
        published[key] = value[:, :, None, None] if inside else value
    same = timm.create_model("biformer_stl_nchw", num_classes=4).double().eval()
    debiformer.load_published({"model": published}, same)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(same(x), source(x))
    with pytest.raises(ValueError, match=r"unexpected:\n  stages\.3\.blocks\.0\.mixer\.value_context"):
        debiformer.load_published({"model": published}, timm.create_model("biformer_stl", num_classes=4))


def test_the_second_form_convolves_the_values():
    from debiformer.layers import FullAttention

    layer, x = FullAttention(32, 4, value_context=True).double(), torch.randn(2, 5, 7, 32, dtype=torch.float64)
    q, k, v = layer.qkv(x).chunk(3, -1)
    heads = [part.flatten(1, 2).unflatten(-1, (4, 8)).transpose(1, 2) for part in (q, k, v)]
    weights = (heads[0] @ heads[1].transpose(2, 3) / 8**0.5).softmax(-1)
    attended = (weights @ heads[2]).transpose(1, 2).flatten(2).view_as(x)
    conv = layer.value_context
    context = nn.functional.conv2d(v.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=2, groups=32).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.proj(attended + context))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="mixer='shifted_windows' is no mechanism: did you mean shifted_window"):
        timm.create_model("swin_layout", mixer="shifted_windows")
    with pytest.raises(ValueError, match="region_grid=8 for mixer='criss_cross', which has no regions: leave it out"):
        timm.create_model("criss_cross_stl", region_grid=8)
    assert timm.create_model("biformer_stl", region_grid=8).region_grid == (8, 8)
    with pytest.raises(ValueError, match=r"region_grid=\(8, 8\) for a model that has no regions"):
        timm.create_model("criss_cross_stl").set_region_grid(8)


def test_stochastic_depth_rises_from_block_to_block():
    for name in ("shifted_window_stl", "criss_cross_stl", "debiformer_stl"):
        model = timm.create_model(name, drop_path_rate=0.22)
        rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
        assert rates == pytest.approx([0.02 * i for i in range(12)])
