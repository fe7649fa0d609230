"""How far a run of Lightning's has come, and how far it will go."""

from typing import Any

from lightning import Callback, LightningModule, Trainer


def batches_done(trainer: Trainer) -> int:
    """Batches that the run has trained on, in all epochs and before any restart."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]  # declared as a simpler tracker


def limited(batches: int, limit: int | float) -> int:
    """The batches of an epoch that a trainer with this limit_train_batches uses: so many of them, or this share."""
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)


class StopAfter(Callback):
    """Ends a run after so many updates.

    Lightning's own `max_steps`, when a run goes on from the end of an epoch, has it go through that epoch once more, without images.
    """

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where a run that goes on is over already."""
        trainer.should_stop = trainer.global_step >= self.updates

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop after the last update."""
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.updates
