"""The command export: files that agree with eager mode, say what they are, and run without this library."""

import json
import re
import subprocess
import sys
import zipfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tasks_on_disk import CLASSES, random_task, save
from torchvision.models.detection.roi_heads import paste_masks_in_image

from debiformer.cli import comparing, exporting, main
from debiformer.data.images import eval_transform, read_image
from debiformer.deploy.agreement import agreement, paired
from debiformer.deploy.detections import Detections, Undivided
from debiformer.deploy.example import load, objects, prepare, read, segment, stretched
from debiformer.deploy.graphs import Description, Outputs, folded, graph
from debiformer.models.segmentation_inference import Inference
from debiformer.models.segmentation_inference import segment as segment_whole
from debiformer.tasks.classification import ClassificationTask
from debiformer.tasks.detection import DetectionTask
from debiformer.tasks.segmentation import SegmentationTask

BACKBONES = {"debiformer_nano": dict(backbone_args=dict(region_grid=[4, 4], feature_norms=True)), "test_convnext": {}}
ALONE = "import runpy, sys; sys.modules['debiformer'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    task = random_task("debiformer_nano", input_size=(3, 64, 64), crop_pct=0.875)
    return task, save(task, tmp_path_factory.mktemp("checkpoints") / "classifier.ckpt")


def random_segmenter(head, backbone="debiformer_nano", **arguments):
    torch.manual_seed(0)
    palette = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    return SegmentationTask(backbone, CLASSES, palette, head=head, **BACKBONES[backbone], **arguments).eval()


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    task = random_segmenter("semantic_fpn", "test_convnext")  # quickly exported
    return task, save(task, tmp_path_factory.mktemp("checkpoints") / "segmenter.ckpt")


def detector(kind, backbone="debiformer_nano"):
    """One that finds many objects in anything."""
    torch.manual_seed(0)
    task = DetectionTask(backbone, CLASSES, detector=kind, short_side=64, long_side=128, milestones=[8], **BACKBONES[backbone]).eval()
    with torch.no_grad():
        if kind == "retinanet":
            logits = task.model.model.head.classification_head.cls_logits
            logits.bias.fill_(-1)
            logits.weight.mul_(30)
        else:
            task.model.model.roi_heads.box_predictor.cls_score.weight.mul_(20)
            task.model.model.roi_heads.box_predictor.cls_score.bias[0] = -5  # of the background
    return task


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
    assert re.search(r"batch 1x64x64  logits: differs from eager mode by \d\.\de-0[6-9]", said)
    assert re.search(r"routes  (\d+) of \1 equal", said)

    import onnx

    model = onnx.load(file)
    (images,) = model.graph.input
    assert images.name == "images"
    assert [bool(side.dim_param) for side in images.type.tensor_type.shape.dim] == [True, False, False, False]
    assert [value.name for value in model.graph.output] == ["logits"]
    (entry,) = [json.loads(entry.value) for entry in model.metadata_props if entry.key == "debiformer"]
    assert (entry["task"], entry["size"], entry["class_names"], entry["crop_pct"]) == ("classification", [64, 64], CLASSES, 0.875)
    assert (entry["channels"], entry["input_range"]) == ("RGB", [0, 1])
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
    assert said.count("batch 6x64x96  stride_") == 4
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
        assert mask.size == (140, 90)


