"""Segmentation and detection from the command line, on the bundled fields of blood cells: recipes, evaluation, prediction, a killed run."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import debiformer
from debiformer.cli import main
from debiformer.cli.training import known_recipes, task_of
from debiformer.data.blood_cells import SAMPLE
from debiformer.data.images import read_image
from debiformer.data.masks import read_classes
from debiformer.models.backbone import Backbone
from debiformer.models.detector import Detector
from debiformer.models.segmentation_inference import Inference, segment
from debiformer.models.segmenter import Segmenter
from debiformer.tasks.detection import DetectionTask
from debiformer.tasks.prediction import load_task
from debiformer.tasks.segmentation import SegmentationTask

FIELDS = SAMPLE / "fields"
RECIPES = [name for name, file in known_recipes().items() if task_of([file]) != "classification"]
QUICK = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
FEW = "{rpn_post_nms_top_n_train: 50, rpn_post_nms_top_n_test: 50, box_batch_size_per_image: 16, box_detections_per_img: 20}"
NANO = ["--model.backbone", "debiformer_nano", "--model.drop_path_rate", 0.1]


def mask_of(boxes, size, first):
    """A stand-in for a mask: boxes filled with their class, later ones on top."""
    mask = np.zeros(size[::-1], dtype=np.uint8) + (0 if first else 11)
    for (x, y, w, h), label in boxes:
        mask[round(y) : round(y + h), round(x) : round(x + w)] = label + first
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The first fields of each list, laid out as ADE20K, CamVid and COCO have their images."""
    work = tmp_path_factory.mktemp("work")
    for split, count in {"train": 6, "val": 3, "test": 2}.items():
        content = json.loads((FIELDS / f"{split}.json").read_text())
        images = content["images"][:count]
        rows = [row for row in content["annotations"] if row["image_id"] <= count]
        for image in images:
            of_image = [(row["bbox"], row["category_id"] - 1) for row in rows if row["image_id"] == image["id"]]
            file = FIELDS / split / image["file_name"]
            for layout, folder, first in (("ade", {"train": "training", "val": "validation"}.get(split), 1), ("camvid", split, 0)):
                if folder:
                    (work / layout / "images" / folder).mkdir(parents=True, exist_ok=True)
                    (work / layout / "annotations" / folder).mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, work / layout / "images" / folder)
                    mask = mask_of(of_image, (320, 240), first)
                    mask.save(work / layout / "annotations" / folder / f"{file.stem}.png")
            (work / "coco" / f"{split}2017").mkdir(parents=True, exist_ok=True)
            shutil.copy(file, work / "coco" / f"{split}2017")
        for row in rows:
            x, y, w, h = row["bbox"]
            row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        (work / "coco" / "annotations").mkdir(exist_ok=True)
        made = json.dumps(content | dict(images=images, annotations=rows))
        (work / "coco" / "annotations" / f"instances_{split}2017.json").write_text(made)
    return work


