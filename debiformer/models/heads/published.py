"""Heads as mmsegmentation and mmdetection name them, in which the papers' dense checkpoints come: their names to ours."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Rule = tuple[str, str | Callable[[re.Match[str]], str]]  # a published name without its last part, and ours
_LAYERS = {"conv": "0", "bn": "1"}  # of their ConvModule, and of torchvision's Conv2dNormActivation


def _pyramid(ours: str) -> tuple[Rule, ...]:
    return (
        (r"neck\.lateral_convs\.(\d+)\.conv", rf"{ours}.inner_blocks.\1.conv"),
        (r"neck\.fpn_convs\.(\d+)\.conv", rf"{ours}.layer_blocks.\1.conv"),
    )


def _branch(match: re.Match[str]) -> str:
    return f"head.branches.{match[1]}.{int(match[2]) // 2}.{match[3]}"  # theirs have a doubling after every convolution


SEMANTIC_FPN: tuple[Rule, ...] = (
    *_pyramid("head.pyramid"),
    (r"decode_head\.scale_heads\.(\d+)\.(\d+)\.(conv|bn)", _branch),
    (r"decode_head\.conv_seg", "head.classifier"),
)
UPERNET: tuple[Rule, ...] = (
    (r"decode_head\.psp_modules\.(\d+)\.1\.(conv|bn)", r"head.pools.\1.1.\2"),
    (r"decode_head\.lateral_convs\.(\d+)\.(conv|bn)", r"head.lateral.\1.\2"),
    (r"decode_head\.fpn_convs\.(\d+)\.(conv|bn)", r"head.smooth.\1.\2"),
    (r"decode_head\.fpn_bottleneck\.(conv|bn)", r"head.fuse.\1"),
    (r"decode_head\.bottleneck\.(conv|bn)", r"head.bottleneck.\1"),
    (r"decode_head\.conv_seg", "head.classifier"),
    (r"auxiliary_head\.convs\.0\.(conv|bn)", r"auxiliary.convolution.\1"),
    (r"auxiliary_head\.conv_seg", "auxiliary.classifier"),
)
RETINANET: tuple[Rule, ...] = (
    (r"neck\.fpn_convs\.3\.conv", "model.backbone.fpn.extra_blocks.p6"),
    (r"neck\.fpn_convs\.4\.conv", "model.backbone.fpn.extra_blocks.p7"),
    *_pyramid("model.backbone.fpn"),
    (r"bbox_head\.cls_convs\.(\d+)\.conv", r"model.head.classification_head.conv.\1.conv"),
    (r"bbox_head\.reg_convs\.(\d+)\.conv", r"model.head.regression_head.conv.\1.conv"),
    (r"bbox_head\.retina_cls", "model.head.classification_head.cls_logits"),
    (r"bbox_head\.retina_reg", "model.head.regression_head.bbox_reg"),
)
RCNN: tuple[Rule, ...] = (
    *_pyramid("model.backbone.fpn"),
    (r"rpn_head\.rpn_conv", "model.rpn.head.conv.0.conv"),
    (r"rpn_head\.rpn_cls", "model.rpn.head.cls_logits"),
    (r"rpn_head\.rpn_reg", "model.rpn.head.bbox_pred"),
    (r"roi_head\.bbox_head\.shared_fcs\.0", "model.roi_heads.box_head.fc6"),
    (r"roi_head\.bbox_head\.shared_fcs\.1", "model.roi_heads.box_head.fc7"),
    (r"roi_head\.bbox_head\.fc_cls", "model.roi_heads.box_predictor.cls_score"),
    (r"roi_head\.bbox_head\.fc_reg", "model.roi_heads.box_predictor.bbox_pred"),
    (r"roi_head\.mask_head\.convs\.(\d+)\.conv", r"model.roi_heads.mask_head.\1.conv"),
    (r"roi_head\.mask_head\.upsample", "model.roi_heads.mask_predictor.conv5_mask"),
    (r"roi_head\.mask_head\.conv_logits", "model.roi_heads.mask_predictor.mask_fcn_logits"),
)


def heads_in_our_names(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Everything of a published dense checkpoint but its backbone, in our names; what has none there keeps its own."""
    outside = {re.sub(r"^(?:module\.)+", "", key): value for key, value in tensors.items()}
    return {_our_name(key, rules): value for key, value in outside.items() if not key.startswith("backbone.")}


def _our_name(key: str, rules: Sequence[Rule]) -> str:
    path, dot, leaf = key.rpartition(".")
    for theirs, ours in rules:
        if match := re.fullmatch(theirs, path):
            path, _, layer = (ours(match) if callable(ours) else match.expand(ours)).rpartition(".")
            return f"{path}.{_LAYERS.get(layer, layer)}{dot}{leaf}"
    return key


def background_first(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """R-CNN's box and mask predictors with the background as class 0, as torchvision has it; in the checkpoints it is the last, and has no
    boxes and no mask.
    """
    given = dict(given)
    for leaf in ("weight", "bias"):
        for name, moved in {
            f"model.roi_heads.box_predictor.cls_score.{leaf}": lambda value: value.roll(1, 0),
            f"model.roi_heads.box_predictor.bbox_pred.{leaf}": lambda value: torch.cat([torch.zeros_like(value[:4]), value]),
            f"model.roi_heads.mask_predictor.mask_fcn_logits.{leaf}": lambda value: torch.cat([torch.zeros_like(value[:1]), value]),
        }.items():
            if name in given:
                given[name] = moved(given[name])
    return given
