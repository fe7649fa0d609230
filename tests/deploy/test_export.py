"""The command export: files that agree with eager mode, say what they are, and run without this library."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tasks_on_disk import CLASSES, random_task, save

from debiformer.cli import exporting, main
from debiformer.deploy.agreement import agreement
from debiformer.deploy.example import load
from debiformer.tasks.detection import DetectionTask
from debiformer.tasks.segmentation import SegmentationTask

NANO = dict(backbone_args=dict(region_grid=[4, 4], feature_norms=True))
ALONE = "import runpy, sys; sys.modules['debiformer'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    task = random_task("debiformer_nano", input_size=(3, 64, 64), crop_pct=0.875)
    return task, save(task, tmp_path_factory.mktemp("checkpoints") / "classifier.ckpt")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    torch.manual_seed(0)
    palette = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    task = SegmentationTask("debiformer_nano", CLASSES, palette, head="semantic_fpn", **NANO).eval()
    return task, save(task, tmp_path_factory.mktemp("checkpoints") / "segmenter.ckpt")


@pytest.fixture
def photo(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((140, 90)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def export(capsys, *arguments):
    """Exit code, and what the command printed on either channel."""
    code = main(["export", *map(str, arguments)])
    return code, "".join(capsys.readouterr())


def run_alone(runner, *arguments):
    """What the example prints in a process that cannot import this library."""
    line = [sys.executable, "-c", ALONE, str(runner), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def noise(batch, height, width):
    return np.random.default_rng(1).standard_normal((batch, 3, height, width), dtype=np.float32)


def test_onnx_of_a_classifier(classifier, photo, tmp_path, capsys):
    task, checkpoint = classifier
    file = tmp_path / "model.onnx"
    code, said = export(capsys, checkpoint, "--output", file)
    assert code == 0, said
    assert re.search(r"batch 1  logits: differs from eager mode by \d\.\de-0[6-9]", said)
    assert re.search(r"routes  (\d+) of \1 equal", said)

    import onnx

    model = onnx.load(file)
    (images,) = model.graph.input
    assert images.name == "images"
    assert [bool(side.dim_param) for side in images.type.tensor_type.shape.dim] == [True, False, False, False]
    assert [value.name for value in model.graph.output] == ["logits"]
    (entry,) = [json.loads(entry.value) for entry in model.metadata_props if entry.key == "debiformer"]
    assert (entry["task"], entry["size"], entry["class_names"], entry["crop_pct"]) == ("classification", [64, 64], CLASSES, 0.875)
    assert entry["mean"] == pytest.approx(task.hparams["mean"])

    here = str(Path(__file__).parents[2]).encode()
    assert here not in file.read_bytes()  # nor anything else of the machine that it was made on
    assert file.stat().st_size < 1.2 * sum(value.nbytes for value in task.model.state_dict().values())

    inputs = noise(5, 64, 64)
    (found,) = load(file)[1](inputs)
    with torch.no_grad():
        expected = task(torch.from_numpy(inputs)).numpy()
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)

    printed = dict(line.split()[::-1] for line in run_alone(tmp_path / "run_model.py", file, photo).splitlines())
    assert (
        main(["predict", "--checkpoint", str(checkpoint), str(photo), "--output", str(tmp_path / "labels.jsonl"), "--device", "cpu"]) == 0
    )
    (line,) = (tmp_path / "labels.jsonl").read_text().splitlines()
    assert {guess["label"]: pytest.approx(guess["probability"], abs=2e-4) for guess in json.loads(line)["predictions"]} == {
        label: float(chance) for label, chance in printed.items()
    }


def test_openvino_of_features_at_another_size(classifier, photo, tmp_path, capsys):
    task, checkpoint = classifier
    file = tmp_path / "maps.xml"
    code, said = export(capsys, checkpoint, "--format", "openvino", "--features", "--size", 64, 96, "--output", file)
    assert code == 0, said
    assert said.count("batch 6  stride_") == 4
    inputs = noise(3, 64, 96)
    found = load(file)[1](inputs)
    with torch.no_grad():
        expected = task.model.forward_intermediates(torch.from_numpy(inputs), intermediates_only=True)
    for map_found, map_expected in zip(found, expected, strict=True):
        assert map_found.shape == map_expected.shape
        assert np.linalg.norm(map_found - map_expected.numpy()) < 1e-5 * map_expected.norm()
    printed = run_alone(tmp_path / "run_maps.py", file, photo)
    assert [line.split("  ")[0] for line in printed.splitlines()] == ["stride_4", "stride_8", "stride_16", "stride_32"]
    assert "(1, 192, 2, 3)" in printed


def test_torch_export_of_a_segmenter(segmenter, photo, tmp_path, capsys):
    task, checkpoint = segmenter
    file = tmp_path / "masks.pt2"
    code, said = export(capsys, checkpoint, "--format", "torch-export", "--size", 64, 96, "--output", file)
    assert code == 0, said
    with zipfile.ZipFile(file) as parts:
        here = str(Path(__file__).parents[2]).encode()
        assert not any(here in parts.read(name) for name in parts.namelist())
    inputs = noise(3, 64, 96)
    (found,) = load(file)[1](inputs)
    with torch.no_grad():
        expected = task(torch.from_numpy(inputs)).numpy()
    assert found.shape == (3, len(CLASSES), 64, 96)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    printed = run_alone(tmp_path / "run_masks.py", file, photo)
    assert sum(float(line.split()[0]) for line in printed.splitlines()[:-1]) == pytest.approx(1, abs=1e-3)
    with Image.open(photo.with_suffix(".mask.png")) as mask:
        assert mask.size == (96, 64)


@pytest.mark.thorough
def test_machine_code_of_a_classifier(classifier, photo, tmp_path, capsys):
    _, checkpoint = classifier
    file = tmp_path / "code.pt2"
    code, said = export(capsys, checkpoint, "--format", "aoti", "--output", file)
    assert code == 0, said
    assert len(run_alone(tmp_path / "run_code.py", file, photo).splitlines()) == len(CLASSES)


def test_a_file_that_disagrees_is_called_out(classifier, tmp_path, capsys, monkeypatch):
    _, checkpoint = classifier

    def wrong(file):
        description, run = load(file)
        return description, lambda images: [out * np.float32(1.001) if out.dtype == np.float32 else out for out in run(images)]

    monkeypatch.setattr(exporting.example, "load", wrong)
    code, said = export(capsys, checkpoint, "--format", "torch-export", "--output", tmp_path / "model.pt2")
    assert code == 1
    assert "The file does NOT agree" in said


def test_agreement_tells_ties_from_other_routes():
    logits = np.ones((2, 3), dtype=np.float32)
    routes = np.array([[[0, 1], [2, 3]], [[0, 1], [0, 3]]])
    affinities = np.array([[[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0], [0.5, 0.5]]], dtype=np.float32)
    other = routes.copy()
    other[1, 1] = [1, 3]
    assert agreement([logits, routes, affinities], [logits, routes, affinities], 1).holds
    tied = agreement([logits, other, affinities], [logits, routes, affinities], 1)
    assert (tied.routes, tied.tied, tied.other, tied.holds) == (4, 1, 0, True)
    worse = affinities.copy()
    worse[1, 1, 0] -= 0.1
    differs = agreement([logits, other, worse], [logits, routes, affinities], 1)
    assert (differs.routes, differs.tied, differs.other, differs.holds) == (4, 0, 1, False)
    assert not agreement([logits * (1 + 2e-5)], [logits], 1).holds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--output", "model.pt2"], "--output model.pt2: a file of onnx ends with .onnx"),
        (["--output", "nowhere/model.onnx"], "--output nowhere/model.onnx: there is no folder nowhere"),
        (["--size", "31"], "31"),
    ],
)
def test_what_will_not_do_is_said(given, message, classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = export(capsys, classifier[1], *given)
    assert code == 2
    assert message in said
    assert not [*tmp_path.iterdir()]


def test_tasks_and_packages_that_are_missing(segmenter, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = export(capsys, segmenter[1])
    assert code == 2
    assert "give --size HEIGHT WIDTH" in said
    boxes = DetectionTask("debiformer_nano", CLASSES, detector="retinanet", short_side=64, long_side=128, milestones=[8], **NANO)
    code, said = export(capsys, save(boxes, tmp_path / "boxes.ckpt"))
    assert code == 2
    assert "is of detection: only classification, its features and segmentation are exported so far" in said
    monkeypatch.setattr(exporting, "find_spec", lambda package: None)
    code, said = export(capsys, segmenter[1], "--format", "openvino")
    assert code == 2
    assert '--format openvino needs openvino: pip install "debiformer[export]"' in said
    with pytest.raises(SystemExit):
        main(["export", "x.ckpt", "--size", "1", "2", "3"])
    assert "--size 1 2 3: one number, or height and width" in capsys.readouterr().err
