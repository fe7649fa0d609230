"""A run that is killed goes on with the same command, to the weights of one that was not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SETTINGS = """
seed_everything: 3
data:
  class_path: debiformer.data.blood_cells.BloodCells
  init_args: {batch_size: 8, num_workers: 2}
model:
  model: debiformer_nano
  drop_path_rate: 0.2
  mixup: 0.8
  cutmix: 1.0
  warmup_epochs: 0.5
trainer:
  max_epochs: 3
  limit_train_batches: 6
  limit_val_batches: 2
  accumulate_grad_batches: 2
  gradient_clip_val: 1.0
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
      init_args: {decay: 0.9, use_buffers: true}
checkpoint_minutes: 0
"""


def fit(folder: Path, kills: int, *more: str) -> int:
    """The number of times that the run was killed."""
    (folder / "recipe.yaml").write_text(SETTINGS)
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(kills), "5", "--config", "recipe.yaml", "--name", "run", *more]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return int(run.stdout.split()[-1])


def assert_same(found, expected, path=""):
    assert type(found) is type(expected), path
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected), path
    elif isinstance(found, dict):
        assert found.keys() == expected.keys(), path
        for name in found:
            assert_same(found[name], expected[name], f"{path}.{name}")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), path
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{path}.{index}")
    else:
        assert found == expected, path


@pytest.mark.timeout(600)
def test_killed_at_random_moments(tmp_path):
    """Weights, their running mean, optimizer and schedule are those of a run that nothing happened to, bit by bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert fit(whole, 0) == 0
    assert fit(killed, 6) >= 3, "the run was over before it could be killed"
    found, expected = (
        torch.load(folder / "runs/run/checkpoints/last.ckpt", weights_only=True, map_location="cpu") for folder in (killed, whole)
    )
    for part in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(found[part], expected[part], part)
    assert not list(killed.rglob("*.unfinished"))