@pytest.mark.thorough
def test_a_segmenter_takes_any_size(photo, tmp_path, capsys):
    task = random_segmenter("upernet", head_args=dict(channels=32))
    file = tmp_path / "any.onnx"
    code, said = export(capsys, save(task, tmp_path / "masks.ckpt"), "--output", file)
    assert code == 0, said
    description, run = load(file)
    assert (description["size"], description["any_size"]) == (None, True)
    for shape in ("1x64x96", "6x64x96", "1x160x224", "6x160x224"):
        assert f"batch {shape}  logits: differs" in said
    for shape in ((1, 64, 64), (2, 97, 130), (1, 131, 64)):  # maps of one row, and maps that regions do not fit
        inputs = noise(*shape)
        (found,) = run(inputs)
        with torch.no_grad():
            expected = task(torch.from_numpy(inputs)).numpy()
        assert found.shape == expected.shape
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    run_alone(tmp_path / "run_any.py", file, photo)
    with Image.open(photo.with_suffix(".mask.png")) as mask, Image.open(photo) as image:
        expected = task.segment(task.normalized(image)).numpy()
        assert (np.asarray(mask) == expected).mean() > 0.999


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn", "mask_rcnn"])
@pytest.mark.parametrize("sure", [True, False])
def test_detections_are_those_of_torchvision(kind, sure):
    task = detector(kind)
    if not sure:  # nothing is found
        (task.model.model if kind == "retinanet" else task.model.model.roi_heads).score_thresh = 0.999
    for seed, shape in enumerate(((64, 99), (64, 96))):
        image = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            (expected,) = task.model([image])
            boxes, labels, scores, *masks = Detections(task.model)(image[None])
        count = int((scores > 0).sum())
        assert count == len(expected["scores"])
        assert (count > 10) == sure
        torch.testing.assert_close(boxes[:count], expected["boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(scores[:count], expected["scores"])
        assert torch.equal(labels[:count], expected["labels"])
        if kind == "mask_rcnn":
            torch.testing.assert_close(paste_masks_in_image(masks[0][:count, None], boxes[:count], shape), expected["masks"])
        for ours, theirs in zip(Undivided(deepcopy(task.model))(image[None]), (boxes, labels, scores, *masks), strict=True):
            torch.testing.assert_close(ours[:count], theirs[:count], atol=1e-3, rtol=1e-5)


def test_torch_export_of_a_detector(photo, tmp_path, capsys):
    task = detector("mask_rcnn", "test_convnext")
    file = tmp_path / "objects.pt2"
    # The size that the photo has for the detector: 90x140 with 64 pixels on its shorter side.
    code, said = export(capsys, save(task, tmp_path / "boxes.ckpt"), "--format", "torch-export", "--size", 64, 99, "--output", file)
    assert code == 0, said
    description, run = load(file)
    with Image.open(photo) as image:
        found = [*objects(run(prepare(image.convert("RGB"), description)), image, description)]
        with torch.no_grad():
            (expected,) = task([task.normalized(image.convert("RGB"))])
    assert len(found) == len(expected["scores"]) == 100
    names, scores, boxes, masks = (np.array(column) for column in zip(*found, strict=True))
    values = [value.numpy() for value in (expected["boxes"], expected["labels"], expected["scores"], expected["masks"][:, 0] > 0.5)]
    pairs = paired([boxes, np.array([CLASSES.index(name) for name in names]), scores, masks], values)  # scores of noise are near ties
    assert len(pairs[0][0]) > 50
    for (ours, theirs), within in zip(pairs, (0.05, 0, 1e-4, 0), strict=True):
        assert (np.abs(ours.astype(float) - theirs.astype(float)) <= within).mean() > 0.999
    printed = run_alone(tmp_path / "run_objects.py", file, photo).splitlines()
    assert [line.split()[1] for line in printed[:-1]] == [name for name, score, *_ in found if score >= 0.3]
    with Image.open(photo.with_suffix(".found.png")) as drawn:
        assert drawn.size == (140, 90)


def test_detections_beside_the_image_are_left_out():
    """A file of a fixed size sees zeros beside an image that it does not fit."""
    how = dict(task="detection", size=[128, 96], short_side=64, long_side=128, class_names=CLASSES)
    image = Image.new("RGB", (140, 90))  # which becomes 96x62
    boxes = np.array([[10, 10, 30, 40], [10, 70, 40, 120], [80, 40, 96, 100]], dtype=np.float32)
    masks = np.ones((3, 28, 28), dtype=np.float32)
    found = [*objects((boxes, np.array([0, 1, 2]), np.array([0.9, 0.8, 0.7], dtype=np.float32), masks), image, how)]
    assert [name for name, *_ in found] == ["a", "c"]
    assert all((box >= 0).all() and (box <= [140, 90, 140, 90]).all() for _, _, box, _ in found)
    assert all(mask.shape == (90, 140) and mask.any() for *_, mask in found)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16", "P"])
def test_the_program_sees_what_predict_sees(size, interpolation, mode, tmp_path):
    shape = (120, 90) if mode == "RGB" else (90, 130)
    values = np.random.default_rng(0).integers(0, 256, (*shape, len(mode) if mode in ("RGB", "RGBA") else 1), dtype=np.uint8)
    image = Image.fromarray(values.squeeze()) if mode != "I;16" else Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    image = image.convert("RGB").quantize(200) if mode == "P" else image
    image.save(tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").mode == mode
    how = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), crop_pct=0.9, interpolation=interpolation)
    expected = eval_transform(size, **how)(read_image(tmp_path / "image.png")).numpy()
    found = prepare(read(tmp_path / "image.png"), dict(task="classification", size=list(size), **how))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_windows_are_those_of_predict(photo):
    task = random_segmenter("semantic_fpn")
    with Image.open(photo) as image:
        pixels = task.normalized(image)
    how = dict(task="segmentation", size=[64, 64], stride=40, short_side=70, long_side=None, class_names=CLASSES)
    how |= dict(mean=task.hparams["mean"], std=task.hparams["std"], interpolation="bilinear")
    runs = []

    def run(part):
        runs.append(part.shape)
        with torch.no_grad():
            return [task(torch.from_numpy(part)).numpy()]

    logits = segment(prepare(read(photo), how), run, how)
    assert (logits.shape, runs) == ((len(CLASSES), 70, 109), [(1, 3, 64, 64)] * 6)
    expected = segment_whole(task.model, pixels, Inference(short_side=70, window=64, stride=40)).numpy()
    assert (stretched(logits, *pixels.shape[1:]).argmax(0) == expected).mean() > 0.99
    small = segment(prepare(read(photo), how | dict(short_side=20)), run, how)  # smaller than a window: zeros fill it up
    assert small.shape == (len(CLASSES), 20, 31)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn"])
@pytest.mark.parametrize("form", ["onnx", "openvino", "torch-export"])
def test_detectors_take_any_size(kind, form, tmp_path, capsys):
    file = tmp_path / {"onnx": "any.onnx", "openvino": "any.xml", "torch-export": "any.pt2"}[form]
    code, said = export(capsys, save(detector(kind), tmp_path / "boxes.ckpt"), "--format", form, "--output", file)
    assert code == 0, said
    assert said.count("boxes: differs from eager mode") == 3


@pytest.mark.parametrize("kind", [pytest.param("biformer_tiny", marks=pytest.mark.thorough), "upernet"])
def test_one_graph_serves_every_size(kind):
    model = random_segmenter("upernet", head_args=dict(channels=32)).model if kind == "upernet" else random_task(kind).model
    size = dict(size=None, any_size=True, one_image=False, short_side=None, long_side=None)
    how = dict(stride=None, mean=(), std=(), crop_pct=None, interpolation="", precision="float32", class_names=(), version="")
    program = graph(Outputs(folded(model)), Description(task="classification", outputs=("logits",), **size, **how))
    for batch, height, width in ((1, 64, 64), (2, 65, 230), (3, 96, 64)):
        images = torch.from_numpy(noise(batch, height, width))
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images)[0], model(images), atol=1e-4, rtol=1e-4)


