"""Class activation maps of classifiers, segmenters and detectors, by the library grad-cam, with the layout of maps seen to."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.pyramid import Pyramid
from ..models.stages import Block
from ..nearest import did_you_mean

METHODS = {
    "grad_cam": "GradCAM",
    "grad_cam_plus_plus": "GradCAMPlusPlus",
    "hires_cam": "HiResCAM",
    "layer_cam": "LayerCAM",
    "xgrad_cam": "XGradCAM",
    "eigen_cam": "EigenCAM",
}
STRIDES = (1, 2, 4, 8, 16, 32, 64)  # of maps
Target = Callable[[Any], Tensor]  # from what the model gives for one image to the number that is explained


def class_activation(
    model: nn.Module,
    images: Tensor,
    targets: Sequence[int | Target] | Tensor,
    layer: str | None = None,
    method: str = "grad_cam",
    channels_last: bool | None = None,
) -> Tensor:
    """Where in the images the evidence for each target lies: maps (B, H, W) from 0 to 1, each relative to its own peak.

    The model is left as it was: in its mode, with the gradients that its parameters had.

    Args:
        model: A classifier, a `Segmenter` or a `Detector`, in eager mode.
        images: Normalised images (B, 3, H, W).
        targets: For each image a class index, or what turns the output for it into a number: `pixels_of`, `boxes_of`.
        layer: Name of the module whose output is weighed; the last map of the backbone where it is None.
        method: One of `METHODS`.
        channels_last: Whether the layer's output is (B, H, W, C). None finds out: inside of this library's blocks it is; in other models
            the size of the image tells, unless the model has resized it.

    Raises:
        ImportError: If grad-cam is not installed.
        ValueError: If there is no such layer or method, there are not as many targets as images, or the layout cannot be told.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(METHODS)}")
    if images.ndim != 4:
        raise ValueError(f"expected images (B, 3, H, W), got {tuple(images.shape)}")
    if isinstance(targets, Tensor):
        targets = targets.tolist()
    if not isinstance(targets, Sequence) or not all(isinstance(target, int) or callable(target) for target in targets):
        raise ValueError(f"targets={targets!r} must be a class index, or a function of the output, for each image")
    if len(targets) != len(images):
        raise ValueError(f"{len(targets)} targets for {len(images)} images")
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise ImportError('class activation maps take grad-cam: pip install "debiformer[explain]"') from error
    module = _layer(model, layer)

    def as_nchw(x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if _is_channels_last(model, module, x, images.shape[2:], channels_last) else x

    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    training = [(part, part.training) for part in model.modules()]
    cam = getattr(pytorch_grad_cam, METHODS[method])(model, [module], as_nchw)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            asked = [_class(target) if isinstance(target, int) else target for target in targets]
            # A leaf that wants a gradient: a frozen model has no other.
            found = cam(images.detach().clone().requires_grad_(), asked)
    finally:
        cam.activations_and_grads.release()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for part, mode in training:
            part.training = mode
    return torch.from_numpy(found)


def pixels_of(label: int, mask: Tensor) -> Target:
    """For a segmenter: the mean logit of a class over the pixels of a mask (H, W)."""
    return lambda logits: (logits[label] * mask.to(logits)).sum() / mask.sum().clamp(min=1)


def boxes_of(label: int, box: Tensor, overlap: float = 0.5) -> Target:
    """For a detector: the score of the box of a class that covers a box (4,) best; 0 where none covers `overlap` of both together."""

    def score(found: dict[str, Tensor]) -> Tensor:
        from torchvision.ops import box_iou

        of_class = found["labels"] == label
        covered = box_iou(box[None].to(found["boxes"]), found["boxes"].detach())[0] * of_class
        if not len(covered) or covered.max() < overlap:
            return found["scores"].sum() * 0
        return found["scores"][covered.argmax()]

    return score


def _class(label: int) -> Target:
    def logit(logits: Tensor) -> Tensor:
        if not 0 <= label < len(logits):
            raise ValueError(f"target {label} is not one of the {len(logits)} classes, from 0 on")
        return logits[label]

    return logit


def last_map(model: nn.Module) -> str:
    """Name of the module that gives the last map of the timm model in a model.

    Raises:
        ValueError: If there is none.
    """
    for name, part in model.named_modules():
        info = getattr(part, "feature_info", None)
        if isinstance(info, list) and info:
            return ".".join(filter(None, [name, info[-1]["module"]]))
    raise ValueError(f"{type(model).__name__} has no timm model inside that tells its maps: give a layer")


def _layer(model: nn.Module, name: str | None) -> nn.Module:
    modules = dict(model.named_modules())
    name = last_map(model) if name is None else name
    if name not in modules:
        raise ValueError(f"layer={name!r} is no module of {type(model).__name__}: {did_you_mean(name, modules)}")
    return modules[name]


def _is_channels_last(model: nn.Module, layer: nn.Module, x: Tensor, image_size: Sequence[int], channels_last: bool | None) -> bool:
    if x.ndim != 4:
        raise ValueError(f"the layer gives {tuple(x.shape)}, which is no map (B, C, H, W) or (B, H, W, C): name one that gives a map")
    if channels_last is not None:
        return channels_last
    if any(layer in set(part.modules()) for part in model.modules() if isinstance(part, Block)):
        return True
    if any(layer in set(part.modules()) for part in model.modules() if isinstance(part, Pyramid)):
        return False
    first, last = (_is_reduced(image_size, sides) for sides in (x.shape[2:], x.shape[1:3]))
    if first == last:
        raise ValueError(f"the layer gives {tuple(x.shape)} for images of {tuple(image_size)}: say whether channels_last=True or False")
    return last


def _is_reduced(image_size: Sequence[int], sides: Sequence[int]) -> bool:
    """Whether a map of these sides may be the image at a stride."""
    return any(all(n // stride <= side <= -(-n // stride) for n, side in zip(image_size, sides, strict=True)) for stride in STRIDES)
