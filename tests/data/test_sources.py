"""Data that other layouts and libraries hold: ImageNet as it is handed out, Hugging Face, timm, and tar shards."""

import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from debiformer.data import shards
from debiformer.data.hub import HuggingFaceImages, TimmImages
from debiformer.data.imagenet import ImageNet
from debiformer.data.shards import TarShards

OPTIONS = dict(input_size=32, batch_size=2, num_workers=0, color_jitter=0.0)


def picture(number):
    """An image that tells its number by its colour."""
    return Image.new("RGB", (40, 36), (number, 255 - number, 7))


def numbers(loader):
    """The number of every image of a loader, in order; None for what is not counted."""
    return [
        int(image[0, 16, 16]) if target >= 0 else None
        for batch in loader
        for image, target in zip(batch.images, batch.targets, strict=True)
    ]


class TestImageNet:
    @pytest.fixture
    def root(self, tmp_path):
        for wnid, count in (("n01", 2), ("n02", 3)):
            (tmp_path / "train" / wnid).mkdir(parents=True)
            for index in range(count):
                picture(index).save(tmp_path / "train" / wnid / f"{wnid}_{index}.JPEG")
        (tmp_path / "val").mkdir()
        for index in range(3):
            picture(index).save(tmp_path / "val" / f"ILSVRC2012_val_0000000{index + 1}.JPEG")
        return tmp_path

    @pytest.mark.parametrize(
        "text",
        [
            "ILSVRC2012_val_00000001.JPEG 1\nILSVRC2012_val_00000002.JPEG 0\nILSVRC2012_val_00000003.JPEG 1\n",
            "ImageId,PredictionString\n"
            + "".join(f"ILSVRC2012_val_0000000{line}\n" for line in ("3,n02 1 2", "2,n01 1 2", "1,n02 5 6 n02 1 2")),
        ],
    )
    def test_lists(self, root, text):
        (root / "list.txt").write_text(text)
        data = ImageNet(root, root / "list.txt", **OPTIONS)
        assert data.class_names == ["n01", "n02"]
        assert torch.cat([batch.targets for batch in data.val_dataloader()]).tolist() == [1, 0, 1]
        assert sum(len(batch.targets) for batch in data.train_dataloader()) == 4
        with pytest.raises(ValueError, match="use val"):
            data.test_dataloader()

    def test_devkit(self, root):
        savemat = pytest.importorskip("scipy.io").savemat
        folder = root / "ILSVRC2012_devkit_t12" / "data"
        folder.mkdir(parents=True)
        synsets = np.array([(1, "n02", "b"), (2, "n01", "a")], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O")])
        savemat(folder / "meta.mat", {"synsets": synsets})
        (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n1\n")
        data = ImageNet(root, folder.parent, **OPTIONS)
        assert torch.cat([batch.targets for batch in data.val_dataloader()]).tolist() == [1, 0, 1]

        (root / "val" / "z").mkdir()  # an image that comes first by number and last by path
        (root / "val" / "ILSVRC2012_val_00000002.JPEG").rename(root / "val" / "z" / "ILSVRC2012_val_00000002.JPEG")
        batches = list(ImageNet(root, folder.parent, **OPTIONS).val_dataloader())
        found = {Path(name).stem[-1]: target for batch in batches for name, target in zip(batch.names, batch.targets.tolist(), strict=True)}
        assert found == {"1": 1, "2": 0, "3": 1}
        (root / "val" / "ILSVRC2012_val_00000003.JPEG").rename(root / "val" / "cat.JPEG")
        with pytest.raises(ValueError, match=r"cat.JPEG has no number from 1 to 3 in its name"):
            ImageNet(root, folder.parent, **OPTIONS)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("ILSVRC2012_val_00000001.JPEG 1\n", r"leaves out 2 of 3 validation images, the first ILSVRC2012_val_00000002"),
            ("ILSVRC2012_val_00000001.JPEG 2\n", r"line 1: '2' is neither a class of root/train nor an index below 2"),
            ("ILSVRC2012_val_00000001.JPEG n03\n", r"line 1: 'n03' is neither"),
        ],
    )
    def test_a_list_that_will_not_do(self, root, text, message):
        (root / "list.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            ImageNet(root, root / "list.txt", **OPTIONS)


class TestHuggingFace:
    @pytest.fixture
    def saved(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee"]))

        def part(count):
            return datasets.Dataset.from_dict(
                {"image": [picture(i) for i in range(count)], "label": [i % 2 for i in range(count)]}, features
            )

        datasets.DatasetDict(train=part(4), validation=part(3)).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    def test_a_saved_data_set(self, saved):
        data = HuggingFaceImages(saved, **OPTIONS)
        assert data.class_names == ["ant", "bee"]
        assert sorted(numbers(data.train_dataloader())) == [0, 1, 2, 3]
        assert numbers(data.val_dataloader()) == [0, 1, 2]
        assert next(iter(data.val_dataloader())).names[0] == f"{saved}, validation, row 0"

    @pytest.mark.parametrize("wrong", [{"val_split": "dev"}, {"image_column": "img"}, {"label_column": "image"}])
    def test_names_that_it_lacks(self, saved, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            HuggingFaceImages(saved, **wrong, **OPTIONS)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [([0, 1, -1], "labels -1 are none of the 2 classes"), ([0, None, 1], "labels None"), ([0, 0, 0], "split train: no images of bee")],
    )
    def test_labels_that_will_not_do(self, tmp_path, labels, message):
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee"]))
        part = datasets.Dataset.from_dict({"image": [picture(i) for i in range(3)], "label": labels}, features)
        datasets.DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "saved")
        with pytest.raises(ValueError, match=message):
            HuggingFaceImages(str(tmp_path / "saved"), **OPTIONS)


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(number):
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


class TestTimm:
    def test_a_tar_file_of_class_folders(self, tmp_path):
        for split, count in (("train", 4), ("val", 3)):
            write_tar(tmp_path / f"{split}.tar", {f"{'ab'[i % 2]}/{i}.png": png(i) for i in range(count)})
        data = TimmImages(tmp_path / "train.tar", tmp_path / "val.tar", **OPTIONS)
        assert data.class_names == ["a", "b"]
        assert sorted(numbers(data.train_dataloader())) == [0, 1, 2, 3]
        assert sorted(numbers(data.val_dataloader())) == [0, 1, 2]

    def test_other_classes_in_the_other_split(self, tmp_path):
        for split, classes in (("train", "ab"), ("val", "ac")):
            write_tar(tmp_path / f"{split}.tar", {f"{name}/0.png": png(0) for name in classes})
        with pytest.raises(ValueError, match="b, c is in one only"):
            TimmImages(tmp_path / "train.tar", tmp_path / "val.tar", **OPTIONS)


class TestShards:
    SHARDS, EACH = 4, 6

    @pytest.fixture
    def folder(self, tmp_path):
        pytest.importorskip("webdataset")
        for split in ("train", "val"):
            for shard in range(self.SHARDS):
                files = {}
                for index in range(self.EACH):
                    number = shard * self.EACH + index
                    files |= {f"{number:04}.png": png(number), f"{number:04}.cls": str(number % 2).encode()}
                write_tar(tmp_path / f"{split}-{shard}.tar", files)
        return tmp_path

    def open(self, where, **options):
        images = self.SHARDS * self.EACH
        shards = {split: f"{where}/{split}-{{0..{self.SHARDS - 1}}}.tar" for split in ("train", "val")}
        given = dict(train_images=images, val_images=images, class_names=["even", "odd"], block=4, scale=(1.0, 1.0), ratio=(1.0, 1.0))
        return TarShards(**OPTIONS | shards | given | options)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_an_epoch(self, folder, num_workers):
        data = self.open(folder, num_workers=num_workers)
        loader = data.train_dataloader()
        first, second = numbers(loader), numbers(loader)
        assert sorted(first) == sorted(second) == list(range(24))
        assert first != second
        assert numbers(self.open(folder, num_workers=num_workers).train_dataloader()) == first
        assert [n for n in numbers(data.val_dataloader()) if n is not None] != []
        assert sorted(n for n in numbers(data.val_dataloader()) if n is not None) == list(range(24))

    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("done", [1, 5, 11, 12, 17])
    def test_going_on_gives_what_was_left(self, folder, num_workers, done, monkeypatch):
        def batches(data, epochs):
            loader = data.train_dataloader()
            return [(batch.names, batch.images) for _ in range(epochs) for batch in loader]

        whole = batches(self.open(folder, num_workers=num_workers), 2)
        data = self.open(folder, num_workers=num_workers)
        monkeypatch.setattr(data, "batches_done", lambda: done)
        rest = batches(data, 2 - done // 12)
        assert len(rest) == len(whole) - done
        for (names, images), (names_then, images_then) in zip(rest, whole[done:], strict=True):
            assert names == names_then
            assert torch.equal(images, images_then), "augmented alike"

    def test_two_processes_see_disjoint_images_that_cover_the_set(self, folder, monkeypatch):
        found = {"train": [], "val": []}
        for rank in range(2):
            data = self.open(folder, num_workers=2)
            monkeypatch.setattr(data, "process", lambda rank=rank: (rank, 2))
            found["train"] += numbers(data.train_dataloader())
            found["val"] += [n for n in numbers(data.val_dataloader()) if n is not None]
        assert sorted(found["train"]) == sorted(found["val"]) == list(range(24))

    def test_over_http(self, folder):
        handler = partial(SimpleHTTPRequestHandler, directory=folder)
        handler.log_message = lambda *args: None
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            data = self.open(f"http://127.0.0.1:{server.server_port}")
            assert sorted(numbers(data.train_dataloader())) == list(range(24))
            server.shutdown()

    def test_a_damaged_image_and_a_torn_shard(self, folder):
        files = {f"{n:04}.{suffix}": content for n in range(6) for suffix, content in (("png", png(n)), ("cls", b"0"))}
        write_tar(folder / "train-0.tar", files | {"0002.png": b"not a picture"})
        torn = folder / "train-1.tar"
        torn.write_bytes(torn.read_bytes()[:3000])
        batches = list(self.open(folder).train_dataloader())
        assert len(batches) == 12, "the epoch keeps its length"
        messages = " ".join(message for batch in batches for message in batch.damaged)
        assert "train-0.tar: 0002: not an image" in messages
        assert "train-1.tar" in messages

    def test_a_shard_that_is_not_there_stops_the_run(self, folder, monkeypatch):
        """More than a damaged image: it may be the network, and thousands of images would be left out."""
        monkeypatch.setattr(shards, "PAUSES", (0, 0))
        data = self.open(folder)
        (folder / "train-1.tar").unlink()
        with pytest.raises(OSError, match=r"train-1.tar cannot be opened, in 2 attempts: .*No such file"):
            list(data.train_dataloader())

    def test_a_shard_is_tried_again(self, folder, monkeypatch):
        data, shard = self.open(folder), folder / "train-1.tar"
        hidden = shard.rename(folder / "hidden")
        monkeypatch.setattr(shards.time, "sleep", lambda seconds: seconds and hidden.exists() and hidden.rename(shard))
        assert sorted(numbers(data.train_dataloader())) == list(range(24))

    def test_what_will_not_do(self, folder):
        with pytest.raises(ValueError, match=r"give data.val the shards to test on"):
            self.open(folder).test_dataloader()
        with pytest.raises(FileNotFoundError, match=r"train: no such shard: .*train-4\.tar"):
            self.open(folder, train=f"{folder}/train-{{0..4}}.tar")
        with pytest.raises(ValueError, match="4 shards cannot be spread over 5 processes"):
            self.open(folder, num_workers=5).train_dataloader()
        with pytest.raises(ValueError, match=r"0001: the target '1' is not one of the 1 classes"):
            list(self.open(folder, class_names=["only"]).val_dataloader())
        with pytest.raises(ValueError, match=r"val_images=30, but .* hold 24 images"):
            list(self.open(folder, val_images=30).val_dataloader())
