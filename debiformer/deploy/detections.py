"""Detectors as graphs: torchvision's own steps with outputs of a fixed number of rows, and no decision that depends on the image."""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms, roi_align
from torchvision.ops.poolers import MultiScaleRoIAlign, initLevelMapper

from ..models.detector import Detector

DIVISOR = 32  # of the sides of padded images
NOTHING = -1.0  # the score of a row without a box, until the end


class Detections(nn.Module):
    """A detector for one image that is resized and normalised already.

    (1, 3, H, W) to boxes (N, 4) in its pixels, labels (N,) from 0 and scores (N,), the highest first, and with Mask R-CNN masks (N, 28, 28)
    from 0 to 1 that span their boxes. N is the detector's limit; where it finds less, scores end with 0.

    Two things differ from torchvision, and matter seldom: boxes of all classes are suppressed in one go, moved apart by class in float32,
    which blurs them by 0.01 pixels with a hundred classes and more with more; and a map's stride is what it is, where torchvision takes it
    from the image's size, wrongly below 70 pixels.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.detector
        self.model: Any = detector.model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size = (images.shape[2], images.shape[3])
        below, right = ((n + DIVISOR - 1) // DIVISOR * DIVISOR - n for n in size)  # as torchvision pads them
        padded = F.pad(images, (0, right, 0, below))
        maps = [*self.model.backbone(padded).values()]
        generator = self.model.anchor_generator if self.detector == "retinanet" else self.model.rpn.anchor_generator
        (anchors,) = generator(ImageList(padded, [size]), maps)
        counts = [x.shape[2] * x.shape[3] * each for x, each in zip(maps, generator.num_anchors_per_location(), strict=True)]
        steps = self.in_one_step if self.detector == "retinanet" else self.in_two_steps
        boxes, labels, scores, *masks = steps(maps, anchors, counts, size)
        return boxes, labels, scores.clamp_min(0), *masks

    def in_one_step(self, maps: list[Tensor], anchors: Tensor, counts: list[int], size: tuple[int, int]) -> tuple[Tensor, ...]:
        """RetinaNet: what the anchors of each level promise most."""
        model = self.model
        heads = model.head(maps)
        classes = heads["cls_logits"].shape[2]
        found: list[tuple[Tensor, ...]] = []
        for logits, deltas, here in by_level(counts, heads["cls_logits"][0], heads["bbox_regression"][0], anchors):
            chances = logits.sigmoid().flatten()
            scores, at = highest(torch.where(chances > model.score_thresh, chances, NOTHING), model.topk_candidates)
            anchor = at // classes
            boxes = clip_boxes_to_image(model.box_coder.decode_single(deltas[anchor], here[anchor]), cast(Any, size))
            found.append((boxes, at % classes, scores))
        boxes, labels, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        scores, at = highest(suppressed(boxes, scores, labels, model.nms_thresh, size), model.detections_per_img)
        return boxes[at], labels[at], scores

    def in_two_steps(self, maps: list[Tensor], anchors: Tensor, counts: list[int], size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Faster and Mask R-CNN: proposals, then classes, and masks of what is left."""
        heads = self.model.roi_heads
        proposals, worth = self.proposals(maps, anchors, counts, size)
        logits, deltas = heads.box_predictor(heads.box_head(pooled(heads.box_roi_pool, maps, proposals)))
        classes = logits.shape[1]
        boxes = clip_boxes_to_image(heads.box_coder.decode_single(deltas, proposals).unflatten(1, (classes, 4)), cast(Any, size))
        boxes, scores = boxes[:, 1:].flatten(0, 1), logits.softmax(-1)[:, 1:]  # without the background
        labels = torch.arange(classes - 1, device=logits.device).expand(scores.shape[0], -1).flatten()
        kept = (scores > heads.score_thresh) & (worth > NOTHING)[:, None]
        kept = kept.flatten() & wide(boxes, 1e-2)
        scores = torch.where(kept, scores.flatten(), NOTHING)
        likely = kept.nonzero().squeeze(1)  # most are not, and suppression takes the square of their number
        left = suppressed(boxes[likely], scores[likely], labels[likely], heads.nms_thresh, size)
        scores, at = highest(torch.full_like(scores, NOTHING).scatter(0, likely, left), heads.detections_per_img)
        boxes, labels = boxes[at], labels[at]
        if not heads.has_mask():
            return boxes, labels, scores
        masks = heads.mask_predictor(heads.mask_head(pooled(heads.mask_roi_pool, maps, boxes))).sigmoid()
        label = (labels + 1).view(-1, 1, 1, 1).expand(-1, 1, *masks.shape[2:])
        return boxes, labels, scores, masks.gather(1, label).squeeze(1)

    def proposals(self, maps: list[Tensor], anchors: Tensor, counts: list[int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes (P, 4) that may hold something, and their scores (P,)."""
        rpn = self.model.rpn
        objectness, deltas = concat_box_prediction_layers(*rpn.head(maps))
        found: list[tuple[Tensor, ...]] = []
        for level, (logits, delta, here) in enumerate(by_level(counts, objectness.flatten(), deltas, anchors)):
            best, at = highest(logits, rpn.pre_nms_top_n(), lowest=float("-inf"))
            boxes = clip_boxes_to_image(rpn.box_coder.decode_single(delta[at], here[at]), cast(Any, size))
            kept = wide(boxes, rpn.min_size) & (best.sigmoid() >= rpn.score_thresh) & (best > float("-inf"))
            found.append((boxes, torch.full_like(at, level), torch.where(kept, best.sigmoid(), NOTHING)))
        boxes, level_of, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        scores, at = highest(suppressed(boxes, scores, level_of, rpn.nms_thresh, size), rpn.post_nms_top_n())
        return boxes[at], scores


class Undivided(nn.Module):
    """What a detector, which is no more of use otherwise, gives by torchvision's code, in the form of `Detections`: it must be the same."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        self.transform: Any = cast(Any, self.detector.model).transform
        self.transform.postprocess = lambda found, *sizes: found  # boxes stay in pixels of the input, masks over their boxes

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size = images.shape[2:]
        self.transform.min_size, self.transform.max_size = (min(size),), max(size)  # as it comes
        (found,) = cast(Any, self.detector)([images[0]])
        model: Any = self.detector.model
        most = model.detections_per_img if self.detector.detector == "retinanet" else model.roi_heads.detections_per_img
        rows = [found["boxes"], found["labels"], found["scores"], *([found["masks"][:, 0]] if "masks" in found else [])]
        return tuple(torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in rows)


def by_level(counts: list[int], *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (N, ...) in parts of these lengths: of each the first, of each the second, and so on."""
    start = 0
    for count in counts:
        yield tuple(x.narrow(0, start, count) for x in rows)
        start += count


def highest(scores: Tensor, most: int, lowest: float = NOTHING) -> tuple[Tensor, Tensor]:
    """The `most` highest of scores (N,) in falling order, filled up with the lowest where there are fewer, and their places."""
    best, at = F.pad(scores, (0, most), value=lowest).topk(most)
    return best, at.clamp_max(scores.shape[0] - 1)


def wide(boxes: Tensor, pixels: float) -> Tensor:
    """Which of boxes (N, 4) have sides of at least so many pixels."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= pixels).all(1)


def suppressed(boxes: Tensor, scores: Tensor, categories: Tensor, overlap: float, size: tuple[int, int]) -> Tensor:
    """Scores (N,) with `NOTHING` for what overlaps more than so much with a better box of its category."""
    side: Any = torch.sym_max(*size)
    apart = categories.to(boxes) * (side + 1)  # no two categories overlap
    kept = nms(boxes + apart[:, None], scores, overlap)
    return torch.full_like(scores, NOTHING).scatter(0, kept, scores[kept])


def pooled(pool: MultiScaleRoIAlign, maps: list[Tensor], boxes: Tensor) -> Tensor:
    """Features (N, C, h, w) of boxes, each from the map that its area asks for."""
    maps = maps[: len(pool.featmap_names)]
    mapper = initLevelMapper(2, 1 + len(maps), pool.canonical_scale, pool.canonical_level)  # strides from 4 = 2^2 on
    level_of = mapper([boxes])
    boxes = F.pad(boxes, (1, 0))  # of the first image
    out = boxes.new_zeros(boxes.shape[0], maps[0].shape[1], *pool.output_size)
    for level, x in enumerate(maps):
        here = (level_of == level).nonzero().squeeze(1)
        features = roi_align(x, boxes[here], pool.output_size, 1 / 2 ** (2 + level), pool.sampling_ratio)
        out = out.index_copy(0, here, features)
    return out