@pytest.fixture
def inside(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(recipe, inside, tmp_path):
    """Two updates and a validation, with nothing changed but the backbone, sizes, files and the length of the run."""
    family = recipe.split("/")[0]
    root = {"ade20k": ["--data.root", "ade"], "camvid": ["--data.root", "camvid"], "coco": ["--data.root", "coco"]}.get(family, [])
    small = ["--data.batch_size", 2, "--data.num_workers", 0, "--trainer.precision", "32-true", "--model.warmup_steps", 1]
    if family in ("ade20k", "camvid"):
        small += ["--data.crop_size", 64, "--data.short_side", 64]
        small += [] if family == "camvid" else ["--trainer.val_check_interval", 1, "--trainer.sync_batchnorm", "false"]
    else:
        small += ["--model.short_side", 96, "--model.long_side", 128]
    if "mask_rcnn" in recipe:
        small += ["--model.detector_args", FEW]
    length = ["--trainer.max_steps", 2, "--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 1]
    length += ["--trainer.num_sanity_val_steps", 0, "--trainer.log_every_n_steps", 1, "--trainer.default_root_dir", tmp_path]
    length += ["--trainer.check_val_every_n_epoch", 1] if family in ("camvid", "bloodcells") else []
    assert main(["fit", *map(str, ["--config", recipe, *root, *NANO, *small, *length, *QUICK])]) == 0
    (run,) = tmp_path.iterdir()
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert last["task"] == ("segmentation" if family in ("ade20k", "camvid") else "detection")
    losses = [float(row["train/loss"]) for row in csv.DictReader((run / "csv/version_0/metrics.csv").open()) if row["train/loss"]]
    assert len(losses) == 2
    assert all(0 < loss < math.inf for loss in losses)
    assert (run / "checkpoints/best.ckpt").is_file()


SEGMENT = """
seed_everything: 0
task: segmentation
data:
  class_path: debiformer.data.segmentation.CamVid
  init_args: {root: camvid, crop_size: 64, short_side: 96, batch_size: 2, num_workers: 0}
model: {backbone: test_convnext, head_args: {channels: 16, pyramid_channels: 16}, lr: 0.003, schedule: cosine}
trainer: {max_epochs: 4, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, log_every_n_steps: 1}
"""
DETECT = """
seed_everything: 0
task: detection
data:
  class_path: debiformer.data.coco.CocoData
  init_args: {root: coco, masks: true, batch_size: 2, num_workers: 0}
model:
  backbone: test_convnext
  detector: mask_rcnn
  detector_args: {rpn_post_nms_top_n_train: 50, rpn_post_nms_top_n_test: 50, box_batch_size_per_image: 16, box_detections_per_img: 20}
  pyramid_channels: 16
  short_side: 120
  long_side: 160
  lr: 0.003
  schedule: cosine
trainer: {max_epochs: 4, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, log_every_n_steps: 1}
"""


@pytest.fixture(scope="module")
def runs(work):
    """A run of each task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for name, text in {"segment": SEGMENT, "detect": DETECT}.items():
            Path(f"{name}.yaml").write_text(text)
            assert main(["fit", "--config", f"{name}.yaml"]) == 0
    return work / "runs"


SEGMENTER, DETECTOR = (Path(f"runs/{name}/checkpoints/best.ckpt") for name in ("segment", "detect"))


def pixels_of(task, file):
    image = torch.from_numpy(np.array(read_image(file))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(task.hparams[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (image - mean) / std


class TestSegmentation:
    def test_evaluation(self, inside, runs, capsys):
        assert main(["test", "--ckpt_path", str(SEGMENTER), "--pictures", "1"]) == 0
        out = capsys.readouterr().out
        record = json.loads(Path("runs/segment/evaluation/test/metrics.json").read_text())
        task = load_task(SegmentationTask, SEGMENTER)
        assert task.inference == Inference(short_side=96, long_side=2048), "as the data has it"
        files = sorted(Path("camvid/images/test").iterdir())
        found = np.concatenate([task.segment(pixels_of(task, file)).numpy().ravel() for file in files])
        masks = np.concatenate([np.array(Image.open(f"camvid/annotations/test/{file.stem}.png")).ravel() for file in files])
        counted = masks != 11
        names = read_classes("camvid").names
        for score in record["classes"]:
            label = names.index(score["name"])
            both, either = ((found == label) & (masks == label))[counted].sum(), ((found == label) | (masks == label))[counted].sum()
            assert score["iou"] == (pytest.approx(both / either, abs=1e-3) if either else None)
        assert record["scores"]["aacc"] == pytest.approx((found == masks)[counted].mean(), abs=1e-3)
        assert f"{record['scores']['miou']:.4f}" in out
        (picture,) = Path("runs/segment/evaluation/test/pictures").iterdir()
        assert Image.open(picture).size == (960, 240)

    def test_evaluation_in_another_way(self, inside, runs, tmp_path):
        ways = ["--model.scales", "[0.5, 1.0]", "--model.flip", "true", "--model.window", "64"]
        ways += ["--model.head_args", "{channels: 16, pyramid_channels: 32}"]
        with pytest.warns(UserWarning, match=r"--model\.\w+ is left as it is") as told:
            assert main(["validate", "--ckpt_path", str(SEGMENTER), *ways, "--output", str(tmp_path)]) == 0
        kept = [str(warning.message).split()[0] for warning in told if "is left as it is" in str(warning.message)]
        assert kept == ["--model.head_args"], "and not head too"
        record = json.loads((tmp_path / "metrics.json").read_text())
        expected = dict(short_side=96, long_side=2048, window=64, stride=None, scales=[0.5, 1.0], flip=True)
        assert record["inference"] == expected
        assert 0 < record["scores"]["miou"] < 1

    def test_prediction(self, inside, runs, tmp_path, capsys):
        shutil.copytree("camvid/images/test", tmp_path / "in/nested")
        (tmp_path / "in/broken.jpg").write_bytes(b"nothing")
        line = ["predict", "--checkpoint", str(SEGMENTER), str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--draw"]
        assert main(line) == 0
        output = capsys.readouterr()
        assert "broken.jpg: not an image" in " ".join(output.err.split())
        assert "1 of 3 files could not be read" in output.err
        task = load_task(SegmentationTask, SEGMENTER)
        for file in Path("camvid/images/test").iterdir():
            with Image.open(tmp_path / f"out/masks/nested/{file.stem}.png") as mask:
                assert (np.asarray(mask) == task.segment(pixels_of(task, file)).numpy()).mean() > 0.999
                assert mask.getpalette()[:6] == [128, 128, 128, 128, 0, 0], "sky and building"
            assert Image.open(tmp_path / f"out/pictures/nested/{file.stem}.jpg").size == (320, 240)
        assert main([*line, "--short-side", "0", "--window", "100", "--stride", "80"]) == 0
        windows = segment(task.model, pixels_of(task, file), Inference(window=100, stride=80))
        with Image.open(tmp_path / f"out/masks/nested/{file.stem}.png") as mask:
            assert (np.asarray(mask) == windows.numpy()).mean() > 0.999

    def test_names_with_dots(self, inside, runs, tmp_path):
        for name in ("photo.1.jpg", "photo.2.jpg"):
            Image.new("RGB", (40, 30)).save(tmp_path / name)
        line = ["predict", "--checkpoint", str(SEGMENTER), str(tmp_path), "--output", str(tmp_path / "out"), "--draw", "--window", "0"]
        assert main(line) == 0
        written = sorted(file.name for file in (tmp_path / "out").glob("*/*"))
        assert written == ["photo.1.jpg", "photo.1.png", "photo.2.jpg", "photo.2.png"]

    def test_a_run_begins_with_the_weights_of_another(self, inside, runs, tmp_path):
        """All of them in Python; from the command line the backbone, whatever the classes."""
        task = load_task(SegmentationTask, SEGMENTER)
        other = Segmenter("test_convnext", "semantic_fpn", 11, head_args=task.hparams["head_args"])
        debiformer.load_published(SEGMENTER, other)
        assert all(torch.equal(value, task.model.state_dict()[key]) for key, value in other.state_dict().items())
        backbone = Backbone("test_convnext", pretrained=str(SEGMENTER)).state_dict()
        assert all(torch.equal(value, task.model.backbone.state_dict()[key]) for key, value in backbone.items())
        with pytest.raises(ValueError, match=r"does not fit this Segmenter.*\n(.*\n)*.*head\.classifier"):
            debiformer.load_published(SEGMENTER, Segmenter("test_convnext", "semantic_fpn", 5, head_args=task.hparams["head_args"]))

    def test_damaged_images_are_passed_over_and_not_drawn(self, inside, runs, tmp_path):
        shutil.copytree("camvid", tmp_path / "camvid")
        first, *others = sorted((tmp_path / "camvid/images/val").iterdir())
        first.write_bytes(b"nothing")
        line = ["validate", "--ckpt_path", str(SEGMENTER), "--data.root", str(tmp_path / "camvid"), "--output", str(tmp_path / "out")]
        assert main(line) == 0
        assert len(list((tmp_path / "out/pictures").iterdir())) == len(others)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_number_outside_the_classes(self, inside, runs, tmp_path, capsys, workers):
        """One line, also from a process that loads images."""
        shutil.copytree("camvid", tmp_path / "camvid")
        for file in (tmp_path / "camvid/annotations/train").iterdir():
            Image.fromarray(np.full((240, 320), 200, dtype=np.uint8)).save(file)
        line = ["fit", "--config", "segment.yaml", "--data.root", str(tmp_path / "camvid"), "--data.num_workers", str(workers)]
        assert main([*line, "--trainer.default_root_dir", str(tmp_path)]) == 2
        (said,) = (text for text in capsys.readouterr().err.splitlines() if "error:" in text)
        assert "the mask has the class 200, but the 11 classes are 0 to 10, and 11 is ignored" in said

    def test_mistakes(self, inside, runs, tmp_path, capsys):
        def error(*line):
            assert main(list(map(str, line))) == 2
            return capsys.readouterr().err

        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            Image.new("RGB", (32, 32)).save(tmp_path / folder / "same.png")
        line = ["predict", "--checkpoint", SEGMENTER, "--output", tmp_path / "out"]
        assert "a/same.png and" in (message := error(*line, tmp_path / "a", tmp_path / "b"))
        assert "would have the same output, same: predict them apart" in message
        assert "stride=80 is for windows: set window too" in error(*line, tmp_path / "a", "--stride", 80)
        assert "stride=80 leaves gaps" in error(*line, tmp_path / "a", "--stride", 80, "--window", 64)
        assert "the folder /proc/out cannot be written" in error(*line[:-1], "/proc/out", tmp_path / "a")
        detector = error("test", "--ckpt_path", DETECTOR, "--config", "segment.yaml")
        assert f"checkpoint {DETECTOR} is of a detection run, not of segmentation" in detector
        assert "is of a segmentation run, not of classification" in error("share", SEGMENTER, tmp_path / "shared")
        Path("odd.yaml").write_text(SEGMENT.replace("segmentation\n", "segmenting\n", 1))
        message = "task='segmenting' in --config odd.yaml is none of classification, segmentation, detection"
        assert message in error("fit", "--config", "odd.yaml")
        (tmp_path / "nothing").mkdir()
        (tmp_path / "nothing" / "x.png").touch()
        assert main([*map(str, line), str(tmp_path / "nothing")]) == 1, "not one image could be read"


class TestDetection:
    def test_masks_that_are_left_out(self, inside, tmp_path, capsys):
        Path("bare.yaml").write_text(DETECT.replace("masks: true", "masks: false"))
        assert main(["fit", "--config", "bare.yaml", "--trainer.default_root_dir", str(tmp_path)]) == 2
        assert "detector=mask_rcnn learns from masks, and data.masks=False leaves them out" in capsys.readouterr().err

    def test_a_run_begins_with_the_weights_of_another(self, inside, runs):
        task = load_task(DetectionTask, DETECTOR)
        other = Detector("mask_rcnn", "test_convnext", 3, pyramid_channels=16)
        debiformer.load_published(DETECTOR, other)
        assert all(torch.equal(value, task.model.state_dict()[key]) for key, value in other.state_dict().items())

    def test_evaluation(self, inside, runs, capsys):
        assert main(["test", "--ckpt_path", str(DETECTOR), "--pictures", "1", "--min_score", "0.01"]) == 0
        out = capsys.readouterr().out
        record = json.loads(Path("runs/detect/evaluation/test/metrics.json").read_text())
        assert {"map", "ap50", "mask_map", "mask_ap_small"} <= record["scores"].keys()
        assert [score["name"] for score in record["classes"]] == ["platelet", "rbc", "wbc"]
        assert "AP50" in out
        (picture,) = Path("runs/detect/evaluation/test/pictures").iterdir()
        assert Image.open(picture).size == (640, 240)

    def test_prediction(self, inside, runs, tmp_path):
        folder = Path("coco/test2017")
        line = ["predict", "--checkpoint", str(DETECTOR), str(folder), "--output", str(tmp_path), "--draw", "--min-score", "0.05"]
        assert main(line) == 0
        found = COCO(str(tmp_path / "detections.json"))
        task = load_task(DetectionTask, DETECTOR)
        assert [category["name"] for category in found.loadCats(found.getCatIds())] == ["platelet", "rbc", "wbc"]
        assert len(found.imgs) == 2
        for number, image in found.imgs.items():
            with torch.inference_mode():
                (expected,) = task([pixels_of(task, image["file_name"])])
            kept = expected["scores"] >= 0.05
            rows = found.loadAnns(found.getAnnIds(imgIds=number))
            assert len(rows) == int(kept.sum()) > 0
            boxes = np.array([row["bbox"] for row in rows])
            boxes[:, 2:] += boxes[:, :2]
            np.testing.assert_allclose(boxes, expected["boxes"][kept].numpy(), atol=0.1)
            assert [row["category_id"] - 1 for row in rows] == expected["labels"][kept].tolist()
            mask = found.annToMask(rows[0])
            assert mask.shape == (240, 320)
            assert (mask == (expected["masks"][kept][0, 0] > 0.5).numpy()).mean() > 0.99
            assert Image.open(tmp_path / "pictures" / Path(image["file_name"]).with_suffix(".jpg").name).size == (320, 240)

    def test_a_killed_run_goes_on_to_the_same_weights(self, inside, tmp_path):
        """With images grouped by shape, flips, stochastic depth and two loading processes."""
        text = DETECT.replace("test_convnext", "debiformer_nano").replace("num_workers: 0", "num_workers: 2").replace("masks: true, ", "")
        text = re.sub("detector: mask_rcnn\n  detector_args: .*", "detector: retinanet", text).replace("max_epochs: 4", "max_epochs: 3")
        text = text.replace("short_side: 120\n  long_side: 160", "short_side: 64\n  long_side: 96\n  drop_path_rate: 0.2")
        weights = []
        for kills in (0, 2):
            folder = tmp_path / str(kills)
            folder.mkdir()
            (folder / "coco").symlink_to(inside / "coco")
            (folder / "recipe.yaml").write_text(text + "checkpoint_minutes: 0\n")
            script = Path(__file__).with_name("killed_runs.py")
            command = [sys.executable, str(script), str(kills), "5", "--config", "recipe.yaml", "--name", "run"]
            ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, ran.stderr[-3000:]
            assert kills == 0 or int(ran.stdout.split()[-1]) > 0, "it was killed at work"
            weights.append(torch.load(folder / "runs/run/checkpoints/last.ckpt", weights_only=True)["state_dict"])
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
