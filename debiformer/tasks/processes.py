"""Runs of several processes: who started them, weights spread over them, batch norms that share their statistics."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from .checkpointing import verify


class Started(NamedTuple):
    """How a launcher spread a run: its name, processes on each node, nodes."""

    launcher: str
    devices: int
    num_nodes: int


def started() -> Started | None:
    """What torchrun or srun started this process as a part of; None where neither did."""
    if TorchElasticEnvironment.detect():
        world, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return Started("torchrun", here, world // here)
    if SLURMEnvironment.detect():
        return Started("srun", int(os.environ.get("SLURM_NTASKS_PER_NODE", 1)), int(os.environ.get("SLURM_NNODES", 1)))
    return None


def prepare(settings: Any, launch: Started | None) -> None:
    """Complete a trainer's settings: synchronised norms as ours, and devices and nodes as launched, unless they say how many."""
    if settings.sync_batchnorm:
        settings.plugins.append(SyncBatchNorms())
    if launch is None:
        return
    if (settings.devices, settings.num_nodes) == ("auto", 1):
        settings.devices, settings.num_nodes = launch.devices, launch.num_nodes
    if launch.launcher == "srun" and not any(isinstance(plugin, ClusterEnvironment) for plugin in settings.plugins):
        # Lightning's own way to go on would leave a file in default_root_dir that the next run there takes for its own.
        settings.plugins.append(SLURMEnvironment(auto_requeue=False))


def check(trainer: Trainer, settings: Any, launch: Started | None) -> None:
    """See that a trainer does what its settings ask for.

    Raises:
        ValueError: If it would take another precision, cannot synchronise batch norms, or would not use all processes that were started.
    """
    spread = (trainer.num_devices, trainer.num_nodes)
    if str(settings.precision) in ("16", "16-mixed") and trainer.precision == "bf16-mixed":
        raise ValueError(f"trainer.precision={settings.precision} needs a GPU; on a CPU take bf16-mixed")
    if settings.sync_batchnorm and isinstance(trainer.accelerator, CPUAccelerator):
        raise ValueError("trainer.sync_batchnorm=true needs GPUs: PyTorch's synchronised norms do not run on a CPU")
    if launch and spread != (launch.devices, launch.num_nodes):
        raise ValueError(
            f"{launch.launcher} started {launch.devices} processes on each of {launch.num_nodes} nodes, which do not go with "
            f"trainer.devices={trainer.num_devices} and trainer.num_nodes={trainer.num_nodes}: leave these two out"
        )


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread parameters over the processes of a one-dimensional mesh, in place.

    Gathered together are the parameters of each block, which is a member of a sequence (`nn.Sequential`, `nn.ModuleList`) with modules of
    its own, innermost first; and what is left, which belongs to the whole.
    """
    members = {member for sequence in model.modules() if isinstance(sequence, nn.Sequential | nn.ModuleList) for member in sequence}
    for module in reversed(list(model.modules())):
        runs = not isinstance(module, nn.ModuleList | nn.ModuleDict)  # others are never called, so that nothing would gather theirs
        if module in members and runs and any(True for _ in module.children()) and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


class FSDP2(ModelParallelStrategy):
    """Weights, gradients and the optimizer's state spread over all processes of the run: `--trainer.strategy fsdp2`.

    A checkpoint is one file with whole weights, as that of any other strategy, and either goes on from the other's.
    """

    PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Connect the processes.

        Raises:
            ValueError: If the run wants what does not go with spread weights.
        """
        assert self.lightning_module is not None
        trainer: Any = self.lightning_module.trainer
        if trainer.precision not in self.PRECISIONS:
            raise ValueError(f"trainer.precision={trainer.precision} does not go with fsdp2: take {' or '.join(self.PRECISIONS)}")
        averaging = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
        if averaging:
            raise ValueError(f"{averaging[0]} keeps a whole copy of the weights, which fsdp2 spreads: leave it out, or take ddp")
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        if self._layer_sync is not None:  # Lightning heeds it in DDP only
            self._layer_sync.apply(self.lightning_module)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any strategy, whose checksums are right, into model and optimizers; the rest comes back."""
        verify(Path(checkpoint_path))
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=weights_only, mmap=True)
        assert self.model is not None
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=whole)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", []) if self.optimizers else [], strict=True):
            # Parameters go by their place in the optimizer's groups, here by name: strategies number them otherwise.
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            named = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            name_of = dict(zip(numbers, named, strict=True))
            groups = [group | {"params": [name_of[number] for number in group["params"]]} for group in saved["param_groups"]]
            state = {name_of[number]: value for number, value in saved["state"].items()}
            set_optimizer_state_dict(self.model, optimizer, {"state": state, "param_groups": groups}, options=whole)
        return checkpoint

    def on_validation_start(self) -> None:
        """Evaluate with the running statistics of the first process everywhere, which a checkpoint holds too; DDP does the same."""
        assert self.lightning_module is not None
        for buffer in self.lightning_module.buffers():
            torch.distributed.broadcast(buffer, src=0)

    on_test_start = on_validation_start


class SyncBatchNorms(TorchSyncBatchNorm):
    """Lightning's synchronisation of batch norms, which would drop the activations that timm's norms bring."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Make every batch norm take its statistics over all processes."""
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave them so: in evaluation they do what they did before."""
        return model


StrategyRegistry.register("fsdp2", FSDP2, description="Fully sharded data parallel, PyTorch's second")
