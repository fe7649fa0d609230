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


def test_gpu_benchmark_on_a_toy():
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for part in ("correctness", "ops", "models", "largest-batch"):
        assert part in run.stdout
