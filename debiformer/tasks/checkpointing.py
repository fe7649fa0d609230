"""Checkpoints that are whole or not there, and that a run which was cut off goes on from."""

import os
import platform
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .. import __version__

TEMPORARY = ".unfinished"  # suffix of a file that is being written


def versions() -> dict[str, str]:
    """What a run depends on, by name."""
    found = {"debiformer": __version__, "torch": torch.__version__, "timm": timm.__version__, "lightning": lightning.__version__}
    return {name: str(version) for name, version in found.items()} | {"python": platform.python_version()}


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, makes sure that the disk has it, and only then puts it there; verifies it on reading."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Write a checkpoint whole, or raise an OSError and leave the one that was there before."""
        target = Path(path)
        unfinished = target.with_name(target.name + TEMPORARY)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(target)
            folder = os.open(target.parent, os.O_RDONLY)
            os.fsync(folder)  # the new name too
            os.close(folder)
        except (OSError, RuntimeError) as error:  # torch's writer turns the first into the second
            unfinished.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or error
            kept = "the one before it is whole" if target.exists() else "there is none before it"
            raise OSError(
                f"checkpoint {target} cannot be written: {reason}; {kept}. Make room or mend the folder, and run again"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint whose checksums are right."""
        verify(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


def verify(file: Path) -> None:
    """Raise a ValueError unless the checksums that torch wrote into a checkpoint are right."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"checkpoint {file} is damaged: {error}; take another, such as best.ckpt beside it") from error
    if damaged is not None:
        raise ValueError(f"checkpoint {file} is damaged in {damaged}; take another, such as best.ckpt beside it")


class LastCheckpoint(Callback):
    """Keeps `folder/last.ckpt`: after every epoch, every `minutes` in between, and when the system asks the run to end.

    It is written between two updates, with no gradient pending, so that the run goes on from it as if it had never stopped.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.file, self.seconds = folder / "last.ckpt", 60 * minutes
        self.written = time.monotonic()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove what a run that was killed while writing left.

        Raises:
            FileNotFoundError: If a process does not see the file that the first one sees: each would go on from another place.
        """
        here = self.file.is_file()
        if here != trainer.strategy.broadcast(here):
            has, others = ("has", "has none") if here else ("has no", "has one")
            raise FileNotFoundError(
                f"process {trainer.global_rank} {has} {self.file.absolute()} and the first process {others}: put trainer.default_root_dir "
                "on a disk that all nodes share"
            )
        if trainer.is_global_zero:
            for file in self.file.parent.glob(f"*{TEMPORARY}"):
                file.unlink()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write where it is time."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or trainer.fit_loop._should_accumulate():
            return
        due = trainer.received_sigterm or time.monotonic() - self.written >= self.seconds
        if trainer.strategy.broadcast(due):  # all processes take part in writing, by the clock of the first
            self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write; validation is over by now."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.file)
        self.written = time.monotonic()
