"""The bundled sample: what it holds, that its splits share no image, and what a linear classifier makes of it."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image

from debiformer.data.blood_cells import BloodCells, linear_baseline, whole_images

SAMPLE = Path(str(files("debiformer.data"))) / "blood_cells"
COUNTS = {"train": (209, 1172, 214), "val": (81, 484, 86), "test": (69, 408, 71)}


@pytest.fixture(scope="module")
def cells():
    return BloodCells()


def test_counts(cells):
    assert cells.class_names == ["platelet", "rbc", "wbc"]
    for split, counts in COUNTS.items():
        assert tuple(torch.bincount(torch.tensor(cells.images(split).targets)).tolist()) == counts


def test_no_image_gives_crops_to_two_splits():
    sources = {split: {file.stem.rpartition("_")[0] for file in (SAMPLE / split).rglob("*.jpg")} for split in COUNTS}
    assert [len(names) for names in sources.values()] == [205, 86, 72]
    assert len(set.union(*sources.values())) == 205 + 86 + 72
    assert {path.stem for path, _ in whole_images()} <= sources["test"]


def test_no_crop_appears_twice():
    crops = [file.read_bytes() for split in COUNTS for file in (SAMPLE / split).rglob("*.jpg")]
    assert len(set(crops)) == len(crops)


def test_the_sample_is_small_and_licensed():
    assert sum(file.stat().st_size for file in SAMPLE.rglob("*") if file.is_file()) < 5_000_000
    assert (SAMPLE / "LICENSE").read_text().startswith("MIT License")
    sizes = {Image.open(file).size for split in COUNTS for file in (SAMPLE / split).rglob("*.jpg")}
    assert sizes == {(80, 80)}


def test_batches(cells):
    batch = next(iter(cells.train_dataloader()))
    assert batch.images.shape == (64, 3, 64, 64)
    assert set(batch.targets.tolist()) <= {0, 1, 2}
    assert sum(len(batch.targets) for batch in cells.test_dataloader()) == sum(COUNTS["test"])


def test_whole_images_show_their_boxes():
    """White cells are stained dark blue: inside their boxes there is less red than in the image at large."""
    images = whole_images()
    assert len(images) == 6
    for path, boxes in images:
        image = Image.open(path)
        assert image.size == (640, 480)
        assert {box.label for box in boxes} == {"platelet", "rbc", "wbc"}
        assert all(0 <= box.x0 < box.x1 <= 640 and 0 <= box.y0 < box.y1 <= 480 for box in boxes)
        red = torch.frombuffer(bytearray(image.getchannel("R").tobytes()), dtype=torch.uint8).view(480, 640).float()
        for box in boxes:
            if box.label == "wbc":
                assert red[box.y0 : box.y1, box.x0 : box.x1].mean() < red.mean()


@pytest.fixture
def single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small products on a busy machine spend their time waiting for each other's threads
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("single_thread")
def test_a_linear_classifier_is_good_but_not_perfect():
    baseline = linear_baseline()
    assert list(baseline.class_accuracy) == ["platelet", "rbc", "wbc"]
    assert baseline.balanced_accuracy == pytest.approx(sum(baseline.class_accuracy.values()) / 3)
    assert 0.95 < baseline.balanced_accuracy < 0.975
