import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from debiformer.data.images import UnreadableImage
from debiformer.data.masks import IGNORED, default_palette, overlay, paint, read_classes, read_mask
from debiformer.data.segmentation import ADE20K, CamVid, Cityscapes, ImageMaskFolders, TrainingCrops, largest_share

SHADE = 60  # of an image's pixels for each number of the class: images tell what their mask must be


@pytest.fixture(autouse=True)
def _python_seed():
    random.seed(0)


def picture(size, classes=4, seed=0):
    """A mask of large blocks, and the image in shades of its classes."""
    blocks = np.random.default_rng(seed).integers(0, classes, (4, 5)).astype(np.uint8)
    mask = Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
    shades = Image.fromarray(np.asarray(mask) * SHADE)
    return Image.merge("RGB", [shades] * 3), mask


def make_folders(root, counts, size=(50, 40), images="images/{}", masks="masks/{}", ends=(".png", ".png")):
    for split, count in counts.items():
        for index in range(count):
            for folder, end, made in zip((images, masks), ends, picture(size, seed=index), strict=True):
                file = root / folder.format(split) / f"{index}{end}"
                file.parent.mkdir(parents=True, exist_ok=True)
                made.save(file)
    return root


def crops(**options):
    settings = dict(crop_size=(64, 64), short_side=100, long_side=400, scale=(0.5, 2.0), max_class_share=1.0, hflip=0.5, distortion=0.0)
    return TrainingCrops(**settings | options, fill=(1, 2, 3))


class TestTrainingCrops:
    def test_image_and_mask_stay_together(self):
        """Scaled, cropped and flipped alike: where a block is far from its borders, its shade still tells its class."""
        image, mask = picture((200, 160))
        seen = set()
        for _ in range(20):
            pixels, classes = crops()(image, mask.convert("I"))
            assert (pixels.shape, pixels.dtype, classes.shape, classes.dtype) == ((3, 64, 64), torch.uint8, (64, 64), torch.int16)
            labelled = classes != IGNORED
            right = (pixels[0] - classes * SHADE).abs() <= 2
            assert right[labelled].float().mean() > 0.8
            seen |= set(classes[labelled].tolist())
        assert seen == {0, 1, 2, 3}

    def test_scale_range(self):
        """An image that is one pixel's ramp wide tells by its slope how it was scaled."""
        ramp = np.tile(np.arange(200, dtype=np.uint8), (200, 1))
        image = Image.merge("RGB", [Image.fromarray(ramp)] * 3)
        factors = []
        for _ in range(60):
            pixels, _ = crops(hflip=0.0, short_side=200)(image, Image.new("I", (200, 200)))
            factors.append(60 / (int(pixels[0, 30, 61]) - int(pixels[0, 30, 1])))
        assert 0.45 < min(factors) < 0.75
        assert 1.6 < max(factors) < 2.2

    def test_what_an_image_lacks_is_ignored(self):
        pixels, classes = crops(scale=(0.5, 0.5))(Image.new("RGB", (80, 40), "white"), Image.new("I", (80, 40)))
        assert (pixels[:, :50, :] == 255).all(), "the shorter side is 50, the longer fills the crop"
        assert (pixels[:, 50:].flatten(1) == torch.tensor([[1], [2], [3]])).all()
        assert (classes[:50] == 0).all()
        assert (classes[50:] == IGNORED).all()

    def test_one_class_does_not_fill_a_crop(self):
        """A mask of two classes, one of them a quarter of the image on its left: one crop in six shows enough of both."""
        mask = np.zeros((256, 256), dtype=np.int32)
        mask[:, :64] = 1
        image, mask = Image.new("RGB", (256, 256)), Image.fromarray(mask)
        shares = {}
        for limit in (1.0, 0.75):
            change = crops(short_side=256, scale=(1.0, 1.0), max_class_share=limit)
            shares[limit] = np.mean([largest_share(change(image, mask)[1].numpy()) >= 0.75 for _ in range(100)])
        assert shares[1.0] > 0.6
        assert shares[0.75] < 0.5 * shares[1.0]

    def test_colours_change_and_classes_do_not(self):
        image, mask = picture((64, 64))
        still = crops(short_side=64, scale=(1.0, 1.0), hflip=0.0)
        changing = crops(short_side=64, scale=(1.0, 1.0), hflip=0.0, distortion=1.0)
        pixels, classes = still(image, mask.convert("I"))
        changed = [changing(image, mask.convert("I")) for _ in range(10)]
        assert any((other != pixels).any() for other, _ in changed)
        assert all(torch.equal(other, classes) for _, other in changed)


