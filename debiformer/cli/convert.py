"""Command convert: a published checkpoint, in its own names, to a file in ours."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning
import safetensors.torch
import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from ..data.masks import Classes, read_classes
from ..models import PRESETS, load_published
from ..models.checkpoints import compare, list_problems, read_checkpoint, to_our_names
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


def run(arguments: list[str]) -> int:
    """Convert a file; the preset and the heads that it fits are found by names and shapes.

    Raises:
        FileNotFoundError: If the file or the output's folder does not exist.
        ValueError: If the file is no checkpoint, fits no preset or no head, or has classes without known names; what does not fit is
            listed.
    """
    parser = argparse.ArgumentParser(prog="debiformer convert", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a .pth, .pt or .ckpt file of the DeBiFormer or BiFormer release")
    parser.add_argument("output", type=Path, help="the .safetensors file to write, of the backbone; or a .ckpt, of all that validate needs")
    parser.add_argument("--classes", help="for a .ckpt: a CSV file with the columns name,red,green,blue (default: told by their number)")
    options = parser.parse_args(arguments)
    if options.output.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"output {options.output} must end in .safetensors or .ckpt")
    if not options.output.parent.is_dir():
        raise FileNotFoundError(f"output {options.output}: there is no folder {options.output.parent}")
    published = read_checkpoint(options.checkpoint)
    tensors = to_our_names(published)
    preset, kind = identify(tensors)
    if options.output.suffix == ".ckpt":
        task = whole_task(published, tensors, preset, options.classes)
        write_task(task, options.output)
        print(f"{options.output}: {task.kind} with {preset}, {len(task.hparams['class_names'])} classes")
        return 0
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(contiguous, options.output, metadata={"format": "pt", "architecture": preset})
    print(f"{options.output}: {preset}, {kind}, {len(tensors)} tensors")
    return 0


def identify(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """The preset that tensors in our names belong to, and what they are: a classifier, or a dense backbone.

    Raises:
        ValueError: If they fit no preset; the misfits with the nearest one are listed.
    """
    classes = classes_of(tensors)
    dense = any(name.startswith("feature_norms.") for name in tensors)
    misfits = {}
    for preset in PRESETS:
        with torch.device("meta"):
            model = timm.create_model(preset, num_classes=classes, feature_norms=dense, in_chans=_channels(tensors))
        misfits[preset], _ = compare(tensors, model)
        if not any(misfits[preset].values()):
            return preset, f"a classifier of {classes} classes" if classes else "a backbone without classifier"
    nearest = min(misfits, key=lambda preset: sum(map(len, misfits[preset].values())))
    raise ValueError(
        f"these weights fit none of {', '.join(PRESETS)}; misfits with the nearest, {nearest}:{list_problems(misfits[nearest])}"
    )


def classes_of(tensors: Mapping[str, Tensor]) -> int:
    """The classes of a classifier in our names; 0 without one."""
    return len(tensors["head.fc.weight"]) if "head.fc.weight" in tensors else 0


def _channels(tensors: Mapping[str, Tensor]) -> int:
    return tensors["stem.0.weight"].shape[1] if "stem.0.weight" in tensors else 3


def whole_task(published: Mapping[str, Tensor], tensors: Mapping[str, Tensor], preset: str, classes: str | None) -> BaseTask:
    """The task that a published checkpoint is the model of, with its weights.

    Args:
        published: The checkpoint's tensors in its own names.
        tensors: Those of its classifier or backbone in ours.
        preset: Which it is.
        classes: Names and colours of the classes, as for `read_classes`; left out, those of the data set that has so many.

    Raises:
        ValueError: If there is no head, the heads do not fit, or the classes are not known.
    """
    head = next((row for beginning, row in HEADS.items() if any(beginning in name for name in published)), None)
    if head is None:
        if not classes_of(tensors):
            raise ValueError("the checkpoint is a backbone alone, without a head to evaluate: write a .safetensors file")
        cfg = timm.get_pretrained_cfg(preset)
        assert cfg is not None
        known = cfg.to_dict()
        names = class_names(classes_of(tensors), classes).names
        classifier = ClassificationTask(preset, names, **{name: known[name] for name in PREPROCESSING})
        load_published(published, classifier.model)
        return classifier
    name, counted, rows, beside = head
    rows_of = {re.sub(r"^(?:module\.)+", "", key): value.shape[0] for key, value in published.items() if value.ndim}
    if counted not in rows_of:
        raise ValueError(f"the checkpoint has a head of {name}, but lacks {counted}")
    found = class_names(rows_of[counted] // rows - beside, classes)
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


def class_names(number: int, classes: str | None) -> Classes:
    """Names and colours of so many classes: as they are given, else those of ImageNet, ADE20K, COCO or Cityscapes.

    Raises:
        ValueError: If they are others in number, or no data set is known that has so many.
    """
    if classes is not None:
        found = read_classes(classes)
        if len(found.names) != number:
            raise ValueError(f"--classes {classes} names {len(found.names)} classes, and the checkpoint has {number}")
        return found
    if number == 1000:
        return read_classes(cast(list[str], ImageNetInfo().label_descriptions()))
    if number == 80:
        return read_classes(
            [name for name in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"] if name not in ("__background__", "N/A")]
        )
    known = {150: "ade20k", 19: "cityscapes"}
    if number not in known:
        raise ValueError(f"the checkpoint has {number} classes, which is no data set known here: name them with --classes FILE.csv")
    return read_classes(known[number])


def write_task(task: BaseTask, file: Path) -> None:
    """Write a checkpoint like those of a run, without an optimizer to go on with."""
    quiet: Any = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = lightning.Trainer(accelerator="cpu", plugins=[WholeCheckpoints()], **quiet)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(file, weights_only=True)
