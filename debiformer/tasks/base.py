"""What the tasks share: a timm model by name, timm's optimizers and schedules, a stop at a loss that is not finite."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DistributedSampler

from ..models.weights import load_weights
from ..nearest import did_you_mean
from ..progress import StopAfter, batches_done, limited
from ..seeding import Use, reseed, run_seed
from .addresses import is_address, read_config
from .checkpointing import versions
from .processes import FSDP2, shard


def create_model(name: str, num_classes: int, pretrained: bool | str = False, **model_args: Any) -> nn.Module:
    """Any timm model by name, with published weights if wanted.

    Args:
        name: A name that `timm.list_models` knows, or an address: hf-hub:OWNER/NAME or local-dir:FOLDER.
        num_classes: Width of the classifier.
        pretrained: True takes the weights that timm knows for the model, a path those of that file.
        model_args: Anything else that the model's constructor takes.

    Raises:
        ValueError: If timm has no such model, or the weights do not fit it.
        FileNotFoundError: If there is no weights file at that path, or no model in that folder.
        OSError: If the Hub does not give the model.
    """
    if is_address(name):
        read_config(name)
        if not pretrained:
            rank_zero_warn(f"model={name!r} gives the architecture alone, with random weights: set pretrained to true for its own")
    elif not timm.is_model(name):
        raise ValueError(f"model={name!r} is unknown to timm: {did_you_mean(name, timm.list_models())}")
    try:
        model = timm.create_model(name, pretrained=pretrained is True, num_classes=num_classes, **model_args)
    except (RuntimeError, TypeError, SafetensorError) as error:  # no weights, damaged ones, arguments that the constructor does not have
        raise ValueError(f"model={name!r} with pretrained={pretrained!r} and model_args={model_args}: {error}") from error
    if isinstance(pretrained, str):
        load_weights(model, pretrained)
    return model


class BaseTask(LightningModule):
    """A model with an optimizer, a schedule and a loss that must stay finite.

    A subclass calls `save_hyperparameters` with optimizer, lr, lr_batch_size, weight_decay, warmup_lr, min_lr and on_nonfinite among the
    arguments, then `check_hyperparameters`, and sets `model`.
    """

    kind: ClassVar[str]  # what the command line and checkpoints call the task
    model: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.skipped = 0  # updates left out
        self.losses: list[Tensor] = []  # since the last update
        self.names: list[str] = []
        self.batch: Any = None
        self.buffers_before: list[Tensor] = []

    def check_hyperparameters(self) -> None:
        """Raise a ValueError that names the first optimizer or schedule argument that cannot work."""
        hparams = self.hparams
        optimizers = [str(name) for name in list_optimizers()]
        if hparams["optimizer"] not in optimizers:
            raise ValueError(f"optimizer={hparams['optimizer']!r} is unknown to timm: {did_you_mean(hparams['optimizer'], optimizers)}")
        if not hparams["lr"] > 0:
            raise ValueError(f"lr={hparams['lr']} must be above 0")
        if hparams["lr_batch_size"] is not None and hparams["lr_batch_size"] < 1:
            raise ValueError(f"lr_batch_size={hparams['lr_batch_size']} must be above 0, or left out")
        for name in ("weight_decay", "warmup_epochs", "warmup_steps", "warmup_lr", "min_lr"):
            if not hparams.get(name, 0) >= 0:
                raise ValueError(f"{name}={hparams[name]} must not be below 0")
        if hparams["on_nonfinite"] not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite={hparams['on_nonfinite']!r} is neither 'stop' nor 'skip'")
        if hparams.get("layer_decay") is not None and not 0 < hparams["layer_decay"] <= 1:
            raise ValueError(f"layer_decay={hparams['layer_decay']} must be above 0 and at most 1, or left out")

    def images_in(self, batch: Any) -> int:
        """How many images of a batch count: those that stand in for others have no name."""
        return sum(map(bool, batch.names))

    def configure_model(self) -> None:
        """Give the weights their precision, and spread them where the strategy is FSDP2; Lightning calls this once processes are joined.

        Raises:
            ValueError: If it is another `ModelParallelStrategy`.
        """
        if self._trainer is None:  # a task loaded from a checkpoint to predict
            return
        self.trainer.precision_plugin.convert_module(self)  # before Lightning loads a checkpoint, which would be rounded to what is here
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        if not isinstance(self.trainer.strategy, FSDP2):
            raise ValueError(f"trainer.strategy={type(self.trainer.strategy).__name__} is not known here: take fsdp2")
        shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """Timm's optimizer, and its schedule stepped after every update."""
        hparams, trainer = self.hparams, self.trainer
        optimizer = create_optimizer_v2(
            self.model,
            opt=hparams["optimizer"],
            lr=self.scaled_lr(),
            weight_decay=hparams["weight_decay"],
            layer_decay=hparams.get("layer_decay"),
        )
        updates_per_epoch, updates = run_length(trainer)
        name, warmup = self.warmup(updates_per_epoch)
        if warmup >= updates:
            raise ValueError(
                f"{name}={hparams[name]} takes {warmup} updates and the whole run has {updates}: "
                f"shorten the warm-up (model.{name}) or lengthen the run (trainer.max_epochs, trainer.max_steps)"
            )
        schedule = self.schedule(optimizer, updates_per_epoch, updates, warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def warmup(self, updates_per_epoch: int) -> tuple[str, int]:
        """The argument that says how long the warm-up is, and its updates."""
        return "warmup_epochs", round(self.hparams["warmup_epochs"] * updates_per_epoch)

    def schedule(self, optimizer: torch.optim.Optimizer, updates_per_epoch: int, updates: int, warmup: int) -> Scheduler:
        """Linear warm-up, then along a cosine down to `min_lr` at the end."""
        return CosineLRScheduler(
            optimizer,
            t_initial=updates,
            lr_min=self.hparams["min_lr"],
            warmup_t=warmup,
            warmup_lr_init=self.hparams["warmup_lr"],
            t_in_epochs=False,
        )

    def scaled_lr(self) -> float:
        """`lr`, in proportion to the images of an update where it is for another number of them."""
        lr, per = self.hparams["lr"], self.hparams["lr_batch_size"]
        if per is None:
            return lr
        batch_size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if batch_size is None:
            raise ValueError(f"lr_batch_size={per} needs a data module that has a batch_size to scale lr={lr} by")
        return lr * batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches / per

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Tell timm's scheduler the number of updates done."""
        scheduler.step_update(self.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make what is random about the step a function of seed, process and step; keep what a step that is left out must not change."""
        if self.hparams["on_nonfinite"] == "skip" and not self.losses:
            self.buffers_before = [buffer.clone() for buffer in self.model.buffers()]
        reseed(Use.STEP, run_seed(), self.global_rank, batches_done(self.trainer))

    def log_training(self, loss: Tensor, batch: Any) -> None:
        """Log train/loss and train/lr, and keep what a step that goes wrong is told by."""
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/lr", max_lr(self.trainer.optimizers))
        self.losses.append(loss.detach())
        self.names += getattr(batch, "names", [])
        self.batch = batch

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before an update with gradients that are not finite, stop, or leave it out, as `on_nonfinite` says.

        Raises:
            FloatingPointError: If the run is to stop; a file in its folder then holds the batch and the weights.
        """
        if not self._finite():
            if self.hparams["on_nonfinite"] == "stop":
                self._stop()
            optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without gradients, momentum and decay too
            for buffer, before in zip(self.model.buffers(), self.buffers_before, strict=True):
                buffer.copy_(before)  # running statistics of batch norms
            self.skipped += 1
            rank_zero_warn(f"{self._what_happened()}: update left out, the {self.skipped}. of this run")
        self.losses, self.names, self.batch = [], [], None

    def _finite(self) -> bool:
        """Whether the update is one to make; all processes agree."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            # The scaler itself leaves out gradients that overflowed, and scales the next ones less; it cannot mend a loss.
            return self.trainer.strategy.reduce_boolean_decision(all(map(math.isfinite, self.losses)))
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return math.isfinite(norm)  # of gradients that the processes have averaged

    def _what_happened(self) -> str:
        losses = ", ".join(f"{loss.item():g}" for loss in self.losses)
        return f"train/loss is {losses} and gradients are not finite at epoch {self.current_epoch}, update {self.global_step}"

    def _stop(self) -> None:
        file = Path(self.trainer.default_root_dir) / f"nonfinite_step{self.global_step}_rank{self.global_rank}.pt"
        batch = tuple(self.batch) if isinstance(self.batch, tuple | list) else self.batch
        weights = self.trainer.strategy.lightning_module_state_dict()  # whole, where the processes hold parts of them
        dump = dict(
            batch=batch,  # the last that went into the update, as the model saw it
            names=self.names,
            losses=self.losses,
            seed=run_seed(),
            step=self.global_step,
            batches_done=batches_done(self.trainer),
            weights=weights,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dump, file)
        shown = f"; its images: {', '.join(self.names[:8])}{' ...' if len(self.names) > 8 else ''}" if self.names else ""
        raise FloatingPointError(
            f"{self._what_happened()}{shown}. Batch and weights are in {file}. Lower model.lr (now {self.hparams['lr']}), lengthen "
            "model.warmup_epochs, set trainer.gradient_clip_val to 1.0, or leave such updates out with model.on_nonfinite=skip"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of updates left out, the versions that it was written with, and what task it is of."""
        checkpoint["skipped"] = self.skipped
        checkpoint["versions"] = versions()
        checkpoint["task"] = self.kind

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        self.skipped = checkpoint.get("skipped", 0)


def run_length(trainer: Trainer) -> tuple[int, int]:
    """Updates of an epoch, and of the whole run.

    The trainer's own estimate starts the loading processes, and would do so before it has restored where the run goes on.

    Raises:
        ValueError: If the run has no end.
    """
    loader = trainer.fit_loop._data_source.dataloader()
    batches = len(loader)
    if trainer._accelerator_connector.use_distributed_sampler and not isinstance(loader.sampler, DistributedSampler):
        batches = math.ceil(batches / trainer.world_size)  # Lightning will share the images out
    per_epoch = math.ceil(limited(batches, trainer.limit_train_batches) / trainer.accumulate_grad_batches)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer gets it from a connector
    ends = [callback.updates for callback in callbacks if isinstance(callback, StopAfter)]
    if trainer.max_steps != -1:
        ends.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        ends.append(trainer.max_epochs * per_epoch)
    if not ends:
        raise ValueError("a cosine schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    return per_epoch, min(ends)


def max_lr(optimizers: Iterable[torch.optim.Optimizer]) -> float:
    """The learning rate of the group that layer decay scales least."""
    return max(group["lr"] for optimizer in optimizers for group in optimizer.param_groups)
