"""Object detection and instance segmentation: boxes, and masks inside them."""

from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from ..models.detector import Boxes, Detector
from .dense import DenseTask

SCORES = {"map": "map", "ap50": "map_50", "ap75": "map_75", "ap_small": "map_small", "ap_medium": "map_medium", "ap_large": "map_large"}


class ClassAP(NamedTuple):
    """Average precision of one class, over IoU 0.50 to 0.95; of masks too where there are any. -1 where the data has none of the class."""

    name: str
    boxes: float
    masks: float | None


class DetectionTask(DenseTask):
    """Train and evaluate torchvision's RetinaNet, Faster R-CNN or Mask R-CNN on any hierarchical timm model.

    Args:
        backbone: Name of a timm model.
        class_names: Names in the order of the labels; from the command line the data gives them.
        mean: Mean of every channel, in [0, 1]; with the next, what prediction must do to an image. The data gives both.
        std: Standard deviation of every channel.
        detector: retinanet, faster_rcnn or mask_rcnn.
        detector_args: Further arguments of torchvision's detector.
        pyramid_channels: Channels of the feature pyramid.
        backbone_args: Further arguments of the backbone's constructor.
        pretrained: True takes the weights that timm knows for the backbone, a path those of that file.
        freeze_norms: Keep the backbone's batch norms as they are.
        drop_path_rate: Stochastic depth of the backbone, 0 to 1; left out, its own.
        grad_checkpointing: Compute blocks again in the backward pass rather than keep what they need: less memory, more time.
        short_side: Pixels that an image gets on its shorter side, unless the longer would have more than `long_side`.
        long_side: See there.
        anchor_scale: Width of the smallest square anchor of a level, in strides of it; left out, 4 for RetinaNet and 8 for the others.
        head_norms: Group norms in RetinaNet's head, which training from scratch wants; the papers' has none.
        optimizer: Name of a timm optimizer.
        lr: Learning rate after the warm-up.
        lr_batch_size: Images of an update that `lr` is for, over all processes and accumulated batches: with others the rate scales in
            proportion. Left out, it does not.
        weight_decay: Weight decay; vectors and what the backbone names in `no_weight_decay` go without.
        schedule: After the warm-up: "step", "cosine" or "poly".
        power: Of "poly".
        milestones: Epochs after which "step" lowers the rate to a tenth.
        warmup_steps: Updates of linear warm-up.
        warmup_lr: Learning rate that the warm-up begins with.
        min_lr: Learning rate that "poly" and "cosine" end with.
        on_nonfinite: What to do about an update whose gradients are not finite: "stop" the run, or "skip" the update and count it.

    Raises:
        ValueError: If an argument is out of its range, or there is no such backbone, detector or optimizer.
    """

    kind = "detection"

    def __init__(
        self,
        backbone: str,
        class_names: list[str],
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        detector: Literal["retinanet", "faster_rcnn", "mask_rcnn"] = "retinanet",
        detector_args: dict[str, Any] | None = None,
        pyramid_channels: int = 256,
        backbone_args: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        freeze_norms: bool = False,
        drop_path_rate: float | None = None,
        grad_checkpointing: bool = False,
        short_side: int = 800,
        long_side: int = 1333,
        anchor_scale: float | None = None,
        head_norms: bool = False,
        optimizer: str = "adamw",
        lr: float = 1e-4,
        lr_batch_size: int | None = None,
        weight_decay: float = 0.05,
        schedule: Literal["step", "cosine", "poly"] = "step",
        power: float = 0.9,
        milestones: list[float] | None = None,
        warmup_steps: int = 0,
        warmup_lr: float = 1e-7,
        min_lr: float = 0.0,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="pretrained")  # the weights are in the checkpoint: loading it must not ask for their source again
        self.check_hyperparameters()
        for name, side in {"short_side": short_side, "long_side": long_side, "pyramid_channels": pyramid_channels}.items():
            if side < 1:
                raise ValueError(f"{name}={side} must be above 0")
        if not class_names:
            raise ValueError("class_names=[] must name at least one class")
        options = (backbone_args or {}) | ({} if drop_path_rate is None else {"drop_path_rate": drop_path_rate})
        sizes: Any = dict(pyramid_channels=pyramid_channels, short_side=short_side, long_side=long_side)
        heads: Any = dict(anchor_scale=anchor_scale, head_norms=head_norms, detector_args=detector_args)
        self.model = Detector(detector, backbone, len(class_names), pretrained, freeze_norms, options, **sizes, **heads)
        if grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        kinds = ("bbox", "segm") if detector == "mask_rcnn" else ("bbox",)
        self.prefixes = {"": "bbox_", "mask_": "segm_"} if detector == "mask_rcnn" else {"": ""}  # ours, and torchmetrics'
        self.precision_of = MeanAveragePrecision(
            iou_type=cast(Any, kinds),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),  # its own are rounded to float32, and miss recalls that are reached exactly
            backend="faster_coco_eval",
            class_metrics=True,
        )
        self.class_scores: list[ClassAP] = []  # of the last evaluation

    def setup(self, stage: str) -> None:
        """Raise a ValueError where Mask R-CNN is given data of this library without masks."""
        if self.hparams["detector"] == "mask_rcnn" and getattr(getattr(self.trainer, "datamodule", None), "masks", True) is False:
            raise ValueError("detector=mask_rcnn learns from masks, and data.masks=False leaves them out: set data.masks to true")

    def forward(self, images: list[Tensor]) -> list[Boxes]:
        """Normalised images (3, H, W) to their boxes (N, 4), labels (N,) and scores (N,), and with Mask R-CNN masks (N, 1, H, W)."""
        return cast(Any, self.model(images))

    @torch.inference_mode()
    def detect(self, image: Tensor, min_score: float) -> Boxes:
        """What is found in a normalised image (3, H, W) with at least some score, on the CPU."""
        (found,) = self([image])
        kept = found["scores"] >= min_score
        return {name: value[kept].cpu() for name, value in found.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the detector's losses of a batch of images and targets."""
        losses = cast(dict[str, Tensor], self.model(batch.images, batch.targets))
        for name, value in losses.items():
            self.log(f"train/{name.removeprefix('loss_')}", value.detach())
        loss = torch.stack(list(losses.values())).sum()
        self.log_training(loss, batch)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, list[Boxes]]:
        """Count a batch; what was found in each image, for callbacks."""
        return {"found": self._evaluate(batch)}

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, list[Boxes]]:
        """Count a batch; what was found in each image, for callbacks."""
        return {"found": self._evaluate(batch)}

    def on_validation_epoch_end(self) -> None:
        """Log val/map and its kin, and set `class_scores`."""
        self._conclude("val")

    def on_test_epoch_end(self) -> None:
        """Log test/map and its kin, and set `class_scores`."""
        self._conclude("test")

    def _evaluate(self, batch: Any) -> list[Boxes]:
        found = cast(list[Boxes], self.model(batch.images))
        for boxes, target in zip(found, batch.targets, strict=True):
            if target is None:  # stands in for an image
                continue
            given = {name: target[name] for name in ("boxes", "labels", "area")} | {"iscrowd": target["crowd"].long()}
            counted = dict(boxes)
            if "masks" in boxes:
                counted["masks"] = boxes["masks"][:, 0] > 0.5
                given["masks"] = target["masks"].bool()
            self.precision_of.update([counted], [given])
        return found

    def _conclude(self, stage: str) -> None:
        found = self.precision_of.compute()
        self.precision_of.reset()
        scores = {
            f"{stage}/{ours}{name}": found[f"{theirs}{column}"].to(self.device)
            for ours, theirs in self.prefixes.items()
            for name, column in SCORES.items()
        }
        row_of = {label: row for row, label in enumerate(found["classes"].view(-1).tolist())}
        nothing = torch.full((1,), -1.0)  # where no image could be read
        columns = [found.get(f"{theirs}map_per_class", nothing).view(-1).tolist() for theirs in self.prefixes.values()]
        self.class_scores = []
        for label, name in enumerate(self.hparams["class_names"]):
            boxes, *masks = (column[row_of[label]] if label in row_of else -1.0 for column in columns)
            self.class_scores.append(ClassAP(name, boxes, masks[0] if masks else None))
        self.log_dict(scores, prog_bar=True)
