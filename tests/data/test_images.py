"""Odd files made with Pillow, against pixels known beforehand; folders of real images made on the spot."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from debiformer.data.images import UnreadableImage, eval_transform, find_images, read_image, train_transform

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def pixels(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def save(folder, name, image, **options):
    image.save(folder / name, **options)
    return folder / name


@pytest.fixture
def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def test_plain_rgb(tmp_path, noise):
    assert np.array_equal(pixels(save(tmp_path, "a.png", noise)), np.asarray(noise))


def test_cmyk_jpeg(tmp_path):
    path = save(tmp_path, "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    np.testing.assert_allclose(pixels(path)[4][4], RED, atol=3)


def test_grey_and_bilevel(tmp_path):
    assert pixels(save(tmp_path, "a.png", Image.new("L", (1, 1), 77))) == [[[77, 77, 77]]]
    assert pixels(save(tmp_path, "b.png", Image.new("1", (1, 1), 1))) == [[list(WHITE)]]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_deep_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 300, 25700, 40000, 65535]], dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":  # written by hand: Pillow opens it in its 32-bit mode
        path.write_bytes(b"P5 6 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    assert [pixel[0] for pixel in pixels(path)[0]] == [0, 1, 1, 100, 156, 255]


def test_pixels_without_a_range_are_refused(tmp_path):
    path = save(tmp_path, "a.tif", Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)))
    with pytest.raises(UnreadableImage, match=r"a\.tif.*convert the file to 8 or 16 bits"):
        read_image(path)


def test_transparency_lies_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]):
        image.putpixel((x, 0), colour)
    assert pixels(save(tmp_path, "a.png", image)) == [[list(RED), list(WHITE), [204, 204, 204]]]
    assert pixels(save(tmp_path, "grey.png", Image.new("LA", (1, 1), (0, 0)))) == [[list(WHITE)]]


def test_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*BLUE, *GREEN])
    image.putpixel((1, 0), 1)
    assert pixels(save(tmp_path, "opaque.png", image)) == [[list(BLUE), list(GREEN)]]
    assert pixels(save(tmp_path, "clear.png", image, transparency=1)) == [[list(BLUE), list(WHITE)]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """The orientation says where the stored rows and columns start; laid out by hand from the EXIF standard's table."""
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, "a.png", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(np.asarray(read_image(path))[..., 0], upright)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, GREEN)]
    path = save(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert pixels(path)[0][0] == list(RED)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.bmp", "a.tif", "a.webp"])
def test_truncated(tmp_path, noise, name):
    path = save(tmp_path, name, noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImage, match=name):
        read_image(path)


def test_unreadable_files_are_named_with_the_reason(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no pixels here\n" * 50)
    (tmp_path / "folder.jpg").mkdir()
    reasons = {"empty.jpg": "is empty", "text.jpg": "not an image", "folder.jpg": "is a folder", "missing.jpg": "no such file"}
    for name, reason in reasons.items():
        with pytest.raises(UnreadableImage, match=f"{name}.*{reason}"):
            read_image(tmp_path / name)


def test_decompression_bomb(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(UnreadableImage, match=r"bomb\.png.*2500000000 pixels"):
        read_image(path)


def test_strips(tmp_path):
    Image.new("L", (4, 800)).save(tmp_path / "long.png")
    assert read_image(tmp_path / "long.png").size == (4, 800)
    Image.new("L", (4, 801)).save(tmp_path / "longer.png")
    with pytest.raises(UnreadableImage, match=r"longer\.png: of 4x801 pixels, one side over 200 times the other"):
        read_image(tmp_path / "longer.png")


def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt", "deep/er/c.webp", ".hidden.png", "odd.name"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path / "odd.name", str(tmp_path)])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["odd.name", "a.png", "b.JPG", "deep/er/c.webp"]


def test_find_images_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no images in .*\*\.jpg"):
        find_images([tmp_path])
    with pytest.raises(FileNotFoundError, match="missing_one"):
        find_images([tmp_path, tmp_path / "missing_one"])


def test_eval_transform_crops_the_centre_and_normalises():
    image = Image.new("RGB", (200, 100), BLUE)
    image.paste(Image.new("RGB", (100, 100), (51, 102, 153)), (50, 0))
    tensor = eval_transform((3, 100, 100), mean=(0.2, 0.2, 0.2), std=(0.1, 0.2, 0.4), crop_pct=1.0)(image)
    assert tensor.shape == (3, 100, 100)
    torch.testing.assert_close(tensor, torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1).expand(3, 100, 100))
    assert eval_transform((32, 64))(image).shape == (3, 32, 64)


@pytest.mark.parametrize(
    "wrong",
    [{"input_size": 0}, {"std": (1.0, 0.0, 1.0)}, {"crop_pct": 1.5}, {"interpolation": "cubic"}, {"mean": (0.5,)}],
)
def test_eval_transform_names_the_bad_argument(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        eval_transform(**{"input_size": 32, **wrong})


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0", "v0"])
def test_policies_that_posterize_to_no_bits(noise, policy):
    """With Pillow 13 timm's own operation raises an error for one image in three hundred; the image is black, as it was with Pillow 12."""
    transform = train_transform((32, 32), auto_augment=policy, use_prefetcher=True)
    (step,) = (step for step in transform.transforms if hasattr(step, "ops") or hasattr(step, "policy"))
    operations = getattr(step, "ops", None) or [operation for pair in step.policy for operation in pair]
    extreme = [o for o in operations if o.name.startswith("Posterize") and o.level_fn(o.magnitude, {}) == (0,)]
    assert extreme
    for operation in extreme:
        operation.prob = 1.0
        assert operation(noise).getextrema() == ((0, 0),) * 3
    kept = train_transform((32, 32), auto_augment="rand-m5-inc1", use_prefetcher=True).transforms[2].ops
    (two_bits,) = (o for o in kept if o.name.startswith("Posterize"))
    two_bits.prob = 1.0
    assert np.array_equal(np.asarray(two_bits(noise)), np.asarray(noise) & 0b11000000)
