"""Runs of two processes on the CPU, started as users start them, against one process that sees the same images."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from recording import read

from debiformer.cli import main
from debiformer.data.blood_cells import SAMPLE

ROOT = Path(__file__).parents[1]
COUNTS = {"train": {"platelet": 16, "rbc": 17, "wbc": 17}, "val": {"platelet": 7, "rbc": 7, "wbc": 7}}
SETTINGS = """
seed_everything: 3
data:
  class_path: debiformer.data.folders.ImageFolders
  init_args: {root: ../cells, input_size: 32, batch_size: 5, num_workers: 1, auto_augment: rand-m9-mstd0.5-inc1}
model: {model: test_convnext, optimizer: sgd, lr: 0.2, weight_decay: 1.0e-4, warmup_epochs: 0.4}
trainer:
  max_epochs: 2
  accelerator: cpu
  precision: 64-true
  gradient_clip_val: 1.0
  log_every_n_steps: 2
  enable_progress_bar: false
  enable_model_summary: false
  callbacks: {class_path: recording.Recorder, init_args: {folder: seen}}
checkpoint_minutes: 0
"""
# The second makes torchrun give each start of the workers a store of its own: https://github.com/pytorch/pytorch/issues/135712
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
pytestmark = pytest.mark.timeout(600)


def start(folder, *options, restarts=3):
    """`debiformer fit` with the settings on two processes, started by torchrun in a folder of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(SETTINGS)
    launch = f"torch.distributed.run --standalone --nproc_per_node 2 --max-restarts {restarts} -m debiformer fit"
    command = [sys.executable, "-m", *launch.split(), "--config", "recipe.yaml", "--name", "run", *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=folder, env=os.environ | ENVIRONMENT, **pipes)


def torchrun(folder, *options):
    """The same to its end; what was printed."""
    with start(folder, *options) as run:
        said, _ = run.communicate()
    assert run.returncode == 0, said[-4000:]
    return said


