"""Loading: every wrapping of a published checkpoint, and an error that names everything that does not fit."""

import argparse
import io
import logging
from collections import defaultdict, deque

import pytest
import safetensors.torch
import timm
import torch
from goldens import Golden

import debiformer
from debiformer.models.checkpoints import read_checkpoint, to_our_names

TINY = Golden("debi_cls_tiny")
DENSE = Golden("debi_det_tiny_96x160")


@pytest.fixture(scope="module")
def tiny():
    model = timm.create_model("debiformer_tiny")
    debiformer.load_published(TINY.state_dict, model)
    return model.state_dict()


def same(model, state_dict):
    return all(torch.equal(value, state_dict[name]) for name, value in model.state_dict().items())


class Config:
    """Stands for omegaconf's or mmcv's classes, which a reader of the file need not have."""

    def __init__(self):
        self.lr = 0.1

    def __reduce__(self):
        return (Config, ())


class Settings(dict):
    """Stands for mmcv's ConfigDict: a dictionary of a foreign class."""


class Steps(list):
    """A list of a foreign class."""


class Trap:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.debiformer_trap = True",))


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"args": argparse.Namespace(lr=0.1)},
        {"args": Config(), "epoch": 3},
        {"args": Trap()},
        {"meta": Settings(a=Steps([1]), b=defaultdict(int, c=deque([2])))},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_as_published_load_and_run_no_code(tmp_path, tiny, extra, zipped):
    import builtins

    path = tmp_path / "debi_tiny.pth"
    torch.save({"model": TINY.state_dict, "optimizer": {"state": {0: {"step": 1}}}, **extra}, path, _use_new_zipfile_serialization=zipped)
    model = timm.create_model("debiformer_tiny")
    report = debiformer.load_published(path, model)
    assert same(model, tiny)
    assert (report.left_behind, report.at_start) == ([], [])
    assert not hasattr(builtins, "debiformer_trap")


