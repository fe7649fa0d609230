"""Segmentation of whole images: resized or in windows that slide over them, at one scale or at several, in bounded memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F

from .heads.pixels import enlarge

ROWS = 32  # of a band that are copied at a time
BAND = 2**26  # numbers that are held at a time to choose the classes of some rows


@dataclass(frozen=True)
class Inference:
    """How an image is segmented.

    Args:
        short_side, long_side: Pixels at scale 1: of the shorter side, unless the longer would have more than `long_side`. None sets no
            limit; without either, an image keeps its size.
        window: Height and width of the windows that slide over the image, in pixels after scaling; None takes the image whole.
        stride: Pixels from one window to the next; None takes two thirds of the window.
        scales: Factors on that size; probabilities of several are averaged.
        flip: Whether each scale is also seen in the mirror.

    Raises:
        ValueError: If an argument is out of range.
    """

    short_side: int | None = None
    long_side: int | None = None
    window: int | None = None
    stride: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("short_side", "long_side", "window", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not a number of pixels")
        if self.stride is not None and self.window is None:
            raise ValueError(f"stride={self.stride} is for windows: set window too")
        if self.stride is not None and self.window is not None and self.stride > self.window:
            raise ValueError(f"stride={self.stride} leaves gaps between windows of window={self.window}")
        if not self.scales or not all(0 < scale < inf for scale in self.scales):
            raise ValueError(f"scales={self.scales} are not factors above 0")

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width at which an image is seen, for each scale."""
        limits = [pixels / side for pixels, side in ((self.short_side, min(height, width)), (self.long_side, max(height, width))) if pixels]
        fit = min(limits, default=1.0)
        return [(max(round(height * fit * scale), 1), max(round(width * fit * scale), 1)) for scale in self.scales]


Model = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> logits (B, classes, H, W)


@torch.inference_mode()
def segment(model: Model, image: Tensor, how: Inference) -> Tensor:
    """The likeliest class of every pixel (H, W), uint8, of a normalised image (3, H, W).

    Memory beyond the image and its result: logits at the scaled size; with windows over the image at its own size, those of a row of
    windows only.
    """
    height, width = image.shape[1:]
    sizes = how.sizes(height, width)
    if how.window is not None and not how.flip and sizes == [(height, width)]:
        bands = slide(model, image, how.window, how.stride)
    else:
        views = [view(model, image, size, mirrored, how) for size, mirrored in product(sizes, (False, True) if how.flip else (False,))]
        bands = fuse(views, height, width)
    # A few rows at a time: argmax copies what it is given, and counts in int64.
    return torch.cat([rows.argmax(0).to(torch.uint8) for band in bands for rows in band.split(ROWS, dim=1)])


def view(model: Model, image: Tensor, size: tuple[int, int], mirrored: bool, how: Inference) -> Tensor:
    """Logits (classes, h, w) of an image at a size, seen in the mirror or not."""
    if size != image.shape[1:]:
        image = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0].to(image.dtype)  # no kernel for halves
    if mirrored:
        image = image.flip(-1)
    if how.window is None:
        logits = model(image[None])[0]
    else:
        logits = torch.cat([band.clone() for band in slide(model, image, how.window, how.stride)], dim=1)
    return logits.flip(-1) if mirrored else logits


def slide(model: Model, image: Tensor, window: int, stride: int | None) -> Iterator[Tensor]:
    """Logits (classes, rows, W) of an image (3, H, W), from top to bottom: means over the windows that see a pixel.

    All are written to the same memory: each is to be used before the next is asked for.
    """
    stride = stride or usual_stride(window)
    height, width = image.shape[1:]
    tops, lefts = starts(height, window, stride), starts(width, window, stride)
    rows = min(window, height)
    total: Tensor | None = None  # of the rows from `top` on, with the number of windows as its last channel
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for left in lefts:
            logits = model(image[None, :, top : top + rows, left : left + window])[0].float()
            if total is None:
                total = logits.new_zeros(len(logits) + 1, rows, width)
            total[:-1, :, left : left + window] += logits
            total[-1, :, left : left + window] += 1
        assert total is not None
        done = following - top
        yield total[:-1, :done].div_(total[-1, :done])
        for row in range(0, rows - done, ROWS):  # a few at a time: the rows to copy may lie where they go
            some = slice(row, min(row + ROWS, rows - done))
            total[:, some] = total[:, some.start + done : some.stop + done].clone()
        total[:, rows - done :] = 0


def usual_stride(window: int) -> int:
    """Pixels from one window to the next: two thirds of it."""
    return max(window * 2 // 3, 1)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin: every `stride` pixels, the last one at the end."""
    return [*range(0, length - window, stride), max(length - window, 0)]


def fuse(views: list[Tensor], height: int, width: int) -> Iterator[Tensor]:
    """Logits of one view, or mean probabilities of several, at another size, as bands (classes, rows, W) from top to bottom."""
    rows = max(BAND // (len(views[0]) * width), 1)
    for top in range(0, height, rows):
        band = range(top, min(top + rows, height))
        if len(views) == 1:
            yield rows_of(views[0], band, height, width)
        else:
            yield torch.stack([rows_of(logits, band, height, width).softmax(0) for logits in views]).mean(0)


def rows_of(logits: Tensor, band: range, height: int, width: int) -> Tensor:
    """Some rows of a map (C, h, w) enlarged bilinearly to (C, height, width), without the others."""
    if logits.shape[1:] == (height, width):
        return logits[:, band.start : band.stop].float()
    at = (torch.arange(band.start, band.stop, device=logits.device) + 0.5) * (logits.shape[1] / height) - 0.5
    at = at.clamp(0, logits.shape[1] - 1)
    above = at.long()
    below = (above + 1).clamp(max=logits.shape[1] - 1)
    mixed = torch.lerp(logits[:, above].float(), logits[:, below].float(), (at - above)[:, None])
    return enlarge(mixed[None], (len(band), width))[0]