def last(folder):
    """The last checkpoint of a run."""
    return torch.load(folder / "runs" / "run" / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a few cells: as many to train on as fill batches of ten, an odd number to evaluate on."""
    work = tmp_path_factory.mktemp("distributed")
    for split, classes in COUNTS.items():
        for name, count in classes.items():
            (work / "cells" / split / name).mkdir(parents=True)
            for file in sorted((SAMPLE / split / name).iterdir())[:count]:
                shutil.copy(file, work / "cells" / split / name)
    return work


@pytest.fixture(scope="module")
def one(work):
    """A run of one process with batches of ten."""
    (work / "one").mkdir()
    (work / "one" / "recipe.yaml").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work / "one")
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        assert main(["fit", "--config", "recipe.yaml", "--name", "run", "--data.batch_size", "10"]) == 0
    return work / "one"


@pytest.fixture(scope="module")
def two(work):
    """The same of two processes with batches of five."""
    torchrun(work / "two")
    return work / "two"


class TestTwoProcessesAreOne:
    def test_gradients_and_weights(self, one, two):
        for update in range(10):
            expected = torch.load(one / "seen" / f"gradients{update}.0")
            for rank in range(2):
                found = torch.load(two / "seen" / f"gradients{update}.{rank}")
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(last(two)["state_dict"], last(one)["state_dict"], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("epoch", [0, 1])
    def test_each_trains_on_its_half(self, work, one, two, epoch):
        whole = read(one / "seen", f"epoch{epoch}")
        halves = [read(two / "seen", f"epoch{epoch}", rank) for rank in range(2)]
        assert [first + second for first, second in zip(*halves, strict=True)] == whole
        names = [Path(name).name for batch in whole for name in batch]
        assert sorted(names) == sorted(file.name for file in (work / "cells" / "train").glob("*/*"))

    def test_each_evaluates_its_half(self, work, two):
        halves = [[name for batch in read(two / "seen", "val0", rank) for name in batch] for rank in range(2)]
        assert [len(half) for half in halves] == [11, 10]
        assert {Path(name).name for half in halves for name in half} == {file.name for file in (work / "cells" / "val").glob("*/*")}
        assert read(two / "seen", "val0", 1)[-1] == []  # a batch of nothing but padding

    def test_metrics(self, one, two):
        expected = read(one / "seen", "scores")
        assert len({score["val/loss"] for score in expected}) == len(expected)
        for rank in range(2):
            found = read(two / "seen", "scores", rank)
            assert [score["val/acc"] for score in found] == [score["val/acc"] for score in expected]
            assert found == [pytest.approx(score, rel=1e-6) for score in expected]  # means are sums in another order


def test_a_worker_that_dies_is_replaced_and_the_run_goes_on(work, two):
    """To the very weights of the run that nothing happened to."""
    said = torchrun(work / "killed", "--trainer.callbacks.init_args.kill_at", "[7]")
    assert "exitcode: -9" in said
    assert "Restored all states from the checkpoint at runs/run/checkpoints/last.ckpt" in said
    found, expected = last(work / "killed"), last(two)
    assert found["global_step"] == expected["global_step"] == 10
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(found["optimizer_states"], expected["optimizer_states"], rtol=0, atol=0)


def test_sigterm_to_torchrun_loses_nothing(work):
    """It passes it on to all processes there are, and the run ends with a checkpoint of its last update."""
    folder = work / "ended"
    with start(folder, "--trainer.max_epochs", "1000", "--checkpoint_minutes", "10") as run:
        while not (folder / "seen" / "epoch1.0").exists():
            assert run.poll() is None, run.stdout.read()[-4000:]
            time.sleep(0.1)
        run.terminate()
        run.communicate()
    trained = sum(len(read(folder / "seen", file.stem)) for file in (folder / "seen").glob("epoch*.0"))
    assert last(folder)["global_step"] == trained


def test_spread_weights(work, two, monkeypatch):
    """A run that DDP began ends in FSDP2, through the death of another worker, with the weights of DDP; one process evaluates them."""
    options = ["--trainer.precision", "32-true", "--model.grad_checkpointing", "true", "--trainer.callbacks.init_args.kill_at", "[3, 7]"]
    with start(work / "spread", *options, restarts=0) as run:
        run.communicate()
    said = torchrun(work / "spread", *options, "--trainer.strategy", "fsdp2")
    assert said.count("Restored all states from the checkpoint at runs/run/checkpoints/last.ckpt") == 2
    (weights,) = read(two / "seen", "held")
    assert all(read(work / "spread" / "seen", "held", rank)[-1] < 0.6 * weights for rank in range(2))
    found, expected = (last(work / name)["state_dict"] for name in ("spread", "two"))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-4, atol=1e-5, msg=name)
    monkeypatch.chdir(work / "spread")
    alone = ["--trainer.strategy", "auto", "--trainer.devices", "1"]
    assert main(["validate", "--ckpt_path", "runs/run/checkpoints/last.ckpt", *alone]) == 0


def test_tar_shards_on_two_nodes_of_slurm(work):
    """Two tasks as srun starts them on two nodes, each with its own shards; a model with batch norms."""
    webdataset = pytest.importorskip("webdataset")
    folder = work / "slurm"
    folder.mkdir()
    for split in ("train", "val"):
        files = sorted((work / "cells" / split).glob("*/*"))
        for part in range(2):
            with webdataset.TarWriter(str(folder / f"{split}-{part}.tar")) as tar:
                for file in files[part::2]:
                    tar.write({"__key__": file.stem, "jpg": file.read_bytes(), "cls": sorted(COUNTS[split]).index(file.parent.name)})
    (folder / "recipe.yaml").write_text(SETTINGS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(port)}
    slurm |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    shards = {"train": "train-{0..1}.tar", "val": "val-{0..1}.tar", "train_images": 50, "val_images": 21}
    options = ["--data", "debiformer.data.shards.TarShards", *(f"--data.{name}={value}" for name, value in shards.items())]
    options += ["--data.class_names=[platelet, rbc, wbc]", "--data.input_size=64", "--data.batch_size=5", "--data.num_workers=1"]
    options += ["--model.model=debiformer_nano", "--model.optimizer=adamw", "--trainer.precision=32-true", "--trainer.max_epochs=1"]
    command = [sys.executable, "-m", "debiformer", "fit", "--config", "recipe.yaml", "--name", "run", *options]
    tasks = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | ENVIRONMENT | slurm | {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in range(2)
    ]
    for task in tasks:
        said, _ = task.communicate()
        assert task.returncode == 0, said[-4000:]
    for split, kind in (("train", "epoch0"), ("val", "val0")):
        halves = [[name.split(": ")[1] for batch in read(folder / "seen", kind, rank) for name in batch] for rank in range(2)]
        assert sorted(halves[0] + halves[1]) == sorted(file.stem for file in (work / "cells" / split).glob("*/*"))
    assert read(folder / "seen", "scores", 0) == read(folder / "seen", "scores", 1)
    weights = [torch.load(folder / "seen" / f"weights.{rank}") for rank in range(2)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
