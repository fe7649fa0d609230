import pytest
import safetensors.torch
import timm
import torch
from goldens import Golden
from PIL import Image
from published import MASK_RCNN, RETINANET, SEMANTIC_FPN, published

import debiformer
from debiformer.cli import main
from debiformer.data.masks import read_classes
from debiformer.models.detector import Detector
from debiformer.models.segmenter import Segmenter
from debiformer.tasks.detection import DetectionTask
from debiformer.tasks.prediction import load_classifier, load_task
from debiformer.tasks.segmentation import SegmentationTask


@pytest.mark.parametrize(
    ("case", "preset", "kind", "kwargs"),
    [
        ("biformer_tiny", "biformer_tiny", "a classifier of 1000 classes", {}),
        ("debi_det_tiny_96x160", "debiformer_tiny", "a backbone without classifier", dict(num_classes=0, feature_norms=True)),
    ],
)
def test_converts_and_names_the_preset(tmp_path, capsys, case, preset, kind, kwargs):
    golden = Golden(case)
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"model": golden.state_dict}, source)
    assert main(["convert", str(source), str(out)]) == 0
    assert f"{preset}, {kind}" in capsys.readouterr().out
    model, expected = (timm.create_model(preset, **kwargs) for _ in range(2))
    model.load_state_dict(safetensors.torch.load_file(out))
    debiformer.load_published(golden.state_dict, expected)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))


def test_errors_come_before_any_work(tmp_path, capsys):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "in.pth")
    for output, message in [("out.pth", "must end in .safetensors or .ckpt"), ("no/out.safetensors", "there is no folder")]:
        assert main(["convert", str(tmp_path / "nowhere.pth"), str(tmp_path / output)]) == 2
        assert message in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "these weights fit none of debiformer_nano" in error
    assert "1 unexpected:\n  a" in error
    assert not (tmp_path / "out.safetensors").exists()


class TestWholeCheckpoints:
    """What validate, test and predict take."""

    def test_segmentation(self, tmp_path, capsys):
        torch.manual_seed(0)
        backbone = dict(feature_norms=True, region_grid=(8, 8))
        source = Segmenter("debiformer_nano", "semantic_fpn", 150, backbone_args=backbone, head_args=dict(pyramid_channels=24, channels=16))
        torch.save(published(source, SEMANTIC_FPN), tmp_path / "in.pth")
        assert main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.ckpt")]) == 0
        assert "segmentation with debiformer_nano, 150 classes" in capsys.readouterr().out
        task = load_task(SegmentationTask, tmp_path / "out.ckpt")
        images = torch.randn(1, 3, 70, 90)
        with torch.no_grad():
            torch.testing.assert_close(task(images), source.eval()(images))
        assert tuple(task.hparams[name] for name in ("class_names", "palette")) == read_classes("ade20k")
        Image.new("RGB", (90, 70), "red").save(tmp_path / "red.png")
        line = ["predict", "--checkpoint", str(tmp_path / "out.ckpt"), "--output", str(tmp_path / "masks"), str(tmp_path / "red.png")]
        assert main([*line, "--short-side", "64"]) == 0
        assert Image.open(tmp_path / "masks/masks/red.png").size == (90, 70)

    @pytest.mark.parametrize(("detector", "names"), [("retinanet", RETINANET), ("mask_rcnn", MASK_RCNN)])
    def test_detection(self, tmp_path, detector, names):
        torch.manual_seed(0)
        backbone = dict(feature_norms=True, region_grid=(16, 16))
        source = Detector(detector, "debiformer_nano", 80, backbone_args=backbone, pyramid_channels=24)
        torch.save(published(source, names), tmp_path / "in.pth")
        assert main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.ckpt")]) == 0
        task = load_task(DetectionTask, tmp_path / "out.ckpt")
        assert task.hparams["detector"] == detector
        assert task.hparams["class_names"][0] == "person"
        assert task.hparams["class_names"][79] == "toothbrush"
        images = torch.randn(1, 3, 96, 128)
        with torch.no_grad():
            levels = [model.model.eval().backbone(images) for model in (source, task.model)]
            torch.testing.assert_close(*levels)
            heads = [model.model.head if detector == "retinanet" else model.model.rpn.head for model in (source, task.model)]
            torch.testing.assert_close(*(head(list(level.values())) for head, level in zip(heads, levels, strict=True)))

    def test_classification(self, tmp_path):
        golden = Golden("biformer_tiny")
        torch.save({"model": golden.state_dict}, tmp_path / "in.pth")
        assert main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.ckpt")]) == 0
        task = load_classifier(tmp_path / "out.ckpt")
        assert task.hparams["class_names"][1].startswith("goldfish")
        assert tuple(task.hparams["input_size"]) == (3, 224, 224)
        expected = timm.create_model("biformer_tiny")
        debiformer.load_published(golden.state_dict, expected)
        state = task.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())

    def test_what_cannot_be_told(self, tmp_path, capsys):
        source = Segmenter("debiformer_nano", "semantic_fpn", 7, backbone_args=dict(feature_norms=True))
        torch.save(published(source, SEMANTIC_FPN), tmp_path / "seven.pth")
        torch.save({"model": Golden("debi_det_tiny_96x160").state_dict}, tmp_path / "bare.pth")
        classes = tmp_path / "classes.csv"
        classes.write_text("name,red,green,blue\n" + "".join(f"class {number},1,2,3\n" for number in range(7)))
        out = str(tmp_path / "out.ckpt")
        for line, message in [
            (["seven.pth", out], "segmentation with 7 classes, which is no data set known here: name them with --classes"),
            (["seven.pth", out, "--classes", "camvid"], "--classes camvid names 11 classes, and the checkpoint has 7"),
            (["bare.pth", out], "a backbone alone"),
        ]:
            assert main(["convert", str(tmp_path / line[0]), *line[1:]]) == 2
            assert message in capsys.readouterr().err
        assert not (tmp_path / "out.ckpt").exists()
        assert main(["convert", str(tmp_path / "seven.pth"), out, "--classes", str(classes)]) == 0
        assert load_task(SegmentationTask, tmp_path / "out.ckpt").hparams["class_names"][6] == "class 6"


def test_models_lists_every_preset_with_its_published_numbers(capsys):
    assert main(["models"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if "former" in line}
    assert lines["debiformer_small"][1:4] == ["44.0", "5.40", "224"]
    assert lines["biformer_stl"][1:4] == ["28.4", "4.57", "224"]
    assert "not from the paper" in " ".join(lines["debiformer_nano"])
