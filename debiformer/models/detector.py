"""A backbone with torchvision's RetinaNet, Faster R-CNN or Mask R-CNN."""

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, cast

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from ..nearest import check_names
from .backbone import Backbone
from .heads.published import RCNN, RETINANET, background_first, heads_in_our_names

DETECTORS: dict[str, Any] = {"retinanet": RetinaNet, "faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}
Boxes = dict[str, Tensor]  # boxes (N, 4), labels (N,), and masks or scores, as torchvision's detectors take and give them


class FeaturePyramid(nn.Module):
    """Images (B, 3, H, W) to the levels of a feature pyramid, by name, the finest first.

    Args:
        body: The backbone.
        first: The map that the pyramid begins with: 0 at stride 4, 1 at stride 8.
        channels: Of every level.
        extra: What adds coarser levels.
    """

    def __init__(self, body: Backbone, first: int, channels: int, extra: Any) -> None:
        super().__init__()
        self.body, self.first, self.out_channels = body, first, channels
        self.fpn = FeaturePyramidNetwork(body.channels[first:], channels, extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(index): x for index, x in enumerate(self.body(images)[self.first :])})


class CoarserLevels(ExtraFPNBlock):
    """Two further levels, by 3x3 convolutions of stride 2: of the backbone's coarsest map, and of the first of them.

    Torchvision's own has a ReLU in between, which the published detectors have not.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.p6, self.p7 = nn.Conv2d(in_channels, channels, 3, 2, 1), nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


def anchors(strides: Sequence[int], scale: float, sizes: int) -> AnchorGenerator:
    """Anchors of three shapes, and of some sizes within an octave, the smallest `scale` strides wide."""
    octave = [2 ** (index / sizes) for index in range(sizes)]
    return AnchorGenerator(
        tuple(tuple(int(scale * stride * size) for size in octave) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
    )


class Detector(nn.Module):
    """Images to boxes, and with Mask R-CNN to masks.

    RetinaNet works on strides 8 to 128, with three sizes of anchors of each of three shapes; the others on strides 4 to 64, with one size.
    Images are resized inside, and boxes given in pixels of the image as it came.

    Args:
        detector: retinanet, faster_rcnn or mask_rcnn.
        backbone: A hierarchical timm model.
        num_classes: Classes, the background not among them.
        pretrained, freeze_norms: As for `Backbone`.
        backbone_args: Further arguments of the backbone's constructor.
        pyramid_channels: Channels of the feature pyramid.
        short_side, long_side: Images get the first on their shorter side, unless the longer would have more than the second.
        anchor_scale: Width of the smallest square anchor of a level, in strides of it; left out, 4 for RetinaNet and 8 for the others.
            Less for objects that are small in the resized image.
        head_norms: Group norms of eight channels in RetinaNet's head, which training from scratch wants; the papers' has none.
        detector_args: Further arguments of torchvision's detector, such as box_detections_per_img or detections_per_img.

    Raises:
        FileNotFoundError: If there is no file of pretrained weights.
        ValueError: If there is no such detector, or no such backbone, or an argument does not go with the detector.
    """

    backbone_prefix = "model.backbone.body.maps.model."

    def __init__(
        self,
        detector: str,
        backbone: str,
        num_classes: int,
        pretrained: bool | str = False,
        freeze_norms: bool = False,
        backbone_args: dict[str, Any] | None = None,
        pyramid_channels: int = 256,
        short_side: int = 800,
        long_side: int = 1333,
        anchor_scale: float | None = None,
        head_norms: bool = False,
        detector_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if detector not in DETECTORS:
            raise ValueError(f"detector={detector!r} is none of {', '.join(DETECTORS)}")
        if anchor_scale is not None and not anchor_scale >= 0.25:
            raise ValueError(f"anchor_scale={anchor_scale} must be 0.25 or more: the anchors of the finest level would have no pixels")
        if head_norms and (detector != "retinanet" or pyramid_channels % 8):
            raise ValueError(f"head_norms={head_norms} is for retinanet with a multiple of 8 as pyramid_channels={pyramid_channels}")
        self.detector = detector
        body = Backbone(backbone, pretrained, freeze_norms, **(backbone_args or {}))
        options: dict[str, Any] = dict(min_size=short_side, max_size=long_side, image_mean=[0.0] * 3, image_std=[1.0] * 3)
        given = detector_args or {}
        ours = ("backbone", "num_classes", "min_size", "max_size", "kwargs")
        known = [name for name in signature(DETECTORS[detector]).parameters if name not in ours]
        check_names("detector_args", given, detector, known)  # torchvision would swallow others
        if detector == "retinanet":
            pyramid = FeaturePyramid(body, 1, pyramid_channels, CoarserLevels(body.channels[-1], pyramid_channels))
            norm = partial(nn.GroupNorm, pyramid_channels // 8) if head_norms else None
            boxes = anchors((8, 16, 32, 64, 128), anchor_scale or 4, sizes=3)
            head = RetinaNetHead(pyramid_channels, boxes.num_anchors_per_location()[0], num_classes, norm_layer=norm)
            options |= dict(detections_per_img=100, anchor_generator=boxes, head=head)
        else:
            pyramid = FeaturePyramid(body, 0, pyramid_channels, LastLevelMaxPool())
            options |= dict(rpn_post_nms_top_n_train=1000, rpn_anchor_generator=anchors((4, 8, 16, 32, 64), anchor_scale or 8, sizes=1))
            num_classes += 1  # the background
        self.model: nn.Module = DETECTORS[detector](pyramid, num_classes, **options | given)

    @property
    def backbone(self) -> Backbone:
        """The backbone inside."""
        return cast(Any, self.model).backbone.body

    def forward(self, images: list[Tensor], targets: list[Boxes] | None = None) -> dict[str, Tensor] | list[Boxes]:
        """Normalised images (3, H, W) to detections; in training, with targets, to losses by name. Labels count from 0."""
        first = 0 if self.detector == "retinanet" else 1  # torchvision's R-CNNs have the background as label 0
        if self.training:
            assert targets is not None
            return self.model(images, [target | {"labels": target["labels"] + first} for target in targets])
        return [found | {"labels": found["labels"] - first} for found in self.model(images)]

    def from_published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of mmdetection's neck and heads in the names of torchvision's; see `load_published`."""
        if self.detector == "retinanet":
            return heads_in_our_names(tensors, RETINANET)
        return background_first(heads_in_our_names(tensors, RCNN))

    def no_weight_decay(self) -> set[str]:
        """Names of the backbone's parameters that its authors train without weight decay."""
        return {f"model.backbone.body.{name}" for name in self.backbone.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks of the backbone again in the backward pass rather than keep what they need."""
        self.backbone.set_grad_checkpointing(enable)
