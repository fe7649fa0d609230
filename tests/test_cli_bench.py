import json

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from debiformer.cli import bench, main
from debiformer.ops import use_backend

SMALL = ["--image-size", "64", "--batch-size", "2", "--rounds", "1", "--threads", "1"]


def test_models_are_compared_in_one_table(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert main(["bench", "debiformer_nano", "test_convnext", *SMALL, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["model", "debiformer_nano", "test_convnext"]
    assert "round 1 of 1: test_convnext" in err
    ours, other = json.loads(file.read_text())["models"]
    assert ours["ratio"] == 1
    assert other["ratio"] == pytest.approx(ours["ms"] / other["ms"])
    assert ours["images/s"] == pytest.approx(2 / ours["ms"] * 1000)
    assert ours["GMAC/s"] == pytest.approx(ours["GMACs"] * ours["images/s"])


@pytest.mark.parametrize("options", [["--train"], ["--dtype", "bfloat16"], ["--train", "--dtype", "bfloat16"], ["--region-grid", "5"]])
def test_options_run(options, tmp_path, capsys):
    assert main(["bench", "debiformer_nano", *SMALL, *options, "--json", str(tmp_path / "out.json")]) == 0
    settings = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert settings["train"] == ("--train" in options)
    assert settings["dtype"] == ("bfloat16" if "bfloat16" in options else "float32")


def test_multiply_adds_are_those_of_the_definitions():
    parameters, macs = bench.count("resnet18", (224, 224))
    assert parameters == 11_689_512
    assert macs == pytest.approx(1.814e9, rel=1e-3)  # as torchvision states
    assert bench.count("debiformer_tiny", (224, 224))[1] == pytest.approx(
        2.63598e9, rel=1e-3
    )  # the published code's, which routes where there is no choice
    rows, tall = (bench.count("debiformer_nano", size)[1] for size in ((64, 128), (128, 64)))
    assert rows == pytest.approx(tall)


def test_what_is_left_out_in_counting_is_not_counted():
    with torch.device("meta"), torch.no_grad(), use_backend("reference"), FlopCounterMode(display=False) as counter:
        timm.create_model("debiformer_nano").eval()(torch.empty(1, 3, 70, 90))
    assert bench.count("debiformer_nano", (70, 90))[1] == counter.get_total_flops() / 2


def test_a_model_of_one_size_is_built_for_the_images():
    assert bench.model_arguments("swin_tiny_patch4_window7_224", (256, 192)) == {"img_size": (256, 192)}
    assert bench.model_arguments("convnext_tiny", (256, 192)) == {}


def test_every_round_runs_all_in_turn_and_the_median_counts(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    durations = {"a": iter([90, 1, 50, 2]), "b": iter([90, 7, 7, 8])}

    def run(name):
        order.append(name)
        now[0] += next(durations[name])

    seconds = bench.alternate({name: lambda name=name: run(name) for name in "ab"}, rounds=3, warmup=1)
    assert seconds == {"a": 2, "b": 7}
    assert "".join(order) == "abababab"


def test_training_leaves_the_gradients_of_one_step():
    model = nn.Linear(3, 2, bias=False)
    x = torch.randn(5, 3)
    step = bench.training(model, x)
    step()
    step()
    expected = 2 * model(x).T @ x / 10  # of the mean square
    torch.testing.assert_close(model.weight.grad, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["debiformer_smal"], "no model 'debiformer_smal' in timm: did you mean debiformer_small"),
        (["resnet18", "--region-grid", "4"], "--region-grid 4: none of resnet18 has regions"),
        (["resnet18", "--image-size", "1", "2", "3"], "--image-size 1 2 3: give one number, or height and width"),
        (["resnet18", "--device", "abacus"], "--device abacus cannot be used here"),
        (["resnet18", "--json", "absent/out.json"], "--json absent/out.json: there is no folder absent"),
        (["debiformer_nano", "--image-size", "16"], "debiformer_nano does not run at 16x16: expected images of at least 32x32"),
        (["debiformer_tiny", "--region-grid", "4"], "debiformer_tiny does not run at 224x224: topk="),
    ],
)
def test_mistakes_are_named_before_any_work(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "building" not in error
