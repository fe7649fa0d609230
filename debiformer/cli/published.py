"""Published checkpoints as tasks, with what evaluation and prediction need besides the weights."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import lightning
import timm
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from ..data.masks import Classes, read_classes
from ..models import load_published
from ..models.checkpoints import to_our_names
from ..tasks.base import BaseTask
from ..tasks.checkpointing import WholeCheckpoints
from ..tasks.classification import ClassificationTask
from ..tasks.detection import DetectionTask
from ..tasks.prediction import PREPROCESSING
from ..tasks.segmentation import SegmentationTask

# What tells the heads of dense checkpoints apart, the first that is found: our name, the tensor with rows for every class, how many rows a
# class has, and how many classes are no objects.
HEADS = {
    "decode_head.scale_heads.": ("semantic_fpn", "decode_head.conv_seg.bias", 1, 0),
    "decode_head.psp_modules.": ("upernet", "decode_head.conv_seg.bias", 1, 0),
    "roi_head.mask_head.": ("mask_rcnn", "roi_head.bbox_head.fc_cls.bias", 1, 1),
    "roi_head.bbox_head.": ("faster_rcnn", "roi_head.bbox_head.fc_cls.bias", 1, 1),
    "bbox_head.retina_cls.": ("retinanet", "bbox_head.retina_cls.bias", 9, 0),
}
SEGMENTATION = ("semantic_fpn", "upernet")


def whole_task(published: Mapping[str, Tensor], preset: str, classes: str | None = None) -> BaseTask:
    """The task that a published checkpoint is the model of, with its weights.

    Args:
        published: The checkpoint's tensors in its own names.
        preset: Which its classifier or backbone is.
        classes: Names and colours of the classes, as for `read_classes`; left out, those of the data set that has so many.

    Raises:
        ValueError: If there is no head, the heads do not fit, or the classes are not known.
    """
    head = next((row for beginning, row in HEADS.items() if any(beginning in name for name in published)), None)
    if head is None:
        tensors = to_our_names(published)
        if "head.fc.weight" not in tensors:
            raise ValueError("the checkpoint is a backbone alone, without a head to evaluate: write a .safetensors file")
        cfg = timm.get_pretrained_cfg(preset)
        assert cfg is not None
        known = cfg.to_dict()
        names = class_names("classification", len(tensors["head.fc.weight"]), classes).names
        classifier = ClassificationTask(preset, names, **{name: known[name] for name in PREPROCESSING})
        load_published(published, classifier.model)
        return classifier
    name, counted, rows, beside = head
    rows_of = {re.sub(r"^(?:module\.)+", "", key): value.shape[0] for key, value in published.items() if value.ndim}
    if counted not in rows_of:
        raise ValueError(f"the checkpoint has a head of {name}, but lacks {counted}")
    found = class_names("segmentation" if name in SEGMENTATION else "detection", rows_of[counted] // rows - beside, classes)
    task: BaseTask
    if name in SEGMENTATION:
        widths = {"pyramid_channels": "neck.lateral_convs.0.conv.bias", "channels": "decode_head.scale_heads.0.0.conv.weight"}
        if name == "upernet":
            widths = {"channels": "decode_head.bottleneck.conv.weight"}
        options: Any = dict(backbone_args=dict(feature_norms=True, region_grid=[8, 8]), short_side=512, long_side=2048)
        head_args = {argument: rows_of[key] for argument, key in widths.items() if key in rows_of}
        task = SegmentationTask(preset, found.names, found.palette, head=cast(Any, name), head_args=head_args, **options)
    else:
        options = dict(backbone_args=dict(feature_norms=True, region_grid=[16, 16]), milestones=[8, 11])
        width = rows_of.get("neck.lateral_convs.0.conv.bias", 256)
        task = DetectionTask(preset, found.names, detector=cast(Any, name), pyramid_channels=width, **options)
    load_published(published, task.model)
    return task


def class_names(task: str, number: int, classes: str | None) -> Classes:
    """Names and colours of so many classes: as they are given, else those of the data set that a task has so many of.

    Raises:
        ValueError: If they are others in number, or no data set is known that has so many.
    """
    if classes is not None:
        found = read_classes(classes)
        if len(found.names) != number:
            raise ValueError(f"--classes {classes} names {len(found.names)} classes, and the checkpoint has {number}")
        return found
    known = KNOWN.get((task, number))
    if known is None:
        raise ValueError(
            f"the checkpoint is of {task} with {number} classes, which is no data set known here: name them with --classes FILE.csv"
        )
    return known()


def coco() -> Classes:
    """COCO's 80 classes."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return read_classes([name for name in names if name not in ("__background__", "N/A")])


KNOWN: dict[tuple[str, int], Callable[[], Classes]] = {
    ("classification", 1000): lambda: read_classes(cast(list[str], ImageNetInfo().label_descriptions())),
    ("segmentation", 150): lambda: read_classes("ade20k"),
    ("segmentation", 19): lambda: read_classes("cityscapes"),
    ("detection", 80): coco,
}


def write_task(task: BaseTask, file: Path) -> None:
    """Write a checkpoint like those of a run, without an optimizer to go on with."""
    quiet: Any = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = lightning.Trainer(accelerator="cpu", plugins=[WholeCheckpoints()], **quiet)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(file, weights_only=True)