def test_torchscript_archives_are_refused_unread(tmp_path):
    """torch.load would run their code."""

    class Scripted(torch.nn.Module):
        @torch.jit.export
        def __getstate__(self):
            return 1

        @torch.jit.export
        def __setstate__(self, state: int):
            raise RuntimeError("ran")

        def forward(self, x):
            return x

    torch.jit.script(Scripted()).save(str(tmp_path / "scripted.pth"))
    with pytest.raises(ValueError, match=r"scripted\.pth is not a readable checkpoint \(.*TorchScript"):
        read_checkpoint(tmp_path / "scripted.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_every_kind_and_pickled_modules(tmp_path, zipped):
    kinds = [torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
    kinds += [torch.float8_e4m3fn, torch.uint16] if zipped else []  # younger than the old format
    tensors = {str(dtype): torch.ones(2, 2).to(dtype) for dtype in kinds}
    path = tmp_path / "kinds.pth"
    torch.save({"model": tensors, "ema": torch.nn.Linear(2, 2), "args": Config()}, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert found.keys() == tensors.keys()
    assert all(
        found[name].dtype == value.dtype and torch.equal(found[name].float(), value.float())
        for name, value in tensors.items()
        if not value.is_complex()
    )


def test_segmentation_checkpoints_give_their_backbone(tmp_path):
    heads = {"decode_head.conv_seg.weight": torch.zeros(150, 256, 1, 1), "auxiliary_head.conv_seg.bias": torch.zeros(150)}
    path = tmp_path / "upernet.pth"
    torch.save({"meta": {"epoch": 1}, "state_dict": {f"backbone.{k}": v for k, v in DENSE.state_dict.items()} | heads}, path)
    model = timm.create_model("debiformer_tiny", num_classes=0, region_grid=8, feature_norms=True)
    bare = timm.create_model("debiformer_tiny", num_classes=0, region_grid=8, feature_norms=True)
    debiformer.load_published(path, model)
    debiformer.load_published(DENSE.state_dict, bare)
    assert same(model, bare.state_dict())
    features = timm.create_model("debiformer_tiny", features_only=True, feature_norms=True)
    debiformer.load_published(path, features)
    assert same(features.model, bare.state_dict())


def test_distributed_prefixes_and_our_own_files(tmp_path, tiny):
    model = timm.create_model("debiformer_tiny")
    debiformer.load_published({f"module.{k}": v for k, v in TINY.state_dict.items()}, model)
    assert same(model, tiny)
    path = tmp_path / "ours.safetensors"
    safetensors.torch.save_file(tiny, path)
    again = timm.create_model("debiformer_tiny")
    debiformer.load_published(path, again)
    assert same(again, tiny)


def test_checkpoints_of_our_own_runs_load(tmp_path, tiny):
    path = tmp_path / "best.ckpt"
    torch.save({"state_dict": {f"model.{name}": value for name, value in tiny.items()}, "hyper_parameters": {"lr": 0.1}}, path)
    model = timm.create_model("debiformer_tiny")
    debiformer.load_published(path, torch.nn.DataParallel(torch.compile(model)))
    assert same(model, tiny)
    again = timm.create_model("debiformer_tiny")
    debiformer.load_published(torch.compile(model).state_dict(), again)
    assert same(again, tiny)


def test_stages_that_features_only_dropped_are_left_behind(tiny):
    model = timm.create_model("debiformer_tiny", features_only=True, out_indices=(0, 1))
    report = debiformer.load_published(TINY.state_dict, model)
    assert same(model.model, tiny)
    assert {name.split(".")[0] for name in report.left_behind} == {"stages", "norm", "head"}
    assert {name.split(".")[1] for name in report.left_behind if name.startswith("stages")} == {"2", "3"}


def test_a_stage_that_no_preset_has_is_unexpected():
    model = timm.create_model("debiformer_tiny", num_classes=0)
    with pytest.raises(ValueError, match=r"1 unexpected:\n  stages\.9\.junk"):
        debiformer.load_published({**TINY.state_dict, "stages.9.junk": torch.zeros(1)}, model)


@pytest.mark.parametrize("case", ["biformer_tiny", "biformer_stl"])
def test_our_names_stay_as_they_are(case):
    renamed = to_our_names(Golden(case).state_dict)
    assert renamed.keys() == timm.create_model(case).state_dict().keys()
    assert to_our_names(renamed).keys() == renamed.keys()


def test_a_classification_checkpoint_in_a_dense_backbone_is_the_one_exception(tiny, caplog):
    model = timm.create_model("debiformer_tiny", num_classes=0, region_grid=8, feature_norms=True)
    with caplog.at_level(logging.WARNING):
        report = debiformer.load_published(TINY.state_dict, model)
    norm = [f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    assert sorted(report.left_behind) == sorted(["head.fc.weight", "head.fc.bias", *norm])
    assert sorted(report.at_start) == sorted(f"feature_norms.{i}.{n}" for i in range(4) for n in ("weight", "bias"))
    assert all(name in caplog.text for name in report.left_behind + report.at_start)
    assert all(torch.equal(value, tiny[name]) for name, value in model.state_dict().items() if not name.startswith("feature_norms"))
    pooled = timm.create_model("debiformer_tiny", num_classes=0)
    assert sorted(debiformer.load_published(TINY.state_dict, pooled).left_behind) == ["head.fc.bias", "head.fc.weight"]


def test_every_misfit_is_listed_and_nothing_is_loaded():
    model = timm.create_model("debiformer_tiny", num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = {k: v for k, v in TINY.state_dict.items() if k != "stages.2.3.attn2.rpe_table"} | {"stages.9.0.nonsense": torch.zeros(1)}
    with pytest.raises(ValueError, match="1 missing") as error:
        debiformer.load_published(bad, model)
    message = str(error.value)
    assert "stages.2.blocks.7.mixer.bias_table" in message
    assert "1 unexpected:\n  stages.9.0.nonsense" in message
    assert "head.fc.weight (1000, 512), wanted (10, 512)" in message
    assert "head.fc.bias (1000,), wanted (10,)" in message
    assert same(model, before)


@pytest.mark.parametrize(
    "kwargs", [dict(), dict(num_classes=0), dict(num_classes=0, feature_norms=False)], ids=["classifier", "pooled", "no feature norms"]
)
def test_a_dense_checkpoint_does_not_fit_a_classifier(kwargs):
    with pytest.raises(ValueError, match=r"norm\.running_mean"):
        debiformer.load_published(DENSE.state_dict, timm.create_model("debiformer_tiny", **kwargs))


def test_a_checkpoint_of_another_preset_is_refused():
    with pytest.raises(ValueError, match=r"mis-shaped|missing"):
        debiformer.load_published(TINY.state_dict, timm.create_model("debiformer_small"))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")
    whole = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(1000)}}, whole)
    for name, content in [("empty.pth", b""), ("text.pth", b"<html>too many downloads</html>"), ("cut.pth", whole.getvalue()[:2000])]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a readable checkpoint"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"bad\.safetensors is not a readable checkpoint"):
        read_checkpoint(tmp_path / "bad.safetensors")
    torch.save({"weights": [1, 2]}, tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds no tensors under 'model', 'state_dict' or at the top; found keys \['weights'\]"):
        read_checkpoint(tmp_path / "list.pth")


def test_pretrained_from_a_file_adapts_classes_and_channels(tmp_path, tiny):
    path = tmp_path / "debi_tiny.pth"
    torch.save({"model": TINY.state_dict, "args": argparse.Namespace(lr=0.1)}, path)
    source = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert same(timm.create_model("debiformer_tiny", **source), tiny)
    model = timm.create_model("debiformer_tiny", num_classes=7, in_chans=1, **source)
    assert model.get_classifier().weight.shape == (7, 512)
    torch.testing.assert_close(model.stem[0].weight, tiny["stem.0.weight"].sum(1, keepdim=True))
    assert "state_dict" not in model.pretrained_cfg
    features = timm.create_model("debiformer_tiny", features_only=True, **source)
    assert same(features.model, tiny)
    dense = timm.create_model("debiformer_tiny", features_only=True, feature_norms=True, num_classes=0, **source)
    assert all(torch.equal(v, tiny[n]) for n, v in dense.model.state_dict().items() if not n.startswith("feature_norms"))
    with pytest.raises(ValueError, match=r"stages\.3\.blocks\.5\.mixer\.bias_table"):  # timm alone would keep random weights there
        timm.create_model("debiformer_small", num_classes=7, **source)


def test_a_classifier_of_the_files_own_width_is_kept(tmp_path, caplog):
    trained = timm.create_model("debiformer_nano", num_classes=10)
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "ten.safetensors")
    source = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "ten.safetensors")))
    assert same(timm.create_model("debiformer_nano", num_classes=10, **source), trained.state_dict())
    assert timm.create_model("debiformer_nano", num_classes=4, **source).get_classifier().weight.shape == (4, 192)
    headless = {name: value for name, value in trained.state_dict().items() if not name.startswith("head.")}
    safetensors.torch.save_file(headless, tmp_path / "ten.safetensors")
    with caplog.at_level(logging.WARNING):
        timm.create_model("debiformer_nano", num_classes=10, **source)
    assert "the checkpoint has no classifier" in caplog.text