def test_core_ml_program(classifier, tmp_path, capsys):
    coremltools = pytest.importorskip("coremltools")
    task, checkpoint = classifier
    file = tmp_path / "model.mlpackage"
    code, said = export(capsys, checkpoint, "--format", "coreml", "--precision", "float16", "--output", file)
    assert code == 0, said
    assert re.search(r"not compared  coreml runs on Macs only; the file maps images 1x3x64x64 to logits in \d+ operations", said)
    spec = coremltools.utils.load_spec(str(file))
    assert json.loads(spec.description.metadata.userDefined["debiformer"])["precision"] == "float16"
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    kinds = [operation.type for operation in block.operations]
    attentions = sum(type(module).__name__.endswith("Attention") for module in task.model.modules())
    assert kinds.count("softmax") >= attentions
    assert kinds.count("resample") == 8  # of points, and of biases, in four deformable layers
    assert sum(part.stat().st_size for part in file.rglob("*")) < 0.7 * sum(value.nbytes for value in task.model.state_dict().values())


@pytest.mark.parametrize(
    ("form", "suffix", "precision"), [("onnx", ".onnx", "int8"), ("onnx", ".onnx", "float16"), ("openvino", ".xml", "bfloat16")]
)
@pytest.mark.parametrize("model", ["test_convnext", pytest.param("debiformer_nano", marks=pytest.mark.thorough)])
def test_reduced_precision(model, form, suffix, precision, tmp_path, capsys):
    torch.manual_seed(0)
    task = ClassificationTask(model, CLASSES, (3, 64, 64)).eval()  # as it begins: larger weights would leave the range of float16
    checkpoint = save(task, tmp_path / "other.ckpt")
    file = tmp_path / f"less{suffix}"
    cells = Path(comparing.whole_images()[0][0]).parent
    options = ("--format", form, "--precision", precision, "--calibration", cells, "--output", file)
    code, said = export(capsys, checkpoint, *options)
    assert code == 0, said
    assert not [*tmp_path.glob(".export-*")]
    (share,) = re.findall(r"decided alike  \d+ of \d+ images of --calibration \((.*)%\)", said)
    assert float(share) > 80
    (error,) = re.findall(r"batch 6x64x64  logits: differs from eager mode by (\S+) of", said)
    assert 1e-4 < float(error) < 0.2  # it is less precise, and not wrong
    description, _ = load(file)
    assert description["precision"] == precision


