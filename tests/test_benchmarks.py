"""What the benchmarks compare with computes the same, and the one that needs a GPU runs as far as a CPU lets it."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(("name", "size"), [("debiformer_nano", (65, 90)), ("biformer_stl", (64, 96))])
def test_the_twin_is_the_model(name, size, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from twin import Twin

    model, x = timm.create_model(name, num_classes=5).double().eval(), torch.randn(2, 3, *size, dtype=torch.float64)
    found = []
    for form in (model, Twin(model)):
        model.zero_grad()
        out = form(x)
        out.square().sum().backward()
        found.append([out, *(p.grad for p in model.parameters())])
    for ours, twins in zip(*found, strict=True):
        torch.testing.assert_close(ours, twins, rtol=1e-8, atol=1e-10)


def test_latencies_of_topk_on_a_toy(monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.syspath_prepend(BENCHMARKS)
    from table6 import measure

    rows = [{"bra_topk": [1, 2, 4, 4], "dbra_topk": [2, 4, 4, 8]}]
    (milliseconds,) = measure("debiformer_nano", rows, "OpenVINO", threads=torch.get_num_threads(), rounds=1)
    assert milliseconds > 0


def test_gpu_benchmark_on_a_toy():
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for part in ("correctness", "ops", "models", "largest-batch"):
        assert part in run.stdout


def test_the_small_mechanisms_have_equal_budgets(monkeypatch):
    """But for the agents of deformable bi-level routing, which have parameters of their own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from mechanisms import MIXERS

    from debiformer.cli.bench import count
    from debiformer.models.swin_layout import MIXERS as WHOLE

    assert {*MIXERS} == {*WHOLE} - {"bi_level_routing_nchw"}
    counts = [count("layout_for_cifar", (64, 64), dict(mixer=mixer, num_classes=10)) for mixer in MIXERS]
    for amounts in zip(*counts, strict=True):
        assert max(amounts) / min(amounts) < 1.16
    model = timm.create_model("layout_for_cifar", mixer="deformable_bi_level_routing", num_classes=10)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_hours_by_hand(monkeypatch):
    """300 epochs of ImageNet at 8 x 1000 x 0.9 images a second."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from hours import predict

    from debiformer.cli.training import known_recipes

    found = predict(known_recipes()["imagenet1k/debiformer_tiny"], speed=1000.0, devices=8, efficiency=0.9)
    assert found["images/s"] == 7200
    assert found["hours"] == pytest.approx(300 * 1281167 / 7200 / 3600, abs=0.05)
    assert found["updates/s"] == pytest.approx(7200 / 1024, abs=1e-4)
    assert (found["gradient MB"], found["on the wire MB"]) == (86.0, 150.5)  # of 21,495,598 parameters
    assert found["data MB/s"] == 792