class TestFolders:
    def test_batches(self, tmp_path):
        root = make_folders(tmp_path, {"train": 5, "val": 3})
        data = ImageMaskFolders(root, ["a", "b", "c", "d"], crop_size=32, short_side=40, batch_size=2, num_workers=0)
        assert (data.class_names, data.num_classes, len(data.palette)) == (["a", "b", "c", "d"], 4, 4)
        batches = list(data.train_dataloader())
        assert [tuple(batch.images.shape) for batch in batches] == [(2, 3, 32, 32)] * 2
        assert [tuple(batch.targets.shape) for batch in batches] == [(2, 32, 32)] * 2
        first = next(iter(data.val_dataloader()))
        image, mask = picture((50, 40))
        assert torch.equal(first.images[0].permute(1, 2, 0), torch.from_numpy(np.array(image)))
        assert torch.equal(first.targets[0], torch.from_numpy(np.array(mask, dtype=np.int16)))
        normal = data.on_after_batch_transfer(first, 0).images[0]
        grey = (torch.tensor(np.array(image)[0, 0] / 255) - torch.tensor(data.mean)) / torch.tensor(data.std)
        torch.testing.assert_close(normal[:, 0, 0], grey.float())
        with pytest.raises(ValueError, match="has no split test, but train, val"):
            data.test_dataloader()

    def test_layouts(self, tmp_path):
        ade = make_folders(tmp_path / "ade", {"training": 2, "validation": 1}, masks="annotations/{}", ends=(".jpg", ".png"))
        _, mask = ADE20K(ade, num_workers=0).images("val").read(0)
        written = np.array(picture((50, 40))[1])
        assert np.array_equal(np.array(mask), np.where(written == 0, IGNORED, written.astype(int) - 1)), "0 is nothing, 1 the first class"
        city = make_folders(
            tmp_path / "city",
            {"train/aachen": 2, "val/ulm": 1},
            images="leftImg8bit/{}",
            masks="gtFine/{}",
            ends=("_leftImg8bit.png", "_gtFine_labelTrainIds.png"),
        )
        assert len(Cityscapes(city, num_workers=0).images("train")) == 2
        cam = make_folders(tmp_path / "cam", {"train": 1, "val": 1, "test": 1}, masks="annotations/{}", ends=(".jpg", ".png"))
        Image.fromarray(np.full((40, 50), 11, dtype=np.uint8)).save(cam / "annotations/val/0.png")
        _, mask = CamVid(cam, num_workers=0).images("val").read(0)
        assert (np.array(mask) == IGNORED).all()

    def test_what_cannot_be_read_is_passed_over(self, tmp_path):
        root = make_folders(tmp_path, {"train": 3, "val": 3})
        picture((50, 41))[1].save(root / "masks/val/0.png")
        (root / "images/val/1.png").write_bytes(b"no image")
        data = ImageMaskFolders(root, ["a", "b", "c", "d"], batch_size=1, num_workers=0)
        first, second, third = data.val_dataloader()
        assert "the mask has 50x41 pixels, its image 50x40" in first.damaged[0]
        assert first.names == second.names == [""], "what stands in for an image has no name"
        assert (first.targets[0] == IGNORED).all()
        assert "1.png: not an image" in second.damaged[0]
        assert not third.damaged

    def test_folders_that_will_not_do(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no folder .*images/train: name the folders with data.images"):
            ImageMaskFolders(tmp_path, ["a", "b"])
        root = make_folders(tmp_path, {"train": 3, "val": 1})
        (root / "masks/train/2.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"split train: 1 of 3 images have no mask, such as .*masks/train/2.png"):
            ImageMaskFolders(root, ["a", "b"])
        (root / "images/train/2.png").rename(root / "images/train/1.jpg")
        with pytest.raises(ValueError, match=r"two images or more have the mask .*masks/train/1.png"):
            ImageMaskFolders(root, ["a", "b"])

    def test_images_for_test_whose_masks_are_kept_secret(self, tmp_path):
        root = make_folders(tmp_path, {"train": 2, "val": 1, "test": 2})
        shutil.rmtree(root / "masks/test")
        assert sorted(ImageMaskFolders(root, ["a", "b"]).splits) == ["train", "val"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"crop_size": 0}, "crop_size=0 is not"),
            ({"short_side": 0}, "short_side=0 is not"),
            ({"scale": (2.0, 1.0)}, r"scale=\(2.0, 1.0\) is not a range"),
            ({"scale": (0.5,)}, r"scale=\(0.5,\) is not a range"),
            ({"long_side": 100}, "long_side=100 is less than short_side=512"),
            ({"classes": ["a", "b", "a"]}, "has a name more than once"),
            ({"max_class_share": 2.0}, r"max_class_share=2.0 is not in \[0, 1\]"),
            ({"classes": "camvit"}, "classes='camvit' is no file, and no known set: did you mean camvid"),
            ({"classes": [str(n) for n in range(300)]}, "are 300; masks tell no more than 255 apart"),
            ({"batch_size": 0}, "batch_size=0 is not positive"),
        ],
    )
    def test_bad_arguments(self, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            ImageMaskFolders(tmp_path, **{"classes": ["a", "b"]} | arguments)


class TestMasks:
    def test_numbers(self, tmp_path):
        numbers = np.array([[0, 1, 2], [3, 200, 200]], dtype=np.uint8)
        Image.fromarray(numbers).save(tmp_path / "m.png")
        assert np.array(read_mask(tmp_path / "m.png", 4, ignored=200)).tolist() == [[0, 1, 2], [3, 255, 255]]
        assert np.array(read_mask(tmp_path / "m.png", 201, first=1)).tolist() == [[255, 0, 1], [2, 199, 199]]
        with pytest.raises(ValueError, match=r"m.png: the mask has the class 3, but the 3 classes are 0 to 2, and 200 is ignored"):
            read_mask(tmp_path / "m.png", 3, ignored=200)

    @pytest.mark.parametrize(("number", "options"), [(255, dict(ignored=11)), (256, dict(first=1))])
    def test_numbers_that_look_like_none_after_a_shift(self, tmp_path, number, options):
        Image.fromarray(np.array([[number, 1]], dtype=np.uint16)).save(tmp_path / "m.png")
        with pytest.raises(ValueError, match=f"the mask has the class {number}, but the 4 classes"):
            read_mask(tmp_path / "m.png", 4, **options)

    def test_files_that_are_no_masks(self, tmp_path):
        Image.new("RGB", (4, 4)).save(tmp_path / "colours.png")
        with pytest.raises(UnreadableImage, match="a mask in RGB colours"):
            read_mask(tmp_path / "colours.png", 3)
        with pytest.raises(UnreadableImage, match="no such mask"):
            read_mask(tmp_path / "none.png", 3)
        (tmp_path / "cut.png").write_bytes((tmp_path / "colours.png").read_bytes()[:40])
        with pytest.raises(UnreadableImage, match=r"cut.png"):
            read_mask(tmp_path / "cut.png", 3)

    def test_painted_masks_keep_their_numbers(self, tmp_path):
        mask = np.array([[0, 1], [2, 2]], dtype=np.uint8)
        paint(mask, [(255, 0, 0), (0, 255, 0), (0, 0, 255)]).save(tmp_path / "m.png")
        with Image.open(tmp_path / "m.png") as picture:
            assert np.asarray(picture).tolist() == mask.tolist()
            assert np.asarray(picture.convert("RGB")).tolist()[1] == [[0, 0, 255]] * 2
        mask[0, 0] = IGNORED
        shown = overlay(Image.new("RGB", (2, 2), (100, 100, 100)), mask, [(255, 0, 0), (0, 255, 0), (0, 0, 255)])
        assert shown.getpixel((0, 0)) == (100, 100, 100)
        assert shown.getpixel((1, 0)) == pytest.approx((50, 177, 50), abs=1)

    def test_known_classes(self, tmp_path):
        assert [len(read_classes(name).names) for name in ("ade20k", "cityscapes", "camvid")] == [150, 19, 11]
        assert read_classes("cityscapes").names[10:14] == ["sky", "person", "rider", "car"]
        (tmp_path / "mine.csv").write_text("name,red,green,blue\nleaf,0,128,0\nsoil,90,60,20\n")
        assert read_classes(tmp_path / "mine.csv") == (["leaf", "soil"], [(0, 128, 0), (90, 60, 20)])
        (tmp_path / "excel.csv").write_text("name\nleaf\nsoil\n", encoding="utf-8-sig")
        assert read_classes(tmp_path / "excel.csv") == (["leaf", "soil"], default_palette(2))
        (tmp_path / "latin.csv").write_bytes("name\nfl\xe4che\n".encode("latin-1"))
        with pytest.raises(ValueError, match="as UTF-8 text"):
            read_classes(tmp_path / "latin.csv")
        (tmp_path / "odd.csv").write_text("name,red\nleaf,0\n")
        with pytest.raises(ValueError, match="needs the columns name,red,green,blue"):
            read_classes(tmp_path / "odd.csv")
        assert default_palette(3) == [(128, 0, 0), (0, 128, 0), (128, 128, 0)]