@pytest.mark.thorough
def test_machine_code_of_a_classifier(classifier, photo, tmp_path, capsys):
    _, checkpoint = classifier
    file = tmp_path / "code.pt2"
    code, said = export(capsys, checkpoint, "--format", "aoti", "--output", file)
    assert code == 0, said
    assert len(run_alone(tmp_path / "run_code.py", file, photo).splitlines()) == len(CLASSES)


def test_a_file_that_disagrees_is_called_out(tmp_path, capsys, monkeypatch):
    checkpoint = save(random_task(input_size=(3, 32, 32)), tmp_path / "other.ckpt")

    def wrong(file):
        description, run = load(file)
        return description, lambda images: [out * np.float32(1.001) if out.dtype == np.float32 else out for out in run(images)]

    monkeypatch.setattr(comparing.example, "load", wrong)
    code, said = export(capsys, checkpoint, "--format", "torch-export", "--output", tmp_path / "model.pt2")
    assert code == 1
    assert "The file does NOT agree" in said


@pytest.fixture
def calibration(tmp_path):
    """Two folders of eight images each, dark and bright; the third of each cannot be read."""
    for name, value in (("dark", 20), ("bright", 220)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(8):
            file = tmp_path / "images" / name / f"{index}.png"
            Image.new("RGB", (32, 32), (value,) * 3).save(file) if index != 2 else file.write_bytes(b"no image")
    return tmp_path / "images"


def test_ranges_come_from_all_folders_alike(calibration, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(exporting, "CALIBRATION", 8)
    monkeypatch.setattr(exporting, "quantize", lambda file, batches: seen.extend(batches))
    checkpoint = save(random_task(input_size=(3, 32, 32)), tmp_path / "other.ckpt")
    code, said = export(capsys, checkpoint, "--precision", "int8", "--calibration", calibration, "--output", tmp_path / "model.onnx")
    assert code == 0, said
    assert [bool(image.mean() > 0) for image in seen] == [True, True, True, False, False, False]  # every second, but for one of each
    assert said.count("passed over  ") == 4  # for the ranges, and for the comparison
    assert "2.png" in said
    assert "decided alike  6 of 6 images" in said


def test_calibration_without_an_image(calibration, tmp_path, capsys):
    for file in calibration.rglob("[!2].png"):
        file.unlink()
    checkpoint = save(random_task(input_size=(3, 32, 32)), tmp_path / "other.ckpt")
    code, said = export(capsys, checkpoint, "--precision", "int8", "--calibration", calibration, "--output", tmp_path / "model.onnx")
    assert code == 2
    assert "--calibration: none of 2 images can be read" in said


def test_a_file_is_whole_or_not_there(calibration, tmp_path, capsys, monkeypatch):
    def full(file, batches):
        assert file.stat().st_size > 1000
        raise OSError(f"{file}: no space left on device")

    monkeypatch.setattr(exporting, "quantize", full)
    (tmp_path / "model.onnx").write_bytes(b"an older one")
    checkpoint = save(random_task(input_size=(3, 32, 32)), tmp_path / "other.ckpt")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="no space left on device"):
        export(capsys, checkpoint, "--precision", "int8", "--calibration", calibration, "--output", tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "model.onnx").read_bytes() == b"an older one"


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
    rows = [np.ones((2, 4), dtype=np.float32), np.array([0, 1]), np.array([0.9, 0.5], dtype=np.float32)]
    unsure = agreement([*rows[:2], np.array([0.9, np.nan], dtype=np.float32)], rows, 3, rows=True)
    assert (unsure.holds, unsure.finite) == (False, False)
    broken = agreement([logits, logits * np.nan], [logits, logits], 2)
    assert (broken.holds, broken.finite) == (False, False)
    lost = agreement([logits, other, affinities * np.float32(np.nan)], [logits, routes, affinities], 1)
    assert (lost.tied, lost.other) == (0, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--output", "model.pt2"], "--output model.pt2: a file of onnx ends with .onnx"),
        (["--output", "nowhere/model.onnx"], "--output nowhere/model.onnx: there is no folder nowhere"),
        (["--size", "31"], "cannot be exported as onnx in float32, for 31x31: "),
        (["--precision", "bfloat16"], "--precision bfloat16: files of onnx are written in float32 or float16 or int8"),
        (["--precision", "int8"], "--precision int8 needs the ranges of activations: give --calibration IMAGE_OR_FOLDER"),
        (["--precision", "int8", "--calibration", "nothing"], "no such file or folder: nothing"),
        (["--format", "aoti", "--size", "any"], "--size any: a file of aoti has one size: give --size HEIGHT WIDTH"),
    ],
)
def test_what_will_not_do_is_said(given, message, classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = export(capsys, classifier[1], *given)
    assert code == 2
    assert message in said
    assert not [*tmp_path.iterdir()]


def test_agreement_of_detections_needs_no_order():
    boxes = np.array([[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9], [0, 0, 0, 0]], dtype=np.float32)
    labels, scores = np.array([0, 1, 1, 0]), np.array([0.9, 0.5, 0.5, 0], dtype=np.float32)
    swapped = [0, 2, 1, 3]
    assert agreement([boxes[swapped], labels[swapped], scores], [boxes, labels, scores], 3, rows=True).errors == [0, 0, 0]
    assert not agreement([boxes + np.float32(1e-2), labels, scores], [boxes, labels, scores], 3, rows=True).holds
    assert not agreement([boxes, np.array([0, 1, 0, 0]), scores], [boxes, labels, scores], 3, rows=True).holds
    nothing = np.zeros_like(scores)
    for less in (np.array([0.9, 0.5, 0, 0], dtype=np.float32), nothing):  # what one of them finds and the other does not
        assert not agreement([boxes, labels, scores], [boxes, labels, less], 3, rows=True).holds
        assert not agreement([boxes, labels, less], [boxes, labels, scores], 3, rows=True).holds
    assert agreement([boxes, labels, nothing], [boxes, labels, nothing], 3, rows=True).holds


def test_tasks_and_packages_that_are_missing(segmenter, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = export(capsys, segmenter[1], "--format", "aoti")
    assert code == 2
    assert "takes images of any size, a file of aoti those of one: give --size HEIGHT WIDTH" in said
    code, said = export(capsys, segmenter[1], "--features")
    assert code == 2
    assert "--features is for classification" in said
    code, said = export(capsys, segmenter[1], "--format", "coreml", "--size", "64", "--calibration", tmp_path)
    assert code == 2
    assert "--calibration judges decisions: files of coreml run on Macs only" in said
    (tmp_path / "model.onnx").mkdir()
    code, said = export(capsys, segmenter[1], "--output", "model.onnx")
    assert code == 2
    assert "--output model.onnx is a folder" in said
    boxes = save(detector("retinanet"), tmp_path / "boxes.ckpt")
    for given, message in (
        (["--precision", "float16"], "is of detection, whose boxes need float32"),
        (["--calibration", str(boxes)], "--calibration judges decisions"),
        (["--format", "aoti", "--size", "64"], "is of detection: they were not tried in it"),
        (["--format", "coreml", "--size", "64"], "is of detection: it does not have their operations"),
    ):
        code, said = export(capsys, boxes, *given)
        assert code == 2
        assert message in said
    code, said = export(capsys, save(random_task("test_resnet"), tmp_path / "other.ckpt"), "--features")
    assert code == 2
    assert "is of a model that has others" in said
    monkeypatch.setattr(exporting, "find_spec", lambda package: None)
    for form, extra in (("openvino", "export"), ("coreml", "coreml")):
        code, said = export(capsys, segmenter[1], "--format", form)
        assert code == 2
        assert f'pip install "debiformer[{extra}]"' in said
    with pytest.raises(SystemExit):
        main(["export", "x.ckpt", "--size", "1", "2", "3"])
    assert '--size 1 2 3: one number, height and width, or "any"' in capsys.readouterr().err
