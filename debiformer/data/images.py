"""Images on disk: reading any file that Pillow opens, finding files, and the transform for evaluation."""

import io
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from torch import Tensor
from torchvision.transforms import v2

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of such files; Pillow reads others by starting programs
STRIP = 200  # times its shorter side: resized by that, a longer image takes gigabytes, however small its file
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


class UnreadableImage(ValueError):
    """A file that is not a whole, readable image; the message names it and the reason."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, upright.

    The EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled from 0..65535 to 0..255, and of an animation
    the first frame is taken.

    Raises:
        UnreadableImage: If the file is missing, empty, cut short, not an image, of more pixels than Pillow deems safe, or one side is over
            200 times the other.
    """
    path = Path(path)
    if not path.is_file():
        raise UnreadableImage(f"{path}: {'is a folder, not an image' if path.is_dir() else 'no such file'}")
    if not path.stat().st_size:
        raise UnreadableImage(f"{path}: the file is empty")
    return decode_image(path, str(path))


def decode_image(file: str | Path | IO[bytes], name: str, formats: tuple[str, ...] | None = None) -> Image.Image:
    """As `read_image`, from a path or an open file that messages call `name`; in one of these formats, or all that Pillow knows."""
    if isinstance(file, io.BytesIO) and not file.getbuffer().nbytes:
        raise UnreadableImage(f"{name}: is empty")
    try:
        with Image.open(file, formats=formats) as image:
            if max(image.size) > STRIP * min(image.size):
                raise ValueError(f"of {image.width}x{image.height} pixels, one side over {STRIP} times the other")
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(f"{name}: not an image, or in a format that Pillow cannot read") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged files
        raise UnreadableImage(f"{name}: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    wide = image.convert("F")
    low, high = cast(tuple[float, float], wide.getextrema())
    if image.mode == "F" or low < 0 or high > 65535:  # Pillow also opens some 16-bit files in its 32-bit mode
        raise ValueError(f"{image.mode!r} pixels from {low:g} to {high:g} have no agreed range: convert the file to 8 or 16 bits")
    return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")  # convert() cuts the fraction off


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """All images among `paths`: files as given, whatever their suffix; folders searched recursively by suffix, in sorted order.

    Raises:
        FileNotFoundError: If a path does not exist, or nothing is found.
    """
    given = [Path(path) for path in paths]
    missing = [str(path) for path in given if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no such file or folder: {', '.join(missing)}")
    found = [file for path in given for file in (_images_in(path) if path.is_dir() else [path])]
    if not found:
        raise FileNotFoundError(f"no images in {', '.join(map(str, given))}: looked for files named {looked_for()}")
    return found


def _images_in(folder: Path) -> list[Path]:
    files = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(file for file in files if is_image(file))


def is_image(file: str | Path) -> bool:
    """By name; hidden files are what systems leave behind, such as macOS's ._photo.jpg."""
    name = os.path.basename(file)
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def looked_for() -> str:
    """The names that an image may have, for messages."""
    return " ".join(f"*{suffix}" for suffix in SUFFIXES)


def shown(path: str | Path) -> str:
    """A file's name, printable even where its bytes are no UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def eval_transform(
    input_size: int | Sequence[int],
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
) -> Callable[[Image.Image], Tensor]:
    """The transform for evaluation and prediction, from an image to (3, H, W): resize, centre crop, normalise.

    Args:
        input_size: Pixels of a square, (H, W) or (3, H, W).
        mean, std: Of the channels, for values in [0, 1].
        crop_pct: Share of the resized image's shorter side that the crop keeps, in (0, 1].
        interpolation: nearest, bilinear, bicubic or lanczos.

    Raises:
        ValueError: If an argument is out of range.
    """
    _, height, width = check_preprocessing(input_size, mean, std, crop_pct, interpolation)
    return create_transform((height, width), mean=tuple(mean), std=tuple(std), crop_pct=crop_pct, interpolation=interpolation)


def train_transform(input_size: tuple[int, int], **options: Any) -> Callable[[Image.Image], Any]:
    """Timm's transform for training; `options` are those of its `create_transform`."""
    transform = create_transform(input_size, is_training=True, **options)
    for step in transform.transforms:
        for operation in (*getattr(step, "ops", ()), *chain(*getattr(step, "policy", ()))):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Timm's, but that an image of no bits is black, as before Pillow 13 made it an error: RandAugment at its strongest asks for it."""
    return auto_augment.posterize(image, bits_to_keep, **options) if bits_to_keep else Image.new(image.mode, image.size)


def color_changes(strength: float) -> Callable[[Tensor], Tensor]:
    """Random changes in brightness, contrast, saturation and hue, each for every second image; at 1, as SSD was trained with."""
    strengths = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.1} if strength else {}
    return v2.Compose([v2.Identity(), *(v2.RandomApply([v2.ColorJitter(**{name: strength * value})]) for name, value in strengths.items())])


def check_preprocessing(
    input_size: int | Sequence[int], mean: Sequence[float], std: Sequence[float], crop_pct: float, interpolation: str
) -> tuple[int, int, int]:
    """The input size as (3, H, W); raises a ValueError that names the first argument out of range."""
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)[-2:]
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"input_size={input_size} is not a number of pixels, nor (height, width)")
    check_normalization(mean, std)
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct} is not in (0, 1]")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
    return (3, *size)


def check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise a ValueError unless these are means and standard deviations of three channels."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean={mean} and std={std} must be three numbers each, those of std above 0")
