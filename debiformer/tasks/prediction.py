"""Labels for a stream of images, whatever its length."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from .addresses import address_of, read_config
from .base import BaseTask
from .checkpointing import kind_of, read_content, verify
from .classification import ClassificationTask

T = TypeVar("T", bound=BaseTask)
PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "interpolation")


class Guess(NamedTuple):
    """A label and its probability."""

    label: str
    probability: float


class Prediction(NamedTuple):
    """What was found in a file: guesses, the likeliest first, or else the error that kept it from being read."""

    path: Path
    guesses: list[Guess]
    error: str | None


def read_run(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint of a classification run, as `read_content` gives it; raises what that raises."""
    return read_content(checkpoint, "classification")


def read_hyperparameters(checkpoint: Path) -> dict[str, Any]:
    """The arguments of the task that a checkpoint was saved from; raises what `read_run` raises."""
    return read_run(checkpoint)["hyper_parameters"]


def kind_at(source: str | Path) -> str:
    """What task a checkpoint, a shared folder or an address is of; raises what `read_content` raises."""
    return "classification" if address_of(source) is not None else kind_of(read_content(Path(source)))


def load_task(task: type[T], checkpoint: Path, device: str | torch.device = "cpu") -> T:
    """The trained task in a checkpoint of a run, ready to predict.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or no checkpoint of this task.
    """
    read_content(checkpoint, task.kind)
    verify(checkpoint)
    return task.load_from_checkpoint(checkpoint, map_location=device, weights_only=True).eval().requires_grad_(False)


def load_classifier(source: str | Path, device: str | torch.device = "cpu") -> ClassificationTask:
    """The trained task in a checkpoint, in a shared folder or on the Hugging Face Hub, ready to predict.

    Args:
        source: A checkpoint file, a folder that `debiformer share` wrote, or an address: hf-hub:OWNER/NAME or local-dir:FOLDER.
        device: Where the weights go.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is no checkpoint of a classification run, or no model with label names and a preprocessing known here.
        OSError: If the Hub does not give the model.
    """
    address = address_of(source)
    if address is None:
        task = load_task(ClassificationTask, Path(source), device)
    else:
        cfg = read_config(address).pretrained_cfg
        if not isinstance(cfg.get("label_names"), list) or not cfg.keys() >= set(PREPROCESSING):
            raise ValueError(f"model {address} does not say what its labels are and how it wants images: `debiformer share` writes both")
        if cfg.get("crop_mode", "center") != "center":
            raise ValueError(f"model {address} wants images cropped by crop_mode={cfg['crop_mode']!r}: only 'center' is known here")
        preprocessing = {name: cfg[name] for name in PREPROCESSING}
        task = ClassificationTask(address, cfg["label_names"], pretrained=True, **preprocessing).to(device)
    return task.eval().requires_grad_(False)


def predict(
    task: ClassificationTask,
    images: Iterable[tuple[Path, Image | Exception]],
    transform: Callable[[Image], Tensor],
    batch_size: int = 32,
    topk: int = 3,
) -> Iterator[Prediction]:
    """Predictions in the order of the images, one batch in memory at a time.

    Args:
        task: A task in evaluation mode.
        images: Every file with its image, or with the exception that reading it raised.
        transform: From an image to the model's input (3, H, W).
        batch_size: Files per pass through the model.
        topk: Guesses per image; no more than there are classes.
    """
    names = task.hparams["class_names"]
    stream = iter(images)
    while batch := list(islice(stream, batch_size)):
        inputs = [transform(image) for _, image in batch if isinstance(image, Image)]
        with torch.inference_mode():
            guesses = iter(guess(task(torch.stack(inputs).to(task.device)), names, topk) if inputs else ())
        for path, image in batch:
            if isinstance(image, Image):
                yield Prediction(path, next(guesses), None)
            else:
                yield Prediction(path, [], str(image).removeprefix(f"{path}: "))


def guess(logits: Tensor, names: list[str], topk: int) -> list[list[Guess]]:
    """For each row of logits (B, classes) the likeliest classes, `topk` of them or all there are."""
    probabilities, indices = logits.float().softmax(dim=-1).topk(min(topk, len(names)))
    rows = zip(indices.tolist(), probabilities.tolist(), strict=True)
    return [[Guess(names[i], p) for i, p in zip(*row, strict=True)] for row in rows]
