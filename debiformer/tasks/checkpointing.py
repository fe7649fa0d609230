"""Checkpoints that are whole or not there, and that a run which was cut off goes on from."""

import os
import platform
import shutil
import signal
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import lightning
import timm
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from .. import __version__

LOCK = ".lock"  # in the folder of a run
DUE = 1  # a reason to write a checkpoint: less than any signal that asks a run to end
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
            free = shutil.disk_usage(target.parent).free / 1e6 if target.parent.is_dir() else 0
            reason = getattr(error, "strerror", None) or f"{error}, with {free:.1f} MB free on the disk"
            kept = "the one before it is whole" if target.exists() else "there is none before it"
            raise OSError(
                f"checkpoint {target} cannot be written: {reason}; {kept}. Make room or mend the folder, and run again"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint whose checksums are right."""
        verify(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


def hold(folder: Path) -> IO[str] | None:
    """Keep a second process from training the run of a folder for as long as the file that is returned stays open.

    Raises:
        RuntimeError: If another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # which has no such locks
        return None
    import fcntl

    held = (folder / LOCK).open("w")
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loading processes do not inherit it, and may live on for a moment
    except BlockingIOError as error:
        raise RuntimeError(f"{folder} is being trained by another process: wait for it, or begin another run with --name") from error
    except OSError as error:  # some network disks know no locks
        rank_zero_warn(f"{folder} cannot be locked ({error.strerror}): see that no other process trains the same run")
    return held


def verify(file: Path) -> None:
    """Raise a ValueError unless the checksums that torch wrote into a checkpoint are right."""
    remedy = "put another one in its place, such as best.ckpt beside it"
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"checkpoint {file} is damaged: {error}; {remedy}") from error
    if damaged is not None:
        raise ValueError(f"checkpoint {file} is damaged in {damaged}; {remedy}")


def read_content(checkpoint: Path, kind: str | None = None) -> dict[str, Any]:
    """The content of a run's checkpoint, mapped rather than read: `hyper_parameters` are the arguments of its task.

    Args:
        checkpoint: The file.
        kind: What task it must be of.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or one of another task.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint}: no such file")
    remedy = "give the best.ckpt or last.ckpt that `debiformer fit` wrote"
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen kinds for a file of another format
        with checkpoint.open("rb") as file:
            begins_as_one = file.read(2) == b"PK"
        if begins_as_one:
            verify(checkpoint)
        raise ValueError(f"checkpoint {checkpoint} is not a torch checkpoint: {remedy}") from error
    content = saved if isinstance(saved, dict) else {}
    if "class_names" not in content.get("hyper_parameters", {}):
        raise ValueError(f"checkpoint {checkpoint} is not from a {kind or 'training'} run, it lacks class_names: {remedy}")
    if kind is not None and kind_of(content) != kind:
        raise ValueError(f"checkpoint {checkpoint} is of a {kind_of(content)} run, not of {kind}: {remedy}")
    return content


def kind_of(content: dict[str, Any]) -> str:
    """What task a checkpoint is of."""
    return content.get("task", "classification")  # all were, once


class LastCheckpoint(Checkpoint):
    """Keeps `folder/last.ckpt`: after every epoch, every `minutes` in between, and when SIGTERM asks the run to end.

    It is written between two updates, with no gradient pending, and after the validation that is due, so that the run goes on from it as
    if it had never stopped. A run that was asked to end does so there, with exit code 143, or 130 after Ctrl-C; before its first update
    it ends without a checkpoint.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.file, self.seconds = folder / "last.ckpt", 60 * minutes
        self.written = time.monotonic()
        self.asked_to_end = 0  # by this signal

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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for SIGTERM and Ctrl-C: Lightning's own answer is to stop after the batch, wherever in an update that is."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, partial(self._ask_to_end, trainer))

    on_sanity_check_start = on_fit_start  # Lightning sets handlers of its own in between

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen again, and end a run that was asked to before its first update: there is nothing to be kept."""
        self.on_fit_start(trainer, pl_module)
        signum = self._most(trainer, self.asked_to_end or (signal.SIGTERM if trainer.received_sigterm else 0))
        if signum:
            rank_zero_info("asked to end before the first update")
            raise SystemExit(128 + signum)

    def _ask_to_end(self, trainer: Trainer, signum: int, frame: Any) -> None:
        if self.asked_to_end and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if signum == signal.SIGTERM and not self.asked_to_end and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)  # processes that this one started; Ctrl-C reaches them by itself
        if signum == signal.SIGINT:
            rank_zero_info("the run ends after this update; Ctrl-C once more ends it at once, and loses what last.ckpt has not yet")
        self.asked_to_end = signum

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write where it is time, unless validation comes first."""
        loop = trainer.fit_loop.epoch_loop
        validates = loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher))
        if not (loop.batch_progress.is_last_batch or loop._should_accumulate() or validates):
            self._write_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write where it is time, in mid-epoch."""
        loop = trainer.fit_loop.epoch_loop
        if trainer.state.fn == "fit" and not (trainer.sanity_checking or loop.batch_progress.is_last_batch or loop._should_accumulate()):
            self._write_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write; validation is over by now."""
        self._write(trainer)
        self._end_if(self._most(trainer, self.asked_to_end))

    def _write_if_due(self, trainer: Trainer) -> None:
        late = trainer.is_global_zero and time.monotonic() - self.written >= self.seconds  # by the clock of the first process
        reason = self._most(trainer, self.asked_to_end or (DUE if late else 0))
        if reason:
            self._write(trainer)
            self._end_if(reason if reason != DUE else 0)

    def _most(self, trainer: Trainer, value: int) -> int:
        """The largest value of all processes, which take part in writing together."""
        return int(trainer.strategy.reduce(torch.tensor(value, device=trainer.strategy.root_device), reduce_op="max"))

    def _write(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.file, weights_only=False)
        self.written = time.monotonic()

    def _end_if(self, signum: int) -> None:
        if signum:
            rank_zero_info(f"asked to end: {self.file} is written, and the same command goes on from it")
            raise SystemExit(128 + signum)
