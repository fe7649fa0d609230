"""Semantic segmentation: a class for every pixel."""

from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from ..models.segmentation_inference import Inference, segment
from ..models.segmenter import Segmenter
from .dense import DenseTask

IGNORED = 255  # the class of pixels that no loss and no metric counts


class ClassIoU(NamedTuple):
    """How one class fared: intersection over union, and the share of its pixels found; nan where no pixel has or gets it."""

    name: str
    pixels: int
    iou: float
    accuracy: float


class SegmentationTask(DenseTask):
    """Train and evaluate a head for semantic segmentation on any hierarchical timm model.

    Args:
        backbone: Name of a timm model.
        class_names: Names in the order of the classes; from the command line the data gives them.
        palette: Their colours; the data gives them too.
        mean: Mean of every channel, in [0, 1]; with the next, what prediction must do to an image. The data gives both.
        std: Standard deviation of every channel.
        head: semantic_fpn or upernet.
        head_args: Further arguments of the head.
        backbone_args: Further arguments of the backbone's constructor.
        pretrained: True takes the weights that timm knows for the backbone, a path those of that file.
        freeze_norms: Keep the backbone's batch norms as they are.
        drop_path_rate: Stochastic depth of the backbone, 0 to 1; left out, its own.
        grad_checkpointing: Compute blocks again in the backward pass rather than keep what they need: less memory, more time.
        compile: Run the model through torch.compile.
        short_side: For evaluation and prediction, pixels of an image's shorter side, unless the longer would have more than `long_side`.
            Left out, images keep their size; from the command line the data gives both.
        long_side: See there.
        window: Height and width of windows that slide over the image in evaluation; left out, it is taken whole.
        stride: Pixels from one window to the next; left out, two thirds of the window.
        scales: Factors on the size; with several, evaluation averages their probabilities.
        flip: Whether evaluation also sees each scale in the mirror.
        auxiliary_weight: Weight of the auxiliary loss, where the head has one.
        optimizer: Name of a timm optimizer.
        lr: Learning rate after the warm-up.
        lr_batch_size: Images of an update that `lr` is for, over all processes and accumulated batches: with others the rate scales in
            proportion. Left out, it does not.
        weight_decay: Weight decay; vectors and what the backbone names in `no_weight_decay` go without.
        schedule: After the warm-up: "poly", "cosine" or "step".
        power: Of "poly".
        milestones: Epochs after which "step" lowers the rate to a tenth.
        warmup_steps: Updates of linear warm-up.
        warmup_lr: Learning rate that the warm-up begins with.
        min_lr: Learning rate that "poly" and "cosine" end with.
        on_nonfinite: What to do about an update whose gradients are not finite: "stop" the run, or "skip" the update and count it.

    Raises:
        ValueError: If an argument is out of its range, or there is no such backbone, head or optimizer.
    """

    kind = "segmentation"

    def __init__(
        self,
        backbone: str,
        class_names: list[str],
        palette: list[tuple[int, int, int]],
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        head: Literal["semantic_fpn", "upernet"] = "semantic_fpn",
        head_args: dict[str, Any] | None = None,
        backbone_args: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        freeze_norms: bool = False,
        drop_path_rate: float | None = None,
        grad_checkpointing: bool = False,
        compile: bool = False,
        short_side: int | None = None,
        long_side: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        auxiliary_weight: float = 0.4,
        optimizer: str = "adamw",
        lr: float = 1e-4,
        lr_batch_size: int | None = None,
        weight_decay: float = 1e-4,
        schedule: Literal["poly", "cosine", "step"] = "poly",
        power: float = 0.9,
        milestones: list[float] | None = None,
        warmup_steps: int = 0,
        warmup_lr: float = 1e-9,
        min_lr: float = 0.0,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="pretrained")  # the weights are in the checkpoint: loading it must not ask for their source again
        self.check_hyperparameters()
        if len(class_names) < 2 or len(palette) != len(class_names):
            raise ValueError(f"class_names={class_names} must name at least two classes, and palette={palette} have a colour for each")
        if not auxiliary_weight >= 0:
            raise ValueError(f"auxiliary_weight={auxiliary_weight} must not be below 0")
        self.inference = Inference(short_side, long_side, window, stride, tuple(scales), flip)
        options = (backbone_args or {}) | ({} if drop_path_rate is None else {"drop_path_rate": drop_path_rate})
        self.model = Segmenter(backbone, head, len(class_names), pretrained, freeze_norms, options, head_args)
        if grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        if compile:
            self.model.compile()
        self.counts = MulticlassConfusionMatrix(len(class_names), ignore_index=IGNORED)
        self.confusion_matrix: Tensor | None = None  # pixels by class (rows) and by the class given to them, of the last evaluation

    @property
    def class_scores(self) -> list[ClassIoU]:
        """How each class fared in the last evaluation; none before the first."""
        if self.confusion_matrix is None:
            return []
        pixels, iou, accuracy = of_each_class(self.confusion_matrix)
        rows = zip(self.hparams["class_names"], pixels.long().tolist(), iou.tolist(), accuracy.tolist(), strict=True)
        return [ClassIoU(*row) for row in rows]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, classes, H, W)."""
        return self.model(images)

    def segment(self, image: Tensor) -> Tensor:
        """The class of every pixel (H, W), uint8, of a normalised image (3, H, W) of any size."""
        return segment(self.model, image, self.inference)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch of crops (B, 3, H, W) and their classes (B, H, W), with that of the auxiliary head."""
        found, targets = self.model(batch.images), batch.targets.long()
        logits, *auxiliary = found if isinstance(found, tuple) else (found,)
        loss = pixel_loss(logits, targets)
        for other in auxiliary:
            loss = loss + self.hparams["auxiliary_weight"] * pixel_loss(other, targets)
        self.log_training(loss, batch)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, list[Tensor]]:
        """Count a batch of whole images; the classes (H, W) of their pixels, for callbacks."""
        return {"found": self._evaluate(batch)}

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, list[Tensor]]:
        """Count a batch of whole images; the classes (H, W) of their pixels, for callbacks."""
        return {"found": self._evaluate(batch)}

    def on_validation_epoch_end(self) -> None:
        """Log val/miou, val/macc and val/aacc, and set `confusion_matrix`."""
        self._conclude("val")

    def on_test_epoch_end(self) -> None:
        """Log test/miou, test/macc and test/aacc, and set `confusion_matrix`."""
        self._conclude("test")

    def _evaluate(self, batch: Any) -> list[Tensor]:
        found = [self.segment(image) for image in batch.images]
        for classes, target in zip(found, batch.targets, strict=True):
            self.counts.update(classes.long().flatten(), target.long().flatten())
        return found

    def _conclude(self, stage: str) -> None:
        self.confusion_matrix = self.counts.compute().cpu()
        self.counts.reset()
        pixels = self.confusion_matrix.sum(1).tolist()
        absent = [name for name, count in zip(self.hparams["class_names"], pixels, strict=True) if not count]
        if absent and not self.trainer.sanity_checking:
            shown = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
            rank_zero_warn(f"no pixel of the {stage} masks has {len(absent)} of the classes: {shown}")
        scores = summarize(self.confusion_matrix)
        self.log_dict({f"{stage}/{name}": value for name, value in scores.items()}, prog_bar=True, sync_dist=True)


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, classes, H, W) over the pixels of targets (B, H, W) that are not ignored; 0 where all are."""
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def of_each_class(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, IoU and accuracy of each class, from pixels by class (rows) and by the class given to them; nan where there are none."""
    counts = confusion.double()
    hits, pixels = counts.diagonal(), counts.sum(1)
    return pixels, hits / (pixels + counts.sum(0) - hits), hits / pixels


def summarize(confusion: Tensor) -> dict[str, float]:
    """Mean IoU, mean accuracy of the classes and accuracy of all pixels, from pixels by class (rows) and by the class given to them.

    A class that no pixel has or gets is left out of the means.
    """
    _, iou, accuracy = of_each_class(confusion)
    counts = confusion.double()
    scores = {"miou": iou.nanmean(), "macc": accuracy.nanmean(), "aacc": counts.diagonal().sum() / counts.sum()}
    return {name: value.item() for name, value in scores.items()}
