"""What the papers' releases publish, as printed there: no number is from elsewhere, and none from memory."""

from collections.abc import Mapping
from typing import NamedTuple


class Source(NamedTuple):
    """Where numbers were read."""

    title: str
    address: str


_DEBIFORMER = "https://github.com/maclong01/DeBiFormer/blob/1ceb090b58a30adc6fda85be2ab53f657971dd98"
_BIFORMER = "https://github.com/rayleizhu/BiFormer/blob/1697bbbeafb8680524898f1dcaac10defd0604be"
SOURCES = {
    "DeBiFormer": Source("DeBiFormer, README of the release", f"{_DEBIFORMER}/README.md"),
    "DeBiFormer, ADE20K": Source("DeBiFormer, README of the release's segmentation", f"{_DEBIFORMER}/segmentation/README.md"),
    "DeBiFormer, COCO": Source("DeBiFormer, README of the release's detection", f"{_DEBIFORMER}/detection/README.md"),
    "BiFormer": Source("BiFormer, README of the release", f"{_BIFORMER}/README.md"),
    "BiFormer, ADE20K": Source("BiFormer, README of the release's segmentation", f"{_BIFORMER}/semantic_segmentation/README.md"),
    "BiFormer, COCO": Source("BiFormer, README of the release's detection", f"{_BIFORMER}/object_detection/README.md"),
    "Swin": Source(
        "Swin Transformer, README of the release",
        "https://github.com/microsoft/Swin-Transformer/blob/005e8efa45795c351eb85b8107e49caf055a84c0/README.md",
    ),
    "ConvNeXt": Source(
        "ConvNeXt, README of the release",
        "https://github.com/facebookresearch/ConvNeXt/blob/048efcea897d999aed302f2639b6270aedf8d4c8/README.md",
    ),
}

PARAMETERS, MACS, TOP1 = "parameters, M", "GMACs", "top-1 on ImageNet, %"
MIOU, MIOU_SCALES = "mIoU", "mIoU, several scales and mirrored"
BOXES, MASKS, MEDIUM = "AP of boxes", "AP of masks", "AP of medium objects"
BOXES_AGAIN, MASKS_AGAIN = "AP of boxes, reproduced by its authors", "AP of masks, reproduced by its authors"


class Classifier(NamedTuple):
    """A model of timm's or ours, what its source prints, and the recipe that trains it here, if one does."""

    label: str
    name: str
    source: str
    published: Mapping[str, str]
    recipe: str = ""


class Dense(NamedTuple):
    """A model for a dense task: what its source prints, "" for what it leaves out.

    A recipe says what it is made of, or for a peer, which is only counted, `parts` do: the backbone, and a head or a detector.
    """

    label: str
    source: str
    published: Mapping[str, str]
    recipe: str = ""
    parts: Mapping[str, str] = {}


def _printed(parameters: str, macs: str, top1: str = "") -> dict[str, str]:
    return {PARAMETERS: parameters, MACS: macs} | ({TOP1: top1} if top1 else {})


