"""A run that is killed goes on with the same command, to the weights of one that was not."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from debiformer.cli.training import run
from debiformer.tasks.checkpointing import LastCheckpoint
from debiformer.tasks.classification import ClassificationTask

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
  max_epochs: 6
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


SMALL = """
seed_everything: 3
data:
  class_path: debiformer.data.folders.ImageFolders
  init_args: {root: ../images, input_size: 32, batch_size: 4, num_workers: 0}
model: {model: test_resnet, mixup: 0.8, drop_path_rate: 0.1}
trainer: {accelerator: cpu, max_epochs: 3, num_sanity_val_steps: 0, enable_progress_bar: false, enable_model_summary: false}
checkpoint_minutes: 0
"""
SHARDS = ["--data", "debiformer.data.shards.TarShards", "--data.train", "../shards/{0..3}.tar", "--data.val", "../shards/0.tar"]
SHARDS += ["--data.train_images", "24", "--data.val_images", "6", "--data.class_names", '["a","b"]', "--data.block", "4"]


class Cut(Exception):
    """Stands for the end of the power supply."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 training images, six batches an epoch, as folders and as shards."""
    root, noise = tmp_path_factory.mktemp("resume"), np.random.default_rng(0)
    (root / "shards").mkdir()
    for split, count in (("train", 24), ("val", 6)):
        for index in range(count):
            file = root / "images" / split / "ab"[index % 2] / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
    for number in range(4):
        with webdataset.TarWriter(str(root / f"shards/{number}.tar")) as shard:
            for index in range(6 * number, 6 * number + 6):
                content = (root / "images/train" / "ab"[index % 2] / f"{index}.png").read_bytes()
                shard.write({"__key__": f"{index}", "png": content, "cls": str(index % 2)})
    return root


def cut_after(writes: int, patch: pytest.MonkeyPatch) -> None:
    """Cut the run off when it has written so many checkpoints."""
    write, written = LastCheckpoint._write, []

    def write_and_cut(self, trainer):
        write(self, trainer)
        written.append(trainer.global_step)
        if len(written) == writes:
            raise Cut

    patch.setattr(LastCheckpoint, "_write", write_and_cut)


def ask_to_end_in_the_second_epoch(patch: pytest.MonkeyPatch, signum: int) -> None:
    step = ClassificationTask.training_step

    def step_and_ask(self, batch, batch_idx):
        if self.trainer.current_epoch == 1 and batch_idx == 0:
            os.kill(os.getpid(), signum)
        return step(self, batch, batch_idx)

    patch.setattr(ClassificationTask, "training_step", step_and_ask)


def ended(folder: Path) -> dict:
    return torch.load(folder / "runs/run/checkpoints/last.ckpt", weights_only=True, map_location="cpu")


def validated(folder: Path) -> dict[int, float]:
    """Accuracy by step, over all starts of a run."""
    rows = [row for file in sorted(folder.glob("runs/run/csv/*/metrics.csv")) for row in csv.DictReader(file.open())]
    return {int(row["step"]): float(row["val/acc"]) for row in rows if row["val/acc"]}


