"""Pictures of detections."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

LINE = 250  # pixels of an image's shorter side for each pixel of a line


def draw(image: Image.Image, found: Mapping[str, Tensor], names: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    """An image with boxes, their classes and, where there are any, scores and masks.

    Args:
        image: The image.
        found: Boxes (N, 4) in its pixels, labels (N,) and, if known, scores (N,) and masks (N, 1, H, W).
        names: Of the classes.
        palette: Their colours.
    """
    labels = found["labels"].tolist()
    if not labels:
        return image.copy()
    pixels, colours = pil_to_tensor(image), [palette[label] for label in labels]
    if "masks" in found:
        pixels = draw_segmentation_masks(pixels, found["masks"][:, 0] > 0.5, alpha=0.4, colors=colours)
    captions = [names[label] for label in labels]
    if "scores" in found:
        captions = [f"{caption} {score:.0%}" for caption, score in zip(captions, found["scores"].tolist(), strict=True)]
    width = max(round(min(image.size) / LINE), 1)
    boxes = found["boxes"].clamp(torch.zeros(()), torch.tensor([*image.size, *image.size]))
    return to_pil_image(draw_bounding_boxes(pixels, boxes, captions, colors=colours, width=width, label_colors=None))
