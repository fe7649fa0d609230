"""Image classification: one label per image."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from timm.data import Mixup
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix, MulticlassRecall

from .addresses import by_name, is_address
from .base import BaseTask, create_model


class ClassScore(NamedTuple):
    """How one class fared: `recall` of its `images`, and `precision` of the images given its label (nan where there are none)."""

    name: str
    images: int
    recall: float
    precision: float


class ClassificationTask(BaseTask):
    """Train and evaluate any timm model as a classifier.

    Args:
        model: Name of a timm model, or the address of one: hf-hub:OWNER/NAME or local-dir:FOLDER.
        class_names: Labels in the order of the targets; from the command line the data gives them.
        input_size: Channels, height and width that the model is trained at; with the next four, what prediction must do to an image.
        mean: Mean of every channel, in [0, 1].
        std: Standard deviation of every channel.
        crop_pct: Share of the resized image that the centre crop keeps.
        interpolation: Name of the filter that resizes images.
        model_args: Further arguments of the model's constructor.
        freeze_backbone: Train the classifier alone, on features as in evaluation: linear probing.
        grad_checkpointing: Compute blocks again in the backward pass rather than keep what they need: less memory, more time.
        channels_last: Keep the model's convolutions in channels-last memory, which pays for convolutional models on most devices.
        compile: Run the model through torch.compile.
        pretrained: True takes the weights that timm knows for the model, a path those of that file.
        drop_path_rate: Stochastic depth, 0 to 1; left out, the model's own.
        optimizer: Name of a timm optimizer.
        lr: Learning rate after the warm-up.
        lr_batch_size: Images of an update that `lr` is for, over all processes and accumulated batches: with others the rate scales in
            proportion. Left out, it does not.
        weight_decay: Weight decay; vectors and what the model names in `no_weight_decay` go without.
        layer_decay: Factor of the learning rate from each layer to the one before it.
        warmup_epochs: Epochs of linear warm-up; may be a fraction.
        warmup_lr: Learning rate that the warm-up begins with.
        min_lr: Learning rate that the cosine ends with.
        label_smoothing: Share of the target spread over all classes, 0 to 1.
        mixup: Alpha of Mixup; 0 leaves it out.
        cutmix: Alpha of CutMix; 0 leaves it out.
        mix_prob: Share of the batches that are mixed, 0 to 1.
        on_nonfinite: What to do about an update whose gradients are not finite: "stop" the run, or "skip" the update and count it.

    Raises:
        ValueError: If an argument is out of its range, or timm knows no such model or optimizer.
    """

    kind = "classification"

    def __init__(
        self,
        model: str,
        class_names: list[str],
        input_size: tuple[int, int, int] = (3, 224, 224),
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        crop_pct: float = 0.9,
        interpolation: str = "bicubic",
        model_args: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        freeze_backbone: bool = False,
        grad_checkpointing: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        drop_path_rate: float | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        lr_batch_size: int | None = None,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        warmup_epochs: float = 0,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-5,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="pretrained")  # the weights are in the checkpoint: loading it must not ask for their source again
        self.check_hyperparameters()
        for name, value in {"label_smoothing": label_smoothing, "mix_prob": mix_prob, "drop_path_rate": drop_path_rate or 0}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be between 0 and 1")
        for name, value in {"mixup": mixup, "cutmix": cutmix}.items():
            if not value >= 0:
                raise ValueError(f"{name}={value} must not be below 0")
        if len(class_names) < 2:
            raise ValueError(f"class_names={class_names} must name at least two classes")
        num_classes = len(class_names)
        self.model = create_model(model, num_classes, pretrained, drop_path_rate=drop_path_rate, **(model_args or {}))
        if is_address(model):  # a checkpoint must not need the folder or the Hub again
            self.hparams.update(by_name(self.model, model, drop_path_rate))
        if freeze_backbone:
            self.model.requires_grad_(False)
            cast(Any, self.model).reset_classifier(num_classes)  # which may be a trained one
            cast(Any, self.model).get_classifier().requires_grad_(True)
        if grad_checkpointing:
            cast(Any, self.model).set_grad_checkpointing(True)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        if compile:
            self.model.compile()
        self.mixer = Mixup(mixup, cutmix, prob=mix_prob, label_smoothing=0, num_classes=num_classes) if mixup or cutmix else None
        metrics: dict[str, Metric | MetricCollection] = {
            "acc": MulticlassAccuracy(num_classes, average="micro"),
            "balanced_acc": MulticlassRecall(num_classes, average="macro"),
        }
        if num_classes > 5:
            metrics["acc_top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
        self.val_metrics = MetricCollection(metrics, prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")
        # Lightning's own mean over processes rounds down how many images each had. A loss that is no number is to be seen.
        self.loss = MeanMetric(nan_strategy="disable")
        self.calibration = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1")
        self.confusion: MulticlassConfusionMatrix | None = None  # classes times classes is too much to send round after every epoch
        self.confusion_matrix: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Count a confusion matrix where evaluation is all that the trainer does."""
        self.confusion = MulticlassConfusionMatrix(len(self.hparams["class_names"])) if stage in ("validate", "test") else None

    @property
    def class_scores(self) -> list[ClassScore]:
        """How each class fared in the last evaluation; none before the first, and training's own validation is none."""
        if self.confusion_matrix is None:
            return []
        counts = self.confusion_matrix.double()
        hits, images, guessed = counts.diagonal(), counts.sum(1), counts.sum(0)
        columns = (images.int().tolist(), (hits / images).tolist(), (hits / guessed).tolist())
        return [ClassScore(*row) for row in zip(self.hparams["class_names"], *columns, strict=True)]

    def images_in(self, batch: Sequence[Any]) -> int:
        """How many images of a batch count."""
        return int((batch[1] >= 0).sum())

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, classes)."""
        return self.model(images)

    def on_train_start(self) -> None:
        """Leave a frozen backbone as it is in evaluation, its norms and its stochastic depth too; validation keeps modes as they are."""
        if self.hparams["freeze_backbone"]:
            self.model.eval()

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch, which begins with images (B, 3, H, W) and targets (B,), mixed if so asked."""
        images, targets = self.mix(*batch[:2]) if self.mixer else batch[:2]
        loss = F.cross_entropy(self(images), targets, label_smoothing=self.hparams["label_smoothing"])
        self.log_training(loss, batch)
        return loss

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup or CutMix of a batch, its targets (B, classes); the last image of an odd batch has no partner and stays as it is."""
        assert self.mixer is not None
        even = len(images) // 2 * 2
        soft = F.one_hot(targets, self.mixer.num_classes).to(images.dtype)
        if even:
            mixed, soft_even = self.mixer(images[:even], targets[:even])
            images, soft = torch.cat([mixed, images[even:]]), torch.cat([soft_even.to(soft), soft[even:]])
        return images, soft

    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Count a batch into the val metrics; its logits (B, classes), for callbacks."""
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        """Count a batch into the test metrics; its logits (B, classes), for callbacks."""
        return self._evaluate(batch, self.test_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the val metrics and set `confusion_matrix`."""
        self._conclude("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics and set `confusion_matrix`."""
        self._conclude("test", self.test_metrics)

    def _evaluate(self, batch: Sequence[Any], metrics: MetricCollection) -> Tensor:
        logits, targets = self(batch[0]), batch[1]
        counted = targets >= 0  # the others stand in for what could not be read, or fill up the last batch
        if not counted.any():
            return logits
        given = logits[counted], targets[counted]
        self.loss.update(F.cross_entropy(*given, reduction="none"))
        metrics.update(*given)
        self.calibration.update(given[0].float().softmax(-1), given[1])  # it would take logits in [0, 1] for probabilities
        if self.confusion is not None:
            self.confusion.update(*given)
        return logits

    def _conclude(self, stage: str, metrics: MetricCollection) -> None:
        scores = metrics.compute() | {f"{stage}/loss": self.loss.compute(), f"{stage}/ece": self.calibration.compute()}
        self.log_dict(scores, prog_bar=True, sync_dist=True)
        for counted in (metrics, self.loss, self.calibration):
            counted.reset()
        if self.confusion is not None:
            self.confusion_matrix = self.confusion.compute().cpu()  # images by class (rows) and by the label given to them (columns)
            self.confusion.reset()
