"""How a trained classifier fares on a data module, and how fast."""

import time
from collections.abc import Callable, Collection
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from .classification import ClassificationTask, ClassScore

SPLITS = {"validate": "val", "test": "test"}  # of the data, and prefixes of metrics, by command


class Scores(NamedTuple):
    """An evaluation in numbers; shares are from 0 to 1, speeds in images per second."""

    top1: float
    top5: float | None  # None where there are no more than five classes
    balanced_accuracy: float
    ece: float
    loss: float
    images: int
    forward_speed: float | None  # of the model alone; None where the first batch was the only one
    whole_speed: float | None  # reading, preparing and counting included


class Evaluation(NamedTuple):
    """An evaluation whole."""

    scores: Scores
    classes: list[ClassScore]
    confusion: Tensor  # images by class (rows) and by the label given to them (columns)


class Stopwatch(Callback):
    """Times an evaluation from the end of its first batch, which warms everything up, to the end of its last.

    Attributes:
        forward_speed: Images per second in the model, over all processes; None where the first batch was the only one.
        whole_speed: The same of the whole evaluation: reading, preparing and counting included.
    """

    forward_speed: float | None = None
    whole_speed: float | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.images, self.forward, self.whole = 0, 0.0, 0.0
        model, self.device = cast(nn.Module, pl_module.model), pl_module.device
        self.hooks = [model.register_forward_pre_hook(self._enter), model.register_forward_hook(self._leave)]

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch; of the first, nothing."""
        now = finished(pl_module.device)
        if batch_idx == 0:
            self.started, self.forward = now, 0.0
        else:
            self.images += pl_module.images_in(batch)
            self.whole = now - self.started

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the processes, and leave the model as it was."""
        for hook in self.hooks:
            hook.remove()
        speeds = total(trainer, [self.images / seconds if self.images else 0.0 for seconds in (self.forward, self.whole)])
        self.forward_speed, self.whole_speed = (speed or None for speed in speeds)

    on_test_start, on_test_batch_end, on_test_end = on_validation_start, on_validation_batch_end, on_validation_end

    def _enter(self, module: Any, inputs: Any) -> None:
        self.entered = finished(self.device)

    def _leave(self, module: Any, inputs: Any, outputs: Any) -> None:
        self.forward += finished(self.device) - self.entered


def evaluation_folder(checkpoint: Path) -> Path:
    """Where evaluations of a checkpoint are written: `evaluation` in its run, or beside a checkpoint that is alone."""
    run = checkpoint.parent.parent
    return (run if (run / "config.yaml").is_file() else checkpoint.parent) / "evaluation"


def finished(device: torch.device) -> float:
    """The time, in seconds, at which the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class RealAccuracy(Callback):
    """Counts the validation images whose likeliest class is among their ReaL labels; those without any are left out.

    Args:
        labels_of: The labels of an image by its name.

    Attributes:
        hits: Such images.
        images: All images that have labels.
    """

    def __init__(self, labels_of: Callable[[str], Collection[int]]) -> None:
        self.labels_of, self.hits, self.images = labels_of, 0, 0

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch."""
        for name, target, guess in zip(batch.names, batch.targets.tolist(), outputs.argmax(-1).tolist(), strict=True):
            labels = self.labels_of(name) if target >= 0 else ()
            self.hits += guess in labels
            self.images += bool(labels)

    @property
    def top1(self) -> float:
        """Share of the hits; nan without images."""
        return self.hits / self.images if self.images else float("nan")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the other processes' images in."""
        self.hits, self.images = (int(n) for n in total(trainer, [self.hits, self.images]))


def total(trainer: Trainer, values: list[float]) -> list[float]:
    """Sums of the values over all processes; all of them must ask."""
    return trainer.strategy.reduce(torch.tensor(values, device=trainer.strategy.root_device), reduce_op="sum").tolist()


def evaluate(trainer: Trainer, task: ClassificationTask, data: LightningDataModule, command: str, *callbacks: Callback) -> Evaluation:
    """Evaluate a task on the images of a data module.

    Args:
        trainer: A trainer; what else it calls back is kept.
        task: The task, with the weights that are to be evaluated.
        data: The images.
        command: The trainer's method: validate or test.
        callbacks: To be called back this time.
    """
    stopwatch = Stopwatch()
    found = run(trainer, task, data, command, stopwatch, *callbacks)
    prefix = SPLITS[command]
    assert task.confusion_matrix is not None
    scores = Scores(
        top1=found[f"{prefix}/acc"],
        top5=found.get(f"{prefix}/acc_top5"),
        balanced_accuracy=found[f"{prefix}/balanced_acc"],
        ece=found[f"{prefix}/ece"],
        loss=found[f"{prefix}/loss"],
        images=int(task.confusion_matrix.sum()),
        forward_speed=stopwatch.forward_speed,
        whole_speed=stopwatch.whole_speed,
    )
    return Evaluation(scores, task.class_scores, task.confusion_matrix)


def run(trainer: Trainer, task: LightningModule, data: LightningDataModule, command: str, *callbacks: Callback) -> dict[str, float]:
    """The metrics that a trainer's validate or test logs, with callbacks of this time."""
    called: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer gets it from a connector
    called += callbacks
    try:
        (found,) = getattr(trainer, command)(task, datamodule=data, verbose=False)
    finally:
        del called[-len(callbacks) :]
    return found


def model_at(task: ClassificationTask, size: tuple[int, int], trained: tuple[int, int]) -> nn.Module:
    """The model of a task for images of a size, in pixels (height, width).

    That is the model itself, or a copy where timm resamples weights that depend on the size, such as position embeddings.

    Raises:
        ValueError: If the model does not take images of this size.
    """
    model = task.model
    if size == trained:
        return model
    try:
        if hasattr(model, "set_input_size"):
            resized: Any = deepcopy(model)
            resized.set_input_size(img_size=size)
            model = resized
        with torch.inference_mode():
            model.eval().forward(torch.zeros(1, 3, *size, device=task.device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"model {task.hparams['model']} takes no images of {size[0]}x{size[1]} pixels: {error}") from error
    return model
