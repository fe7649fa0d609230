"""What is found in images, as rows of a table: labels, masks or boxes, each with a schema."""

import io
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Protocol

import pyarrow as pa
import torch
from PIL.Image import Image
from torch import Tensor

from .. import __version__
from ..data.images import eval_transform
from ..data.masks import paint, run_lengths
from ..tasks.base import BaseTask
from ..tasks.classification import ClassificationTask
from ..tasks.detection import DetectionTask
from ..tasks.prediction import PREPROCESSING, guess
from ..tasks.segmentation import SegmentationTask


class Finder(Protocol):
    """Makes rows of images.

    Attributes:
        task: With the model.
        columns: Of the rows, beside `path` and `error`.
        together: Whether images go through the model in batches: those of different sizes go alone, as alone they are what they would be.
    """

    task: Any
    columns: dict[str, pa.DataType]
    together: bool

    def prepare(self, image: Image) -> Any:
        """What is kept of an image until it is its turn; done in threads, beside the model."""
        ...

    def find(self, prepared: Sequence[Any]) -> list[dict[str, Any]]:
        """A row for each."""
        ...


class Labels:
    """The likeliest classes, and if asked for what the classifier sees.

    Args:
        task: A task in evaluation mode.
        topk: Labels of an image.
        embeddings: Whether to give the pooled features that the classifier is given.
    """

    together = True

    def __init__(self, task: ClassificationTask, topk: int, embeddings: bool) -> None:
        self.task, self.topk, self.embeddings = task, topk, embeddings
        self.transform = eval_transform(**{name: task.hparams[name] for name in PREPROCESSING})
        self.columns: dict[str, pa.DataType] = {
            "label": pa.string(),
            "probability": pa.float32(),
            "labels": pa.list_(pa.string()),
            "probabilities": pa.list_(pa.float32()),
        }
        if embeddings:
            self.columns["embedding"] = pa.list_(pa.float32(), self.forward(self.example())[1].shape[1])

    def example(self) -> Tensor:
        """A batch of one image (1, 3, H, W), as the model takes it."""
        return torch.zeros(1, *self.task.hparams["input_size"], device=self.task.device)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and embeddings (B, C), which are empty unless asked for."""
        if not self.embeddings:
            return self.task(images), images.new_empty(len(images), 0)
        model: Any = self.task.model
        features = model.forward_features(images)
        return model.forward_head(features), model.forward_head(features, pre_logits=True).float()

    def prepare(self, image: Image) -> Tensor:
        return self.transform(image)

    def find(self, prepared: Sequence[Tensor]) -> list[dict[str, Any]]:
        logits, embeddings = self.forward(torch.stack(list(prepared)).to(self.task.device))
        rows = []
        for guesses, embedding in zip(guess(logits, self.task.hparams["class_names"], self.topk), embeddings.cpu().numpy(), strict=True):
            labels, probabilities = zip(*guesses, strict=True)
            row = dict(label=labels[0], probability=probabilities[0], labels=labels, probabilities=probabilities)
            rows.append(row | ({"embedding": embedding} if self.embeddings else {}))
        return rows


class Masks:
    """The class of every pixel, as PNG with the classes' colours.

    Args:
        task: A task in evaluation mode.
    """

    together = False

    def __init__(self, task: SegmentationTask) -> None:
        self.task = task
        self.columns: dict[str, pa.DataType] = {"mask": pa.binary()}

    def prepare(self, image: Image) -> Image:
        return image

    def find(self, prepared: Sequence[Image]) -> list[dict[str, Any]]:
        rows = []
        for image in prepared:
            file = io.BytesIO()
            paint(self.task.segment(self.task.normalized(image)).cpu().numpy(), self.task.hparams["palette"]).save(file, "PNG")
            rows.append({"mask": file.getvalue()})
        return rows


class Boxes:
    """Boxes as COCO has them, and masks where the detector gives them.

    Args:
        task: A task in evaluation mode.
        min_score: The least score of what is given.
    """

    together = False

    def __init__(self, task: DetectionTask, min_score: float) -> None:
        self.task, self.min_score = task, min_score
        self.columns: dict[str, pa.DataType] = {
            "width": pa.int32(),
            "height": pa.int32(),
            "boxes": pa.list_(pa.list_(pa.float32(), 4)),
            "labels": pa.list_(pa.string()),
            "scores": pa.list_(pa.float32()),
        }
        if task.hparams["detector"] == "mask_rcnn":
            self.columns["masks"] = pa.list_(pa.struct({"size": pa.list_(pa.int32(), 2), "counts": pa.string()}))

    def prepare(self, image: Image) -> Image:
        return image

    def find(self, prepared: Sequence[Image]) -> list[dict[str, Any]]:
        rows = []
        for image in prepared:
            found = self.task.detect(self.task.normalized(image), self.min_score)
            corners, sizes = found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]
            labels = [self.task.hparams["class_names"][label] for label in found["labels"].tolist()]
            row = dict(width=image.width, height=image.height, boxes=torch.cat([corners, sizes], dim=1).tolist(), labels=labels)
            row["scores"] = found["scores"].tolist()
            if "masks" in self.columns:
                row["masks"] = [run_lengths(mask.numpy()) for mask in found["masks"][:, 0] > 0.5]
            rows.append(row)
        return rows


def schema_of(finder: Finder, about: Mapping[str, Any]) -> pa.Schema:
    """Of the rows of a finder, with `path` first and `error` last; what is said `about` them, the classes and the version as metadata."""
    names = {name: finder.task.hparams[name] for name in ("class_names", "palette") if name in finder.task.hparams}
    told = {"debiformer": __version__, **about, **names}
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in told.items()}
    fields = [pa.field("path", pa.string(), nullable=False), *(pa.field(*column) for column in finder.columns.items())]
    return pa.schema([*fields, pa.field("error", pa.string())], metadata)


def weights_digest(task: BaseTask) -> str:
    """SHA-256 of a task's weights and arguments, in hexadecimal."""
    digest = sha256(json.dumps(dict(task.hparams), default=str, sort_keys=True).encode())
    for name, value in sorted(task.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
