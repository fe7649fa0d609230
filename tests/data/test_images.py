"""Odd files made with Pillow, against pixels known beforehand; folders of real images made on the spot."""

import struct
import zlib

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image

from debiformer.data.images import ImageFolders, UnreadableImage, eval_transform, find_images, read_image

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


def make_folders(root, counts, splits=("train", "val", "test")):
    """Class folders of flat colours: the channel that is bright tells the class."""
    for split in splits:
        for target, (name, count) in enumerate(counts.items()):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                colour = [0, 0, 0]
                colour[target] = 255
                Image.new("RGB", (40, 30), tuple(colour)).save(root / split / name / f"{index}.png")
    return root


def test_image_folders(tmp_path):
    data = ImageFolders(make_folders(tmp_path, {"ant": 5, "bee": 3}), input_size=(32, 48), batch_size=3, num_workers=0)
    assert isinstance(data, LightningDataModule)
    assert (data.class_names, data.num_classes, data.input_size) == (["ant", "bee"], 2, (3, 32, 48))
    assert (data.crop_pct, data.interpolation) == (0.875, "bicubic")
    batches = list(data.train_dataloader())
    assert [len(targets) for _, targets in batches] == [3, 3], "the odd images at the end are dropped"
    for loader, sizes in ((data.val_dataloader(), [3, 3, 2]), (data.test_dataloader(), [3, 3, 2])):
        batches = list(loader)
        assert [len(targets) for _, targets in batches] == sizes
        assert torch.cat([targets for _, targets in batches]).tolist() == [0] * 5 + [1] * 3
    images, targets = batches[0]
    assert images.shape == (3, 3, 32, 48)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(images[0], red.view(3, 1, 1).expand(3, 32, 48))


def test_augmentations_of_the_recipes(tmp_path):
    root = make_folders(tmp_path, {"ant": 4})
    data = ImageFolders(root, 32, 4, 0, scale=(0.5, 1.0), vflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", re_prob=1.0)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert images.isfinite().all()
    assert (images[0] != images[1]).any()


def test_fewer_images_than_a_batch_are_not_dropped(tmp_path):
    data = ImageFolders(make_folders(tmp_path, {"ant": 2, "bee": 1}), input_size=32, batch_size=8, num_workers=0)
    assert [len(targets) for _, targets in data.train_dataloader()] == [3]


def test_class_folders_only_are_split_evenly(tmp_path):
    root = make_folders(tmp_path, {"ant": 10, "bee": 5}, splits=("",))
    first, second = (ImageFolders(root, input_size=32, num_workers=0, val_fraction=0.2) for _ in range(2))
    assert {split: len(part) for split, part in first.datasets.items()} == {"train": 12, "val": 3}
    train, val = first.datasets["train"].indices, first.datasets["val"].indices
    assert sorted(train + val) == list(range(15))
    assert val == second.datasets["val"].indices
    assert torch.cat([targets for _, targets in first.val_dataloader()]).tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="no folder test"):
        first.test_dataloader()
    with pytest.raises(ValueError, match="bee: 5 images cannot be split by val_fraction"):
        ImageFolders(root, val_fraction=0.1)


def test_folders_that_will_not_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root=.*nowhere: no such folder"):
        ImageFolders(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no class folders"):
        ImageFolders(tmp_path)
    make_folders(tmp_path, {"ant": 1, "bee": 1}, splits=("train",))
    with pytest.raises(FileNotFoundError, match="holds train but no folder val"):
        ImageFolders(tmp_path)
    make_folders(tmp_path, {"ant": 1}, splits=("val",))
    with pytest.raises(ValueError, match=r"val and .*train must hold the same class folders, but bee is in one only"):
        ImageFolders(tmp_path)
    (tmp_path / "val" / "bee").mkdir()
    with pytest.raises(ValueError, match=r"val: no images of bee; looked for .*\*\.jpg"):
        ImageFolders(tmp_path)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"num_workers": -1}, {"input_size": 0}, {"interpolation": "best"}])
def test_image_folders_names_the_bad_argument(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageFolders(make_folders(tmp_path, {"ant": 1}), **wrong)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_training_image_is_named(tmp_path, num_workers):
    root = make_folders(tmp_path, {"ant": 2})
    (root / "train" / "ant" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UnreadableImage, match=r"train/ant/torn\.jpg"):
        list(ImageFolders(root, input_size=32, num_workers=num_workers).train_dataloader())
