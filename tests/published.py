"""Checkpoints of dense models in the names of mmsegmentation and mmdetection, made from models of ours."""

import re


def published(segmenter_or_detector, names):
    """A checkpoint as mm's libraries would write it, from our model, by names that this test gives."""
    found = {}
    for key, value in segmenter_or_detector.state_dict().items():
        for ours, theirs in names:
            if re.match(ours, key):
                key = re.sub(ours, theirs, key)
                break
        found[key] = value
    roi = "roi_head.bbox_head."
    if f"{roi}fc_cls.weight" in found:  # theirs have the background last, and neither boxes nor masks of it
        for leaf in ("weight", "bias"):
            found[f"{roi}fc_cls.{leaf}"] = found[f"{roi}fc_cls.{leaf}"].roll(-1, 0)
            found[f"{roi}fc_reg.{leaf}"] = found[f"{roi}fc_reg.{leaf}"][4:]
            found[f"roi_head.mask_head.conv_logits.{leaf}"] = found[f"roi_head.mask_head.conv_logits.{leaf}"][1:]
    return {"state_dict": found, "meta": {}}


def twice(match):
    """The place of a convolution among mmsegmentation's, each of which is followed by a doubling."""
    return f"decode_head.scale_heads.{match[1]}.{2 * int(match[2])}.{'conv' if match[3] == '0' else 'bn'}."


BACKBONE = (r"(?:model\.)?backbone\.(?:body\.)?maps\.model\.", "backbone.")
SEMANTIC_FPN = [
    BACKBONE,
    (r"head\.pyramid\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"head\.pyramid\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"head\.branches\.(\d)\.(\d)\.([01])\.", twice),
    (r"head\.classifier\.", "decode_head.conv_seg."),
]
RETINANET = [
    BACKBONE,
    (r"model\.backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"model\.backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"model\.backbone\.fpn\.extra_blocks\.p6\.", r"neck.fpn_convs.3.conv."),
    (r"model\.backbone\.fpn\.extra_blocks\.p7\.", r"neck.fpn_convs.4.conv."),
    (r"model\.head\.classification_head\.conv\.(\d)\.0\.", r"bbox_head.cls_convs.\1.conv."),
    (r"model\.head\.regression_head\.conv\.(\d)\.0\.", r"bbox_head.reg_convs.\1.conv."),
    (r"model\.head\.classification_head\.cls_logits\.", r"bbox_head.retina_cls."),
    (r"model\.head\.regression_head\.bbox_reg\.", r"bbox_head.retina_reg."),
]
MASK_RCNN = [
    *RETINANET[:3],
    (r"model\.rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"model\.rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"model\.rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"model\.roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"model\.roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"model\.roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"model\.roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"model\.roi_heads\.mask_head\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"model\.roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
    (r"model\.roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
]
