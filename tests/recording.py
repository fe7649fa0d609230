"""A callback for runs of several processes: it writes down what each of them saw and did, and can kill one."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning import Callback
from torch.distributed.tensor import DTensor


class Recorder(Callback):
    """For each process, in `folder`: how many weights it holds, the images of each batch, gradients of each update, scores, weights.

    Args:
        folder: Where to.
        kill_at: Updates before which the second process kills itself, when it comes there first.
    """

    def __init__(self, folder: str, kill_at: Sequence[int] = ()) -> None:
        self.folder, self.kill_at = Path(folder), kill_at

    def setup(self, trainer, pl_module, stage):
        self.folder.mkdir(exist_ok=True)

    def on_train_start(self, trainer, pl_module):
        held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in pl_module.parameters())
        self.write("held", trainer, held)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        was_here = self.folder / f"killed{trainer.global_step}"
        if trainer.global_rank == 1 and trainer.global_step in self.kill_at and not was_here.exists():
            was_here.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self.write(f"epoch{trainer.current_epoch}", trainer, batch.names)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            counted = [name for name, target in zip(batch.names, batch.targets, strict=True) if target >= 0]
            self.write(f"val{trainer.current_epoch}", trainer, counted)

    def on_validation_end(self, trainer, pl_module):
        self.write("scores", trainer, {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        torch.save(
            whole({name: p.grad for name, p in pl_module.named_parameters()}),
            self.folder / f"gradients{trainer.global_step}.{trainer.global_rank}",
        )

    def on_train_end(self, trainer, pl_module):
        torch.save(whole(pl_module.state_dict()), self.folder / f"weights.{trainer.global_rank}")

    def write(self, name, trainer, what):
        with (self.folder / f"{name}.{trainer.global_rank}").open("a") as file:
            print(json.dumps(what), file=file)


def whole(tensors):
    """The tensors, put together where the processes hold parts of them."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def read(folder, name, rank=0):
    """What a process wrote, a list."""
    return [json.loads(line) for line in (folder / f"{name}.{rank}").read_text().splitlines()]
