"""How far a run of Lightning's has come, and how far it will go."""

from lightning import Trainer


def batches_done(trainer: Trainer) -> int:
    """Batches that the run has trained on, in all epochs and before any restart."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]  # declared as a simpler tracker


def limited(batches: int, limit: int | float) -> int:
    """The batches of an epoch that a trainer with this limit_train_batches uses: so many of them, or this share."""
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)
