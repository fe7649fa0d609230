import errno
import os
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, Trainer
from PIL import Image

from debiformer.data.folders import ImageFolders
from debiformer.tasks.classification import ClassificationTask


def on_the_way_to_the_model(data, batch):
    """The batch after the hooks that Lightning calls."""
    return data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


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
    assert [len(batch.targets) for batch in data.train_dataloader()] == [3, 3], "the odd images at the end are dropped"
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = list(loader)
        assert [len(batch.targets) for batch in batches] == [3, 3, 2]
        assert torch.cat([batch.targets for batch in batches]).tolist() == [0] * 5 + [1] * 3
        assert batches[0].names == [str(tmp_path / split / "ant" / f"{index}.png") for index in range(3)]
    assert batches[0].images.shape == (3, 3, 32, 48)
    assert batches[0].images.dtype == torch.uint8
    assert batches[0].targets.dtype == torch.int64
    images = on_the_way_to_the_model(data, batches[0]).images
    red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(images[0], red.view(3, 1, 1).expand(3, 32, 48))


def test_augmentations_of_the_recipes(tmp_path):
    root = make_folders(tmp_path, {"ant": 4})
    data = ImageFolders(
        root, input_size=32, batch_size=4, num_workers=0, scale=(0.5, 1.0), vflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", re_prob=1.0
    )
    batch = next(iter(data.train_dataloader()))
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.trainer.training = True
    images = on_the_way_to_the_model(data, batch).images
    assert images.shape == (4, 3, 32, 32)
    assert images.isfinite().all()
    assert (images[0] != images[1]).any()


def test_fewer_images_than_a_batch_are_not_dropped(tmp_path):
    data = ImageFolders(make_folders(tmp_path, {"ant": 2, "bee": 1}), input_size=32, batch_size=8, num_workers=0)
    assert [len(batch.targets) for batch in data.train_dataloader()] == [3]


def paths(files):
    return [Path(files.name(index)) for index in range(len(files))]


def test_class_folders_only_are_split_evenly(tmp_path):
    root = make_folders(tmp_path, {"ant": 10, "bee": 5}, splits=("",))
    first, second = (ImageFolders(root, input_size=32, num_workers=0, val_fraction=0.2) for _ in range(2))
    assert {split: len(part) for split, part in first.splits.items()} == {"train": 12, "val": 3}
    train, val = paths(first.splits["train"]), paths(first.splits["val"])
    assert set(train + val) == set(tmp_path.rglob("*.png"))
    assert val == paths(second.splits["val"])
    assert torch.cat([batch.targets for batch in first.val_dataloader()]).tolist() == [0, 0, 1]
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
def test_damaged_files_are_passed_over(tmp_path, num_workers):
    """In training the next image stands in, in evaluation nothing that counts."""
    root = make_folders(tmp_path, {"ant": 2, "bee": 1})
    torn = [root / split / "ant" / "1.png" for split in ("train", "val")]
    for file in torn:
        file.write_bytes(file.read_bytes()[:60])
    data = ImageFolders(root, input_size=32, num_workers=num_workers, batch_size=3)
    with pytest.warns(UserWarning, match=r"passed over .*ant/1\.png"):
        training, validation = (
            on_the_way_to_the_model(data, next(iter(loader))) for loader in (data.train_dataloader(), data.val_dataloader())
        )
    assert sorted(training.targets.tolist()) == [0, 1, 1]
    assert validation.targets.tolist() == [0, -1, 1]
    assert [message.split(":")[0] for message in data.state_dict()["damaged"]] == list(map(str, torn))


def test_too_many_damaged_files_stop_the_run(tmp_path):
    root = make_folders(tmp_path, {"ant": 3})
    for index in range(2):
        (root / "train" / "ant" / f"{index}.png").write_bytes(b"")
    data = ImageFolders(root, input_size=32, num_workers=0, max_damaged=1)
    with (
        pytest.warns(UserWarning, match=r"passed over .*0.png: the file is empty"),
        pytest.raises(RuntimeError, match=r"more than data.max_damaged=1 files cannot be read.*the file is empty"),
    ):
        on_the_way_to_the_model(data, next(iter(data.train_dataloader())))


def test_what_is_random_about_an_image_depends_on_epoch_and_image_alone(tmp_path):
    root = make_folders(tmp_path, {"ant": 6})
    for index, file in enumerate(sorted((root / "train" / "ant").iterdir())):
        Image.effect_noise((40, 40), 20 + index).convert("RGB").save(file)

    def epoch(number, num_workers, batch_size):
        data = ImageFolders(root, input_size=32, num_workers=num_workers, batch_size=batch_size, auto_augment="rand-m9-mstd0.5-inc1")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return {name: image for batch in loader for name, image in zip(batch.names, batch.images, strict=True)}

    first, again, other = epoch(0, 0, 2), epoch(0, 2, 3), epoch(1, 0, 2)
    assert first.keys() == again.keys() == other.keys()
    for name, image in first.items():
        assert torch.equal(image, again[name])
        assert not torch.equal(image, other[name])


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    root = make_folders(tmp_path, {"ant": 1})
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("ant"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # the tests may run as root, whom nothing is refused
    with pytest.raises(PermissionError, match=r"train/ant cannot be read by this user: Permission denied"):
        ImageFolders(root)


@pytest.mark.filterwarnings("ignore")
class TestWithATrainer:
    """What these data and Lightning's trainer must not both do."""

    def fit(self, tmp_path, **options):
        data = ImageFolders(make_folders(tmp_path, {"ant": 3, "bee": 3}), input_size=32, batch_size=2, num_workers=0)
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)
        trainer.fit(ClassificationTask("test_convnext", ["ant", "bee"]), datamodule=data)

    def test_overfitting_on_some_batches(self, tmp_path):
        with pytest.raises(ValueError, match=r"overfit_batches does not go with these data: take trainer.limit_train_batches"):
            self.fit(tmp_path, overfit_batches=2)

    def test_sharing_out_twice(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Trainer, "world_size", 2)
        with pytest.raises(ValueError, match="the Trainer needs use_distributed_sampler=False"):
            self.fit(tmp_path)
