"""The bundled sample: crops of blood cells in three classes, and a few whole images with boxes, from the BCCD data set."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from .coco import CocoData
from .folders import SPLITS, ImageFolders

SAMPLE = Path(str(files("debiformer.data").joinpath("blood_cells")))
CROP_SIZE = 80
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3)


class Box(NamedTuple):
    """A labelled cell, in pixels of its image."""

    label: str
    x0: int
    y0: int
    x1: int
    y1: int


def crop(image: Image.Image, box: Box) -> Image.Image:
    """The square on the longer side of a box, moved inside the image where it sticks out, at 80x80: what every bundled crop is."""
    side = min(max(box.x1 - box.x0, box.y1 - box.y0), image.width, image.height)
    left = min(max((box.x0 + box.x1 - side) // 2, 0), image.width - side)
    top = min(max((box.y0 + box.y1 - side) // 2, 0), image.height - side)
    square = (left, top, left + side, top + side)
    return image.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BICUBIC, box=square)


class LinearBaseline(NamedTuple):
    """Shares of the test images that a linear classifier labels rightly."""

    balanced_accuracy: float  # mean over the classes
    class_accuracy: dict[str, float]


class BloodCells(ImageFolders):
    """The bundled crops of platelets, red and white blood cells, split by the image that they were cut from.

    Args:
        input_size: Pixels of a square, or (height, width); the crops have 80x80.
        batch_size: Images per batch.
        num_workers: Processes that read and augment; files this small need none.
        mean, std: Of the channels, for values in [0, 1].
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 64,
        batch_size: int = 64,
        num_workers: int = 0,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__(
            root=SAMPLE,
            input_size=input_size,
            batch_size=batch_size,
            num_workers=num_workers,
            mean=mean,
            std=std,
            crop_pct=1.0,  # the cell fills the crop
            scale=(0.6, 1.0),
            ratio=(0.85, 1.18),
            vflip=0.5,
            color_jitter=0.2,
        )


class BloodCellBoxes(CocoData):
    """The bundled fields of blood cells, 320x240 pixels, with boxes around platelets, red and white cells: what a small detector trains on.

    Args:
        options: As for `DetectionData`.
    """

    def __init__(self, batch_size: int = 8, num_workers: int = 0, vflip: float = 0.5, **options: Any) -> None:
        super().__init__(
            SAMPLE / "fields",
            images="{split}",
            annotations="{split}.json",
            batch_size=batch_size,
            num_workers=num_workers,
            vflip=vflip,
            **options,
        )


def whole_images() -> list[tuple[Path, list[Box]]]:
    """Whole test images of 640x480 pixels, each with its labelled cells."""
    folder = SAMPLE / "whole"
    boxes = json.loads((folder / "boxes.json").read_text())
    return [(folder / name, [Box(**cell) for cell in cells]) for name, cells in boxes.items()]


def linear_baseline(size: int = 32) -> LinearBaseline:
    """Test scores of multinomial logistic regression on the pixels of the bundled crops: the yardstick for any network.

    Classes weigh the same, and the L2 penalty is the one with the best validation score.

    Args:
        size: The crops are first resized to this many pixels on each side.
    """
    data, pixels, labels = BloodCells(), {}, {}
    for split in SPLITS:
        rows = [data.images(split).read(index) for index in range(len(data.images(split)))]
        crops = [pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC)) for image, _ in rows]
        pixels[split], labels[split] = torch.stack(crops).flatten(1).float(), torch.tensor([label for _, label in rows])
    mean, scale = pixels["train"].mean(0), pixels["train"].std() * pixels["train"].shape[1] ** 0.5
    inputs = {split: F.pad((x - mean) / scale, (0, 1), value=1.0) for split, x in pixels.items()}  # a column of ones is the bias
    targets = {split: F.one_hot(values) for split, values in labels.items()}

    def class_accuracy(weight: Tensor, split: str) -> Tensor:
        hits = F.one_hot((inputs[split] @ weight).argmax(1), len(weight.T)) * targets[split]
        return hits.sum(0) / targets[split].sum(0)

    weights = [_fit_linear(inputs["train"], targets["train"], penalty) for penalty in PENALTIES]
    best = max(weights, key=lambda weight: class_accuracy(weight, "val").mean().item())
    scores = class_accuracy(best, "test")
    return LinearBaseline(scores.mean().item(), dict(zip(data.class_names, scores.tolist(), strict=True)))


def _fit_linear(inputs: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Weights (D, classes) for inputs (N, D) and one-hot targets (N, classes)."""
    weight = torch.zeros(inputs.shape[1], targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")
    share = targets / targets.sum(0) / targets.shape[1]

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -(share * (inputs @ weight).log_softmax(1)).sum() + penalty * weight[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return weight.detach()