def test_dense_and_classification_files_both_start_a_dense_backbone(tmp_path, tiny):
    for state_dict in (DENSE.state_dict, TINY.state_dict):
        torch.save({"model": state_dict}, tmp_path / "weights.pth")
        source = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth")))
        features = timm.create_model("debiformer_tiny", features_only=True, feature_norms=True, **source)
        expected = timm.create_model("debiformer_tiny", num_classes=0, feature_norms=True)
        debiformer.load_published(state_dict, expected)
        assert same(features.model, expected.state_dict())
    classifier = timm.create_model("debiformer_tiny", feature_norms=True, **source)
    assert torch.equal(classifier.head.fc.weight, tiny["head.fc.weight"])


def test_pretrained_from_a_hub_download(tmp_path, tiny, monkeypatch):
    """The Hub client is replaced by one that finds the file locally; the rest is the real path."""
    safetensors.torch.save_file(tiny, tmp_path / "model.safetensors")
    asked = []

    def download(repo_id, filename, **_):
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    model = timm.create_model("debiformer_tiny", pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id="someone/debiformer_tiny"))
    assert same(model, tiny)
    assert asked == [("someone/debiformer_tiny", "model.safetensors")]


@pytest.mark.parametrize(
    ("name", "says"),
    [("debiformer_small", "debi_small"), ("biformer_base", "fail since early 2026"), ("debiformer_nano", "no published weights")],
)
def test_pretrained_without_a_source_is_an_error_not_random_weights(name, says):
    with pytest.raises(RuntimeError, match=says) as error:
        timm.create_model(name, pretrained=True)
    assert "debiformer.load_published" in str(error.value)