@pytest.mark.filterwarnings("ignore")
class TestCutOff:
    """After any of the checkpoints, in one process and so fast enough to try what is easily got wrong."""

    @pytest.mark.parametrize(
        ("options", "writes"),
        [
            (["--trainer.max_steps", "15", "--trainer.max_epochs", "-1"], 6),  # at the end of the first epoch
            (["--trainer.max_steps", "15"], 8),
            (["--model.freeze_backbone", "true"], 2),
            (["--trainer.limit_train_batches", "0.5", "--trainer.accumulate_grad_batches", "2"], 3),
            (["--trainer.val_check_interval", "2"], 2),
            (["--model.on_nonfinite", "skip"], 4),
            (SHARDS, 2),
            (SHARDS, 6),
        ],
    )
    def test_goes_on_to_the_same_weights(self, images, tmp_path, monkeypatch, options, writes):
        line = ["--config", "small.yaml", "--name", "run", *options]
        folders = {}
        for name in ("whole", "cut"):
            folders[name] = images / f"{name}-{tmp_path.name}"
            folders[name].mkdir()
            monkeypatch.chdir(folders[name])
            Path("small.yaml").write_text(SMALL)
            if name == "cut":
                with monkeypatch.context() as patch:
                    cut_after(writes, patch)
                    with pytest.raises(Cut):
                        run("fit", line)
            run("fit", line)
        found, expected = ended(folders["cut"]), ended(folders["whole"])
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert_same(found[part], expected[part], part)
        assert validated(folders["cut"]) == validated(folders["whole"])
        best = [torch.load(folder / "runs/run/checkpoints/best.ckpt", weights_only=True) for folder in folders.values()]
        assert_same(best[0]["state_dict"], best[1]["state_dict"])

    @pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_run_that_is_asked_to_end_does_so_between_two_updates(self, images, tmp_path, monkeypatch, signum, code):
        line = ["--config", "small.yaml", "--name", "run", "--trainer.accumulate_grad_batches", "3", "--checkpoint_minutes", "1000"]
        for name in ("whole", "asked"):
            folder = images / f"{name}-{tmp_path.name}"
            folder.mkdir()
            monkeypatch.chdir(folder)
            Path("small.yaml").write_text(SMALL)
            if name == "asked":
                with monkeypatch.context() as patch:
                    ask_to_end_in_the_second_epoch(patch, signum)
                    with pytest.raises(SystemExit) as stop:
                        run("fit", line)
                assert stop.value.code == code
                assert (ended(folder)["epoch"], ended(folder)["global_step"]) == (1, 3)  # two updates in the first epoch, one in this
            run("fit", line)
        for part in ("state_dict", "optimizer_states", "global_step"):
            assert_same(ended(folder)[part], ended(images / f"whole-{tmp_path.name}")[part], part)

    def test_a_run_that_is_asked_to_end_before_its_first_update_does_so_there(self, images, tmp_path, monkeypatch):
        folder = images / tmp_path.name
        folder.mkdir()
        monkeypatch.chdir(folder)
        Path("small.yaml").write_text(SMALL)
        check, line = ClassificationTask.validation_step, ["--config", "small.yaml", "--name", "run"]

        def check_and_ask(self, batch, batch_idx):
            assert self.trainer.sanity_checking
            os.kill(os.getpid(), signal.SIGTERM)
            return check(self, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(ClassificationTask, "validation_step", check_and_ask)
            with pytest.raises(SystemExit) as stop:
                run("fit", [*line, "--trainer.num_sanity_val_steps", "2"])
        assert stop.value.code == 143
        assert not list(folder.glob("runs/run/checkpoints/*"))
        run("fit", [*line, "--trainer.max_epochs", "1"])  # and other settings are no obstacle: nothing was begun
        assert ended(folder)["epoch"] == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--data.batch_size", "8"], "there were images 24, images per batch 4; here are images 24, images per batch 8"),
            (["--data.root", "../more"], "there were images 24, images per batch 4; here are images 25, images per batch 4"),
        ],
    )
    def test_other_batches_are_refused(self, images, tmp_path, monkeypatch, options, message):
        folder = images / tmp_path.name
        folder.mkdir()
        monkeypatch.chdir(folder)
        Path("small.yaml").write_text(SMALL)
        if not (images / "more").exists():
            shutil.copytree(images / "images", images / "more")
            shutil.copy(images / "images/train/a/0.png", images / "more/train/a/0again.png")
        line = ["--config", "small.yaml", "--name", "run"]
        run("fit", [*line, "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "1"])
        config = folder / "runs/run/config.yaml"
        config.write_text(config.read_text().replace("max_epochs: 1", "max_epochs: 2"))
        with pytest.raises(ValueError, match=message):
            run("fit", [*line, "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "2", *options])