_STL = _printed("28.4", "4.6", "82.7")
_SWIN = {size: f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")}

CLASSIFIERS = (
    Classifier("DeBiFormer-T", "debiformer_tiny", "DeBiFormer", _printed("21.4", "2.6", "81.9"), "imagenet1k/debiformer_tiny"),
    Classifier("DeBiFormer-S", "debiformer_small", "DeBiFormer", _printed("44", "5.4", "83.9"), "imagenet1k/debiformer_small"),
    Classifier("DeBiFormer-B", "debiformer_base", "DeBiFormer", _printed("77", "11.8", "84.4"), "imagenet1k/debiformer_base"),
    Classifier("BiFormer-T", "biformer_tiny", "BiFormer", _printed("13.1", "2.2", "81.4"), "imagenet1k/biformer_tiny"),
    Classifier("BiFormer-S", "biformer_small", "BiFormer", _printed("25.5", "4.5", "83.8"), "imagenet1k/biformer_small"),
    Classifier("BiFormer-B", "biformer_base", "BiFormer", _printed("56.8", "9.8", "84.3"), "imagenet1k/biformer_base"),
    Classifier("BiFormer-STL", "biformer_stl", "BiFormer", _STL),
    Classifier("BiFormer-STL-nchw", "biformer_stl_nchw", "BiFormer", _STL),
    Classifier("Swin-T", _SWIN["tiny"], "Swin", _printed("28", "4.5")),
    Classifier("Swin-S", _SWIN["small"], "Swin", _printed("50", "8.7")),
    Classifier("Swin-B", _SWIN["base"], "Swin", _printed("88", "15.4")),
    Classifier("ConvNeXt-T", "convnext_tiny", "ConvNeXt", _printed("28", "4.5")),
    Classifier("ConvNeXt-S", "convnext_small", "ConvNeXt", _printed("50", "8.7")),
    Classifier("ConvNeXt-B", "convnext_base", "ConvNeXt", _printed("89", "15.4")),
    Classifier("ResNet-50", "resnet50", "", {}),
)

DENSE = (
    Dense("DeBiFormer-S, Semantic FPN", "DeBiFormer, ADE20K", {MIOU: ""}, "ade20k/semantic_fpn_debiformer_small"),
    Dense("DeBiFormer-B, Semantic FPN", "DeBiFormer, ADE20K", {MIOU: "50.6"}, "ade20k/semantic_fpn_debiformer_base"),
    Dense("BiFormer-S, Semantic FPN", "BiFormer, ADE20K", {MIOU: "48.9"}, "ade20k/semantic_fpn_biformer_small"),
    Dense("BiFormer-B, Semantic FPN", "BiFormer, ADE20K", {MIOU: "49.9"}, "ade20k/semantic_fpn_biformer_base"),
    Dense("DeBiFormer-S, UPerNet", "DeBiFormer, ADE20K", {MIOU: "", MIOU_SCALES: ""}, "ade20k/upernet_debiformer_small"),
    Dense("DeBiFormer-B, UPerNet", "DeBiFormer, ADE20K", {MIOU: "51.4", MIOU_SCALES: "52.0"}, "ade20k/upernet_debiformer_base"),
    Dense("BiFormer-S, UPerNet", "BiFormer, ADE20K", {MIOU: "49.8", MIOU_SCALES: "50.8"}, "ade20k/upernet_biformer_small"),
    Dense("BiFormer-B, UPerNet", "BiFormer, ADE20K", {MIOU: "51.0", MIOU_SCALES: "51.7"}, "ade20k/upernet_biformer_base"),
    Dense("Swin-T, UPerNet", "Swin", _printed("60", "945"), parts={"backbone": _SWIN["tiny"], "head": "upernet"}),
    Dense("Swin-S, UPerNet", "Swin", _printed("81", "1038"), parts={"backbone": _SWIN["small"], "head": "upernet"}),
    Dense("Swin-B, UPerNet", "Swin", _printed("121", "1188"), parts={"backbone": _SWIN["base"], "head": "upernet"}),
    Dense("DeBiFormer-S, RetinaNet", "DeBiFormer, COCO", {BOXES: "45.6", MEDIUM: "49.3"}, "coco/retinanet_debiformer_small"),
    Dense("DeBiFormer-B, RetinaNet", "DeBiFormer, COCO", {BOXES: "47.1", MEDIUM: "51.1"}, "coco/retinanet_debiformer_base"),
    Dense("BiFormer-S, RetinaNet", "BiFormer, COCO", {BOXES: "45.9", BOXES_AGAIN: "47.3"}, "coco/retinanet_biformer_small"),
    Dense("BiFormer-B, RetinaNet", "BiFormer, COCO", {BOXES: "47.1"}, "coco/retinanet_biformer_base"),
    Dense("DeBiFormer-S, Mask R-CNN", "DeBiFormer, COCO", {BOXES: "47.5", MASKS: "42.5"}, "coco/mask_rcnn_debiformer_small"),
    Dense("DeBiFormer-B, Mask R-CNN", "DeBiFormer, COCO", {BOXES: "48.5", MASKS: "43.2"}, "coco/mask_rcnn_debiformer_base"),
    Dense(
        "BiFormer-S, Mask R-CNN",
        "BiFormer, COCO",
        {BOXES: "47.8", MASKS: "43.2", BOXES_AGAIN: "48.1", MASKS_AGAIN: "43.6"},
        "coco/mask_rcnn_biformer_small",
    ),
    Dense("BiFormer-B, Mask R-CNN", "BiFormer, COCO", {BOXES: "48.6", MASKS: "43.7"}, "coco/mask_rcnn_biformer_base"),
    Dense("Swin-T, Mask R-CNN", "Swin", _printed("48", "267"), parts={"backbone": _SWIN["tiny"], "detector": "mask_rcnn"}),
    Dense("Swin-S, Mask R-CNN", "Swin", _printed("69", "359"), parts={"backbone": _SWIN["small"], "detector": "mask_rcnn"}),
)

MECHANISMS = (  # labelled as `benchmarks/cifar10.py table5` does
    Classifier("shifted window", "shifted_window_stl", "", {}),
    Classifier("spatially separable", "spatially_separable_stl", "", {}),
    Classifier("sequential axial", "sequential_axial_stl", "", {}),
    Classifier("criss cross", "criss_cross_stl", "", {}),
    Classifier("cross shaped window", "cross_shaped_window_stl", "", {}),
    Classifier("deformable", "deformable_stl", "", {}),
    Classifier("block grid", "block_grid_stl", "", {}),
    Classifier("bi-level routing", "biformer_stl", "BiFormer", _STL),
    Classifier("deformable bi-level routing", "debiformer_stl", "", {}),
)

# The rows of Tables 6 and 7 are a choice of ours: the papers' could not be read.
ABLATED = "debiformer_tiny"
RELEASED_TOPK = (1, 4, 16, 49), (4, 8, 16, 49)
TOPK = (  # of each stage's BRA and DBRA; the last stage has no BRA, and in its 49 regions of a pixel there is nothing to choose
    ((1, 4, 16, 49), (1, 4, 16, 49)),
    ((1, 4, 16, 49), (2, 8, 16, 49)),
    RELEASED_TOPK,
    ((1, 4, 16, 49), (8, 16, 32, 49)),
    ((1, 4, 16, 49), (49, 49, 49, 49)),
    ((2, 8, 32, 49), (4, 8, 16, 49)),
    ((4, 16, 49, 49), (4, 8, 16, 49)),
    ((49, 49, 49, 49), (49, 49, 49, 49)),
)
RELEASED_PATTERN = ("B*", "B*", "B*", "**")
PATTERNS = (
    ("BB", "BB", "BB", "BB"),
    ("BB", "BB", "BB", "**"),
    ("BB", "BB", "B*", "**"),
    ("BB", "B*", "B*", "**"),
    RELEASED_PATTERN,
    ("**", "**", "**", "**"),
)

_CUT = "The source cuts further digits off, where rounding would have raised the last."
_RESIZED = (
    "Within a thousandth. mmsegmentation's counter, with which the source will have counted, adds norms, activations and resizing, which "
    "are no products."
)
_AP_M = "The column is headed mAP_mask/AP_M; RetinaNet has no masks."
NOTES = {
    ("DeBiFormer-T", PARAMETERS): _CUT,
    ("ConvNeXt-T", PARAMETERS): _CUT,
    ("DeBiFormer-B", PARAMETERS): (
        "77 M stands in the paper and in its README. The released code has 95,501,926 parameters, and so has this preset: 47.6 M of them "
        "in the last stage. No plausible change of it gives 77 M at 11.8 G: a last stage of depth 1 makes 71.7 M at 10.5 GMACs, one with "
        "the feed-forwards of small's 81.2 M at 11.0. As the FLOPs nearly agree with the code, 77 M may be an error, or belong to another "
        "version; the released checkpoint would tell, and was not within reach."
    ),
    ("DeBiFormer-B", MACS): (
        "The released code has 11.69 G by the same counter, as it also computes the affinities of regions that are all routed to anyway, "
        "and 11.74 G by fvcore's. Neither rounds to 11.8."
    ),
    ("Swin-T, UPerNet", MACS): _RESIZED,
    ("Swin-S, UPerNet", MACS): _RESIZED,
    ("Swin-B, UPerNet", MACS): _RESIZED,
    ("DeBiFormer-S, RetinaNet", MEDIUM): _AP_M,
    ("DeBiFormer-B, RetinaNet", MEDIUM): _AP_M,
}
