from types import SimpleNamespace

import pytest
import timm
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, TensorDataset

from debiformer.tasks.checkpointing import LastCheckpoint
from debiformer.tasks.classification import ClassificationTask
from debiformer.tasks.processes import FSDP2, Started, check, prepare, started

QUIET = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


def settings(**given):
    return SimpleNamespace(**(dict(devices="auto", num_nodes=1, precision=None, sync_batchnorm=False, plugins=[]) | given))


class TestLaunchers:
    def test_none(self):
        assert started() is None

    def test_torchrun(self, monkeypatch):
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
            monkeypatch.setenv(name, value)
        assert started() == Started("torchrun", devices=8, num_nodes=2)

    def test_srun(self, monkeypatch):
        slurm = {"NTASKS": "6", "NTASKS_PER_NODE": "2", "NNODES": "3", "JOB_NAME": "train", "PROCID": "4", "LOCALID": "0", "NODEID": "2"}
        for name, value in slurm.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        launch = started()
        assert launch == Started("srun", devices=2, num_nodes=3)
        given = settings()
        prepare(given, launch)
        assert (given.devices, given.num_nodes) == (2, 3)
        assert not given.plugins[0].auto_requeue

    def test_what_was_asked_for_is_kept(self):
        given = settings(devices=2)
        prepare(given, Started("torchrun", 4, 1))
        assert (given.devices, given.num_nodes) == (2, 1)

    def test_processes_without_work_are_refused(self):
        with pytest.raises(ValueError, match=r"torchrun started 2 processes on each of 1 nodes.*trainer.devices=1 and trainer.num_nodes=1"):
            check(Trainer(**QUIET, devices=1), settings(devices=1), Started("torchrun", 2, 1))


def test_half_precision_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match=r"trainer.precision=16-mixed needs a GPU; on a CPU take bf16-mixed"):
        check(Trainer(**QUIET, precision="16-mixed"), settings(precision="16-mixed"), None)


class TestSpreadWeights:
    """What does not go with it; `tests/test_distributed.py` has what does."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"callbacks": [EMAWeightAveraging()]}, "EMAWeightAveraging keeps a whole copy of the weights"),
            ({"precision": "64-true"}, r"trainer.precision=64-true does not go with fsdp2: take 32-true or"),
        ],
    )
    def test_refused(self, options, message):
        task, data = ClassificationTask("test_convnext", ["a", "b"]), DataLoader(TensorDataset(torch.zeros(2, 3, 32, 32), torch.zeros(2)))
        with pytest.raises(ValueError, match=message):
            Trainer(**QUIET, strategy="fsdp2", devices=1, **options).fit(task, data)

    def test_another_strategy_of_the_kind(self):
        task = ClassificationTask("test_convnext", ["a", "b"])
        task._device_mesh = object()
        task._trainer = SimpleNamespace(strategy=ModelParallelStrategy(), precision_plugin=Precision())
        with pytest.raises(ValueError, match=r"trainer.strategy=ModelParallelStrategy is not known here: take fsdp2"):
            task.configure_model()

    def test_it_goes_by_its_name(self):
        assert isinstance(Trainer(**QUIET, strategy="fsdp2").strategy, FSDP2)


def test_nodes_that_do_not_share_a_disk(tmp_path):
    """The first process has a checkpoint, this one does not see it."""
    strategy = SimpleNamespace(broadcast=lambda _: True)
    alone = SimpleNamespace(strategy=strategy, global_rank=3, is_global_zero=False)
    with pytest.raises(FileNotFoundError, match=r"process 3 has no .*last.ckpt and the first process has one: put"):
        LastCheckpoint(tmp_path, minutes=1).setup(alone, None, "fit")


class TestSynchronisedNorms:
    @pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "debiformer_nano"])
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_the_option_converts_every_norm_and_keeps_what_it_does(self, name, strategy):
        """In evaluation; PyTorch has no training with them on a CPU."""
        given = settings(sync_batchnorm=True)
        prepare(given, None)
        trainer = Trainer(**QUIET, strategy=strategy, devices=2, sync_batchnorm=True, plugins=given.plugins)
        model = timm.create_model(name, num_classes=3)
        model(torch.randn(4, 3, 64, 64))  # statistics worth keeping
        images = torch.randn(2, 3, 64, 64)
        expected = model.eval()(images)
        synchronised = trainer.strategy._layer_sync.apply(model)
        assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in synchronised.modules())
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in synchronised.modules())
        torch.testing.assert_close(synchronised(images), expected)

    def test_a_cpu_is_refused(self):
        with pytest.raises(ValueError, match=r"trainer.sync_batchnorm=true needs GPUs"):
            check(Trainer(**QUIET, devices=2), settings(sync_batchnorm=True), None)
