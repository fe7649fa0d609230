import json
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as pycoco

from debiformer.data.blood_cells import BloodCellBoxes
from debiformer.data.coco import CocoData
from debiformer.data.sampling import TrainingSampler
from debiformer.data.voc import VocData

SIZE = (60, 40)


@pytest.fixture(autouse=True)
def _python_seed():
    random.seed(0)


def rle(mask):
    code = pycoco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def coco(root, split="train", count=4, **changes):
    """A white square on black in each image, at a place of its own, with its box; `changes` replace parts of the JSON."""
    (root / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        x, y = 5 + 7 * number, 4 + 3 * number
        image = Image.new("RGB", SIZE)
        ImageDraw.Draw(image).rectangle((x, y, x + 9, y + 7), fill="white")
        image.save(root / split / f"{number}.png")
        images.append(dict(id=10 + number, file_name=f"{number}.png", width=SIZE[0], height=SIZE[1]))
        polygon = [x, y, x + 10, y, x + 10, y + 8, x, y + 8]
        row = dict(id=number, image_id=10 + number, category_id=3 + 4 * (number % 2), bbox=[x, y, 10, 8], area=80, iscrowd=0)
        annotations.append(row | dict(segmentation=[polygon]))
    content = dict(images=images, annotations=annotations, categories=[dict(id=7, name="bee"), dict(id=3, name="ant")])
    (root / f"{split}.json").write_text(json.dumps(content | changes))
    return content


def load(root, **options):
    settings = dict(images="{split}", annotations="{split}.json", batch_size=2, num_workers=0)
    return CocoData(root, **settings | options)


@pytest.fixture
def root(tmp_path):
    coco(tmp_path)
    coco(tmp_path, "val")
    return tmp_path


class TestCoco:
    def test_boxes_and_masks(self, root):
        data = load(root, masks=True)
        assert data.class_names == ["ant", "bee"], "in the order of their ids"
        batch = next(iter(data.val_dataloader()))
        for image, target in zip(batch.images, batch.targets, strict=True):
            (x0, y0, x1, y1), white = target["boxes"][0].int().tolist(), image[0] == 255
            assert white[y0:y1, x0:x1].all()
            assert white.sum() == (x1 - x0) * (y1 - y0)
            assert torch.equal(target["masks"][0].bool(), white)
        assert [target["labels"].tolist() for target in batch.targets] == [[0], [1]]
        assert [int(target["id"]) for target in batch.targets] == [10, 11]

    @pytest.mark.parametrize(("hflip", "vflip"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
    def test_flips(self, root, hflip, vflip):
        plain = {tuple(t["boxes"][0].tolist()) for b in load(root, hflip=0.0).train_dataloader() for t in b.targets}
        for batch in load(root, masks=True, hflip=hflip, vflip=vflip).train_dataloader():
            for image, target in zip(batch.images, batch.targets, strict=True):
                x0, y0, x1, y1 = target["boxes"][0].int().tolist()
                white = image[0] == 255
                assert white[y0:y1, x0:x1].all()
                assert torch.equal(target["masks"][0].bool(), white)
                assert (x0, y0, x1, y1) not in plain
                assert target.keys() == {"boxes", "labels", "masks"}

    def test_run_length_codes(self, root):
        mask = np.zeros(SIZE[::-1], dtype=bool)
        mask[3:9, 20:33] = True
        content = coco(root)
        content["annotations"][0]["segmentation"] = rle(mask)
        uncompressed = {"size": [SIZE[1], SIZE[0]], "counts": [40 * 20, 4, 40 * 60 - 804]}
        content["annotations"][1] |= {"segmentation": uncompressed, "iscrowd": 1}
        (root / "train.json").write_text(json.dumps(content))
        data = load(root, masks=True)
        assert np.array_equal(data.images("train").read(0)[1]["masks"][0], mask)
        content["annotations"][0]["segmentation"] = rle(mask[:-1])
        (root / "train.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"train.json: annotation 0: a run-length code for 60x39 pixels; its image has 60x40"):
            load(root, masks=True)
        assert len(load(root).images("train")) == 3, "masks are not looked at where none are wanted"

    def test_crowds_and_empty_images(self, root):
        content = coco(root)
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"].append(content["annotations"][1] | {"id": 9, "iscrowd": 1, "bbox": [0, 0, 5, 5]})
        del content["annotations"][3]
        (root / "train.json").write_text(json.dumps(content))
        data = load(root, batch_size=1)
        assert len(data.images("train")) == 2, "one image has a crowd alone, one has nothing"
        assert all(len(target["boxes"]) == 1 for batch in data.train_dataloader() for target in batch.targets)
        everything = load(root, batch_size=1, keep_empty=True)
        assert sorted(len(batch.targets[0]["boxes"]) for batch in everything.train_dataloader()) == [0, 0, 1, 1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c["annotations"][1].update(image_id=99), "train.json: annotation 1: image_id 99 is not in the file"),
            (lambda c: c["annotations"][1].update(category_id=99), "annotation 1: category_id 99"),
            (lambda c: c["annotations"][1].update(id=0), "train.json: annotations with the same id: 0"),
            (lambda c: c["images"][1].update(id=10), "train.json: images with the same id: 10"),
            (lambda c: c["categories"][1].update(id=7), "train.json: categories with the same id: 7"),
            (lambda c: c.pop("categories"), "not in COCO's format: KeyError"),
            (lambda c: c["annotations"][1].pop("bbox"), r"annotation 1: KeyError\('bbox'\)"),
            (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"annotation 1: bbox \[1, 2, 3\] is not x, y, width and height"),
            (lambda c: c["annotations"][1].update(bbox=["a", 2, 3, 4]), "annotation 1: could not convert string to float"),
            (lambda c: c["annotations"][1].update(bbox=[1, 2, float("nan"), 4]), "annotation 1: bbox .* is not finite"),
            (lambda c: c["images"][1].update(width="wide"), "image 11 has 'wide'x40 pixels"),
            (lambda c: c["images"][1].pop("file_name"), "not in COCO's format: KeyError"),
            (
                lambda c: c["annotations"][1].update(segmentation=dict(size=[40, 60], counts=[20, 10])),
                "annotation 1: a run-length code of 30",
            ),
            (lambda c: c["annotations"][1].update(segmentation=dict(size=[40, 60])), r"annotation 1: KeyError\('counts'\)"),
            (lambda c: c["annotations"][1].update(segmentation=[["a"] * 6]), "annotation 1: a polygon of what are no numbers"),
            (
                lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]),
                "annotation 0: no mask: polygons must have",
            ),
            (lambda c: c["categories"].append(dict(id=9, name="wasp")), "has the classes"),
        ],
    )
    def test_annotations_that_contradict_themselves(self, root, change, message):
        content = coco(root)
        change(content)
        (root / "train.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load(root, masks=True)

    def test_a_code_that_cannot_be_decoded(self, root):
        """It is passed over like a damaged image."""
        content = coco(root, "val")
        content["annotations"][0]["segmentation"] = dict(size=[40, 60], counts="~~~~")
        (root / "val.json").write_text(json.dumps(content))
        first = next(iter(load(root, masks=True).val_dataloader()))
        assert "0.png: its masks cannot be decoded" in first.damaged[0]

    def test_a_split_without_images(self, root):
        coco(root, "val", images=[], annotations=[])
        with pytest.raises(ValueError, match="the split val has no images"):
            load(root)

    def test_files_that_are_missing(self, root):
        (root / "train" / "2.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"train.json: 1 of 4 images are missing, such as .*train/2.png"):
            load(root)
        (root / "train.json").write_text("{")
        with pytest.raises(ValueError, match=r"train\.json is not JSON"):
            load(root)
        (root / "train.json").unlink()
        with pytest.raises(FileNotFoundError, match="no annotations at"):
            load(root)

    def test_boxes_that_are_none(self, root):
        content = coco(root)
        for row, box in zip(content["annotations"], ([5, 5, 0, 8], [5, 5, 4, -3], [70, 5, 9, 9], [55, 30, 20, 20]), strict=True):
            row["bbox"] = box
        content["categories"].pop(0), content["annotations"][1].update(category_id=3), content["annotations"][3].update(category_id=3)
        (root / "train.json").write_text(json.dumps(content))
        (root / "val.json").write_text(json.dumps(content))
        with pytest.warns(UserWarning, match=r"train.json: left out 3 boxes .*: 0.png: \(5, 5, 5, 13\) in 60x40 pixels"):
            data = load(root)
        target = data.images("train").read(0)[1]
        assert target["boxes"].tolist() == [[55, 30, 60, 40]], "cut off at the borders"

    def test_a_class_without_a_box(self, root):
        content = coco(root)
        content["annotations"] = content["annotations"][:1]
        (root / "train.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="no box to train on of bee"):
            load(root)

    def test_an_image_of_another_size(self, root):
        Image.new("RGB", (40, 60)).save(root / "val" / "0.png")
        first = next(iter(load(root).val_dataloader()))
        assert "the image has 40x60 pixels, its boxes are for 60x40" in first.damaged[0]
        assert first.targets[0] is None


XML = """<annotation><filename>{name}.jpg</filename><size><width>60</width><height>40</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>60</xmax><ymax>20</ymax></bndbox></object>
<object><name>dog</name><difficult>1</difficult><bndbox><xmin>11</xmin><ymin>6</ymin><xmax>20</xmax><ymax>10</ymax></bndbox></object>
<object><name>dog</name><bndbox><xmin>21</xmin><ymin>6</ymin><xmax>30</xmax><ymax>10</ymax></bndbox></object></annotation>"""


class TestVoc:
    @pytest.fixture
    def root(self, tmp_path):
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (tmp_path / folder).mkdir(parents=True)
        for split in ("train", "val"):
            (tmp_path / f"ImageSets/Main/{split}.txt").write_text(f"{split}1\n")
            (tmp_path / f"Annotations/{split}1.xml").write_text(XML.format(name=split))
            Image.new("RGB", SIZE).save(tmp_path / f"JPEGImages/{split}1.jpg")
        return tmp_path

    def test_boxes(self, root):
        data = VocData(root, num_workers=0)
        assert (data.class_names, list(data.splits)) == (["cat", "dog"], ["train", "val"])
        target = data.images("val").read(0)[1]
        assert target["boxes"].tolist() == [[0, 0, 60, 20], [10, 5, 20, 10], [20, 5, 30, 10]], "pixels count from 1"
        assert target["labels"].tolist() == [0, 1, 1]
        assert target["crowd"].tolist() == [False, True, False]
        assert target["area"].tolist() == [1200, 50, 50]

    def test_names_with_spaces_and_sizes_with_points(self, root):
        for old, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
            (root / old / f"val1{suffix}").rename(root / old / f"val 1{suffix}")
        xml = root / "Annotations/val 1.xml"
        xml.write_text(xml.read_text().replace("<width>60<", "<width>60.0<"))
        (root / "ImageSets/Main/val.txt").write_text("val 1\n\n")
        assert VocData(root, num_workers=0).images("val").read(0)[0].size == (60, 40)

    def test_annotations_that_will_not_do(self, root):
        (root / "Annotations/val1.xml").write_text("<annotation>")
        with pytest.raises(ValueError, match=r"val1.xml is not XML"):
            VocData(root)
        (root / "Annotations/val1.xml").write_text("<annotation></annotation>")
        with pytest.raises(ValueError, match=r"val1.jpg: the annotation has no size/width"):
            VocData(root)
        for now, message in [("<xmin></xmin>", "bndbox/xmin is ''"), ("<xmin>left</xmin>", "xmin is 'left', not a number")]:
            (root / "Annotations/val1.xml").write_text(XML.format(name="val").replace("<xmin>21</xmin>", now))
            with pytest.raises(ValueError, match=rf"val1.jpg: the annotation's .*{message}"):
                VocData(root)
        (root / "Annotations/val1.xml").unlink()
        with pytest.raises(FileNotFoundError, match=r"no annotation at .*val1.xml"):
            VocData(root)
        (root / "ImageSets/Main/val.txt").write_text("train1\ntrain1\n")
        with pytest.raises(ValueError, match=r"val.txt: images with the same id: train1"):
            VocData(root)
        (root / "ImageSets/Main/val.txt").unlink()
        with pytest.raises(FileNotFoundError, match="no list of images at"):
            VocData(root)


def test_bundled_fields():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = BloodCellBoxes()
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 100, "val": 30, "test": 30}
    assert data.class_names == ["platelet", "rbc", "wbc"]
    for split in data.splits:
        for index in range(0, len(data.images(split)), 20):
            image, target = data.images(split).read(index)
            assert image.size == (320, 240)
            assert len(target["boxes"]) > 0


class TestGroups:
    def test_batches_are_of_one_group(self):
        groups = [index % 3 == 0 for index in range(40)]  # 14 and 26
        sampler = TrainingSampler(40, 4, seed=0, groups=groups)
        batches = torch.tensor([draw.image for draw in sampler]).view(-1, 4)
        assert len(batches) == sampler.batches == 10
        assert len(set(batches.flatten().tolist())) == 40
        mixed = [len({groups[index] for index in batch}) == 2 for batch in batches.tolist()]
        assert sum(mixed) == 1, "14 = 3 * 4 + 2 and 26 = 6 * 4 + 2: the rest share a batch"
        kinds = [groups[batch[0]] for batch in batches.tolist()]
        assert kinds not in (sorted(kinds), sorted(kinds, reverse=True)), "in a random order"

    def test_processes_share_batches(self):
        groups = [index % 2 for index in range(24)]
        parts = [torch.tensor([draw.image for draw in TrainingSampler(24, 2, 5, rank, 2, groups)]).view(-1, 2) for rank in range(2)]
        whole = torch.tensor([draw.image for draw in TrainingSampler(24, 4, 5, 0, 1, groups)]).view(-1, 4)
        assert torch.equal(torch.cat(parts, dim=1), whole)
