"""debiformer validate and test, on stand-ins for ImageNet in eleven classes, whose scores NumPy counts from the model's predictions."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image
from timm.data import RealLabelsImagenet
from torch.utils.data import DataLoader, TensorDataset

from debiformer.cli import main
from debiformer.cli.evaluation import print_class_scores
from debiformer.data.imagenet_labels import RealLabels
from debiformer.data.images import eval_transform, read_image
from debiformer.explain import charts
from debiformer.tasks import evaluation
from debiformer.tasks.classification import ClassificationTask, ClassScore
from debiformer.tasks.prediction import load_classifier

CLASSES = [f"n{index:02}" for index in range(11)]
IMAGES = 27  # an odd number, which two processes and batches of eight do not divide
CHECKPOINT = "runs/made/checkpoints/best.ckpt"
CONFIG = """
data:
  class_path: debiformer.data.folders.ImageFolders
  init_args: {root: data, input_size: 32, batch_size: 8, num_workers: 0}
model: {model: test_convnext}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


def save_picture(path, noise):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(noise.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    coarse.resize((48, 40)).save(path, quality=95)


def save_run(folder, model="test_convnext", size=32):
    """A run of a model that nobody trained, but whose guesses spread over the classes."""
    torch.manual_seed(1)
    task = ClassificationTask(model, CLASSES, input_size=(3, size, size), crop_pct=0.875)
    torch.nn.init.normal_(task.model.get_classifier().weight, std=1.0)
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(folder / "checkpoints" / "best.ckpt")
    (folder / "config.yaml").write_text(CONFIG.replace("input_size: 32", f"input_size: {size}"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with images, a run, ReaL labels, and a stand-in for ImageNet-V2."""
    work, noise = tmp_path_factory.mktemp("work"), np.random.default_rng(3)
    for name in CLASSES:
        save_picture(work / "data/train" / name / "0.jpg", noise)
    for number in range(1, IMAGES + 1):
        save_picture(work / "data/val" / CLASSES[number % 11] / f"ILSVRC2012_val_{number:08}.JPEG", noise)
    for index in range(11):
        for number in range(2):
            save_picture(work / "v2" / str(index) / f"{number}.jpeg", noise)
    real = [sorted(noise.choice(11, number % 4, replace=False).tolist()) for number in range(IMAGES)]
    real[5] = [10]
    (work / "real.json").write_text(json.dumps(real))
    save_run(work / "runs/made")
    return work


@pytest.fixture
def inside(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


def logits_of(paths, size=32, crop_pct=0.875):
    task = load_classifier(Path(CHECKPOINT))
    transform = eval_transform(size, crop_pct=crop_pct)
    return task(torch.stack([transform(read_image(path)) for path in paths])).double().numpy()


def calibration_error(logits, targets):
    """By the definition: over 15 bins of confidence, the mean distance of accuracy and confidence, weighted by the images of a bin."""
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == targets
    bins = np.minimum((confidence * 15).astype(int), 14)
    return sum(abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins.tolist()))


def validation_images():
    return sorted(Path("data/val").glob("*/*"))


def target_of(path):
    return CLASSES.index(path.parent.name)


def validate(tmp_path, *arguments):
    """What `debiformer validate` writes."""
    assert main(["validate", "--ckpt_path", CHECKPOINT, "--output", str(tmp_path), *map(str, arguments)]) == 0
    return json.loads((tmp_path / ("sweep.json" if "--sweep" in " ".join(map(str, arguments)) else "metrics.json")).read_text())


class TestScores:
    def test_all_numbers_are_those_of_the_predictions(self, inside, tmp_path, capsys):
        paths = validation_images()
        targets, logits = np.array([target_of(path) for path in paths]), logits_of(paths)
        guesses = logits.argmax(1)
        assert len(set(guesses.tolist())) > 5, "the stand-in must guess several classes"
        record = validate(tmp_path)
        scores = record["scores"]
        assert scores["images"] == IMAGES
        assert scores["top1"] == pytest.approx((guesses == targets).mean())
        assert scores["top5"] == pytest.approx(np.mean([t in order[-5:] for t, order in zip(targets, logits.argsort(1), strict=True)]))
        recalls = [(guesses[targets == index] == index).mean() for index in range(11)]
        assert scores["balanced_accuracy"] == pytest.approx(np.mean(recalls))
        assert scores["ece"] == pytest.approx(calibration_error(logits, targets), abs=1e-5)
        log_sum = np.log(np.exp(logits).sum(1))
        assert scores["loss"] == pytest.approx((log_sum - logits[np.arange(IMAGES), targets]).mean(), rel=1e-5)
        assert scores["forward_speed"] > scores["whole_speed"] > 0
        for index, row in enumerate(record["classes"]):
            guessed = guesses == index
            precision = pytest.approx((targets[guessed] == index).mean()) if guessed.any() else None
            assert row == {
                "name": CLASSES[index],
                "images": (targets == index).sum(),
                "recall": pytest.approx(recalls[index]),
                "precision": precision,
            }
        pairs = list(zip(targets.tolist(), guesses.tolist(), strict=True))
        found = {(CLASSES.index(cell["class"]), CLASSES.index(cell["label"])): cell["images"] for cell in record["confusion"]}
        assert found == {pair: pairs.count(pair) for pair in pairs}
        assert record["data"]["init_args"]["root"] == "data"
        assert record["preprocessing"]["crop_pct"] == 0.875
        out = capsys.readouterr().out
        assert f"{scores['top1']:.4f}" in out
        assert f"{scores['ece']:.4f}" in out
        assert Image.open(tmp_path / "confusion.png").size[0] > 300

    def test_two_processes_find_what_one_does(self, inside, tmp_path):
        """With ReaL labels and ImageNet-V2; 27 images are 14 for each process, one of which stands for none."""
        alone = validate(tmp_path / "one", "--real", "real.json", "--v2", "v2")
        line = ["validate", "--ckpt_path", CHECKPOINT, "--output", str(tmp_path / "two"), "--real", "real.json", "--v2", "v2"]
        devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        run = subprocess.run([sys.executable, "-m", "debiformer", *line, *devices], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        together = json.loads((tmp_path / "two/metrics.json").read_text())
        assert (alone["processes"], together["processes"]) == (1, 2)
        assert together["classes"] == alone["classes"]
        assert together["confusion"] == alone["confusion"]
        assert together["real"] == alone["real"]
        for part in ("scores", "v2"):
            for name in ("top1", "top5", "balanced_accuracy", "ece", "loss", "images"):
                assert together[part][name] == pytest.approx(alone[part][name], rel=1e-5), (part, name)

    def test_what_cannot_be_read_is_not_counted(self, inside, tmp_path):
        whole = Path("data/val/n03/ILSVRC2012_val_00000003.JPEG")
        content = whole.read_bytes()
        try:
            whole.write_bytes(content[:40])
            with pytest.warns(UserWarning, match="passed over .*ILSVRC2012_val_00000003"):
                record = validate(tmp_path, "--real", "real.json")
        finally:
            whole.write_bytes(content)
        paths = [path for path in validation_images() if path != whole]
        assert record["scores"]["images"] == IMAGES - 1
        hits = logits_of(paths).argmax(1) == [target_of(path) for path in paths]
        assert record["scores"]["top1"] == pytest.approx(hits.mean())
        assert record["real"]["images"] == sum(map(bool, json.loads(Path("real.json").read_text()))) - 1


class TestOutput:
    def test_by_default_it_lies_in_the_run(self, inside, capsys):
        assert main(["validate", "--ckpt_path", CHECKPOINT]) == 0
        assert "written  runs/made/evaluation/validate/metrics.json" in capsys.readouterr().out
        assert Path("runs/made/evaluation/validate/confusion.png").is_file()

    def test_and_beside_a_checkpoint_that_is_alone(self, inside, tmp_path):
        alone = tmp_path / "elsewhere" / "model.ckpt"
        alone.parent.mkdir()
        alone.write_bytes(Path(CHECKPOINT).read_bytes())
        assert main(["validate", "--ckpt_path", str(alone), "--config", "runs/made/config.yaml"]) == 0
        assert (alone.parent / "evaluation/validate/metrics.json").is_file()

    def test_without_matplotlib_the_figure_is_left_out(self, inside, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
        validate(tmp_path)
        assert 'no confusion.png: figures take matplotlib: pip install "debiformer[explain]"' in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


class TestSweep:
    def test_each_combination_is_an_evaluation_of_its_own(self, inside, tmp_path, capsys):
        record = validate(tmp_path, "--sweep.input_size", 32, 48, "--sweep.crop_pct", 0.75, 1.0)
        paths = validation_images()
        targets = np.array([target_of(path) for path in paths])
        rows = {(*row["input_size"], row["crop_pct"]): row for row in record["sweep"]}
        assert list(rows) == [(32, 32, 0.75), (32, 32, 1.0), (48, 48, 0.75), (48, 48, 1.0)]
        out = capsys.readouterr().out
        for (size, _, crop_pct), row in rows.items():
            logits = logits_of(paths, size, crop_pct)
            assert row["top1"] == pytest.approx((logits.argmax(1) == targets).mean())
            assert row["ece"] == pytest.approx(calibration_error(logits, targets), abs=1e-4)
            assert f"{size}x{size} │ {crop_pct:<4g} " in out
        assert len({row["ece"] for row in rows.values()}) == 4
        assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "sweep.png"}

    def test_one_option_alone_leaves_the_other_as_it_is(self, inside, tmp_path):
        (row,) = validate(tmp_path, "--sweep.crop_pct", 0.9)["sweep"]
        assert (row["input_size"], row["crop_pct"]) == ([32, 32], 0.9)

    def test_position_embeddings_are_resampled(self, inside, tmp_path):
        """The accuracy of a model that timm has read the same weights into at that size."""
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        save_run(tmp_path / "vit", "test_vit", 160)
        best = tmp_path / "vit/checkpoints/best.ckpt"
        assert main(["validate", "--ckpt_path", str(best), "--sweep.input_size", "160", "192", "--output", str(tmp_path)]) == 0
        rows = json.loads((tmp_path / "sweep.json").read_text())["sweep"]
        weights = load_classifier(best).model.state_dict()
        paths = validation_images()
        targets = np.array([target_of(path) for path in paths])
        for row in rows:
            size = row["input_size"][0]
            model = timm.create_model("test_vit", num_classes=11, img_size=size).eval()
            model.load_state_dict(checkpoint_filter_fn(dict(weights), model))
            transform = eval_transform(size, crop_pct=0.875)
            with torch.no_grad():
                logits = model(torch.stack([transform(read_image(path)) for path in paths])).double().numpy()
            assert row["ece"] == pytest.approx(calibration_error(logits, targets), abs=1e-4)

    def test_a_size_that_the_model_refuses_is_named_before_any_work(self, inside, tmp_path, capsys):
        save_run(tmp_path / "vit", "test_vit", 160)
        best = str(tmp_path / "vit/checkpoints/best.ckpt")
        assert main(["validate", "--ckpt_path", best, "--sweep.input_size", "160", "150", "--output", str(tmp_path / "out")]) == 2
        assert "model test_vit takes no images of 150x150 pixels" in capsys.readouterr().err
        assert not list((tmp_path / "out").iterdir())


class TestImageNet:
    def test_real_labels_as_timm_counts_them(self, inside, tmp_path, capsys):
        record = validate(tmp_path, "--real", "real.json")
        by_number = sorted(validation_images(), key=lambda path: path.name)
        timms = RealLabelsImagenet([path.name for path in by_number], "real.json", topk=(1,))
        timms.add_result(torch.from_numpy(logits_of(by_number)))
        assert 0 < record["real"]["top1"] < 1
        assert record["real"]["top1"] == pytest.approx(timms.get_accuracy(1) / 100)
        assert record["real"]["images"] == len(timms.is_correct[1])
        assert f"{record['real']['top1']:.4f} of {record['real']['images']} images" in capsys.readouterr().out

    def test_the_real_file_has_labels_for_every_image(self):
        """The copy of real.json that timm brings."""
        file = files("timm.data") / "_info" / "imagenet_real_labels.json"
        labels = RealLabels(str(file), num_classes=1000)
        content = json.loads(file.read_text())
        for number in (1, 2, 293, 50000):
            assert labels.of(f"val/ILSVRC2012_val_{number:08}.JPEG") == set(content[number - 1])
        with pytest.raises(ValueError, match="labels 50000 images, the data have ILSVRC2012_val_00050001"):
            labels.of("ILSVRC2012_val_00050001.JPEG")

    def test_v2_folders_are_indices(self, inside, tmp_path):
        record = validate(tmp_path, "--v2", "v2")
        paths = sorted(Path("v2").glob("*/*"))
        targets = np.array([int(path.parent.name) for path in paths])
        logits = logits_of(paths)
        assert record["v2"]["images"] == 22
        assert record["v2"]["top1"] == pytest.approx((logits.argmax(1) == targets).mean())
        assert record["v2"]["ece"] == pytest.approx(calibration_error(logits, targets), abs=1e-5)
        assert record["scores"]["images"] == IMAGES  # which the second evaluation leaves alone


def labels(change):
    """A writer of other ReaL labels."""

    def write(work, tmp_path):
        content = json.loads((work / "real.json").read_text())
        (tmp_path / "real.json").write_text(json.dumps(change(content)))
        return ["--real", tmp_path / "real.json"]

    return write


def folders(names):
    """A writer of other class folders."""

    def write(work, tmp_path):
        for name in names:
            save_picture(tmp_path / "v2" / name / "0.jpg", np.random.default_rng(0))
        return ["--v2", tmp_path / "v2"]

    return write


def unnumbered(work, tmp_path):
    for split in ("train", "val"):
        for name in CLASSES:
            save_picture(tmp_path / "data" / split / name / "photo.jpg", np.random.default_rng(0))
    return ["--real", "real.json", "--data.root", tmp_path / "data"]


def occupied(work, tmp_path):
    (tmp_path / "file").write_text("")
    return ["--output", tmp_path / "file" / "folder"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda *_: ["--real", "absent.json"], "real=absent.json: no such file"),
        (lambda *_: ["--real", CHECKPOINT], "best.ckpt is not JSON"),
        (labels(lambda real: {"labels": real}), "is not a list of lists of class indices"),
        (labels(lambda real: [*real[:-1], 3]), "is not a list of lists of class indices"),
        (labels(lambda real: real[:20]), "labels 20 images, the data have data/val/"),
        (labels(lambda real: [*real, [11]]), "names classes 0 to 11, the model has the classes 0 to 10"),
        (labels(lambda real: [[c for c in row if c < 9] for row in real]), "names classes 0 to 8, the model has the classes 0 to 10"),
        (labels(lambda real: [[] for _ in real]), "names no class"),
        (unnumbered, "photo.jpg has no number in its name, like ILSVRC2012_val_00000001"),
        (lambda *_: ["--v2", "absent"], "v2=absent: no such folder"),
        (folders(["0", "1", "cat"]), "folder cat is not named after the index of a class, 0 to 10"),
        (folders(["0", "1", "2"]), "has 3 class folders, 0 to 2; the model has the classes 0 to 10"),
        (folders([*map(str, range(10)), "11"]), "has 11 class folders, 0 to 11; the model has the classes 0 to 10"),
        (lambda *_: ["--v2", "v2", "--sweep.crop_pct", "1.0"], "--sweep goes without --real and --v2"),
        (lambda *_: ["--sweep.crop_pct", "0.9", "1.5"], "crop_pct=1.5 is not in (0, 1]"),
        (occupied, "cannot be written (Not a directory): name another with --output"),
    ],
)
def test_mistakes_are_named_before_any_work(inside, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("debiformer.cli.evaluation.evaluate", lambda *_: pytest.fail("work began"))
    line = ["--output", tmp_path / "out", *arguments(inside, tmp_path)]
    assert main(["validate", "--ckpt_path", CHECKPOINT, *map(str, line)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers")
@pytest.mark.parametrize(("images", "forward", "whole"), [(10, 6 / 4, 6 / 6), (4, None, None)])
def test_speed_leaves_the_first_batch_out(monkeypatch, images, forward, whole):
    """By a clock that goes on by one second before the model and by two in it: batches of 4, 4 and 2 images, or of 4 alone."""
    clock = [0.0]
    monkeypatch.setattr(evaluation, "finished", lambda device: clock[0])

    class Slow(torch.nn.Module):
        def forward(self, images):
            clock[0] += 2
            return images.flatten(1)

    class Waits(ClassificationTask):
        def on_validation_batch_start(self, batch, batch_idx):
            clock[0] += 1

    task = Waits("test_convnext", ["a", "b", "c"])
    task.model = Slow()
    loader = DataLoader(TensorDataset(torch.randn(images, 3, 1, 1), torch.arange(images) % 3), batch_size=4)
    stopwatch = evaluation.Stopwatch()
    options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(callbacks=[stopwatch], **options)
    for _ in range(2):
        trainer.validate(task, loader, verbose=False)
        assert stopwatch.forward_speed == forward
        assert stopwatch.whole_speed == whole
    assert not task._forward_hooks
    assert not task._forward_pre_hooks


def test_of_many_classes_the_worst_are_shown(capsys):
    recalls = np.random.default_rng(0).permutation(60) / 60
    scores = [ClassScore(f"class[{index}]", 1, recall, 0.5) for index, recall in enumerate(recalls)]
    print_class_scores([*scores, ClassScore("unseen", 0, float("nan"), float("nan"))])
    out = capsys.readouterr().out
    assert "the 20 with the lowest recall of 61; metrics.json has all" in " ".join(out.split())
    shown = [line.split()[1] for line in out.splitlines() if line.startswith("│")]
    assert shown == [f"class[{index}]" for index in np.argsort(recalls)[:20]]


class TestCharts:
    @pytest.mark.parametrize(("classes", "numbers", "names"), [(3, True, True), (40, False, True), (100, False, False)])
    def test_rows_are_shares_of_a_class(self, classes, numbers, names):
        counts = np.random.default_rng(0).integers(1, 9, (classes, classes))
        counts[1] = 0
        axes = charts.confusion(counts, [f"class {index}" for index in range(classes)], "title").axes[0]
        drawn = np.ma.filled(axes.images[0].get_array(), np.nan)
        np.testing.assert_allclose(np.delete(drawn, 1, 0).sum(1), 1)
        assert np.isnan(drawn[1]).all()
        assert drawn[0, 2] == counts[0, 2] / counts[0].sum()
        assert len(axes.texts) == (classes * (classes - 1) if numbers else 0)
        assert ("class 2" in [label.get_text() for label in axes.get_yticklabels()]) == names

    def test_a_sweep_has_a_line_for_each_crop(self):
        sizes, crops = [(32, 32), (64, 64), (48, 48)], [1.0, 0.875]
        accuracy = {(size, crop): size[0] / 100 + crop for size in sizes for crop in crops}
        axes = charts.sweep(accuracy, "title").axes[0]
        assert [line.get_label() for line in axes.lines] == ["0.875", "1"]
        assert axes.lines[1].get_ydata() == pytest.approx([1.32, 1.48, 1.64])
        assert [label.get_text() for label in axes.get_xticklabels()] == ["32x32", "48x48", "64x64"]

    def test_a_sweep_of_crops_alone_is_one_line_over_them(self):
        axes = charts.sweep({((48, 32), 1.0): 0.5, ((48, 32), 0.8): 0.25}, "title").axes[0]
        assert list(axes.lines[0].get_ydata()) == [0.25, 0.5]
        assert axes.get_xlabel() == "crop"
