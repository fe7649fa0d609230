"""A callback for runs of several processes: it writes down what each of them saw and did, and can kill one."""

import json
import os
import signal
from pathlib import Path

import torch
from lightning import Callback


class Recorder(Callback):
    """Writes `folder/train_RANK.jsonl` and `folder/val_RANK.jsonl`, the names of the images of each batch, and `folder/scores_RANK.json`.

    Args:
        folder: Where to.
        kill_at: Update before which the process of rank 1 kills itself, if nothing was restarted yet.
    """

    def __init__(self, folder: str, kill_at: int = -1) -> None:
        self.folder, self.kill_at = Path(folder), kill_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if trainer.global_rank == 1 and trainer.global_step == self.kill_at and first_start:
            os.kill(os.getpid(), signal.SIGKILL)
        self.write(trainer, "train", batch.names)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.write(trainer, "val", [name for name, target in zip(batch.names, batch.targets, strict=True) if target >= 0])

    def on_validation_end(self, trainer, pl_module):
        scores = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        (self.folder / f"scores_{trainer.global_rank}.json").write_text(json.dumps(scores))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in pl_module.named_parameters()}
        torch.save(gradients, self.folder / f"gradients_{trainer.global_step}_{trainer.global_rank}.pt")

    def write(self, trainer, split, names):
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{split}_{trainer.global_rank}.jsonl").open("a") as file:
            print(json.dumps(names), file=file)
