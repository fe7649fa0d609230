"""The command explain: figures and arrays of every task's model, and what it says of requests that will not do."""

import numpy as np
import pytest
import torch
from PIL import Image
from tasks_on_disk import CLASSES, random_task, save

from debiformer.cli import main
from debiformer.explain.views import classified
from debiformer.tasks.detection import DetectionTask
from debiformer.tasks.segmentation import SegmentationTask

NANO = dict(backbone_args=dict(region_grid=[4, 4], feature_norms=True))
ARRAYS = {"attention", "rollout", "grad_cam"}


@pytest.fixture
def picture(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def classifier(tmp_path):
    task = random_task("debiformer_nano", input_size=(3, 64, 64), crop_pct=0.875)
    return save(task, tmp_path / "classifier.ckpt")


def explain(capsys, *arguments):
    """Exit code, and what the command printed on either channel."""
    code = main(["explain", *map(str, arguments)])
    return code, "".join(capsys.readouterr())


def test_classification(classifier, picture, tmp_path, capsys):
    out = tmp_path / "out"
    code, said = explain(
        capsys, picture, "--checkpoint", classifier, "--stage", 1, "--block", 2, "--head", "all", "--query", "60,40", "--output", out
    )
    assert code == 0
    assert any(name in said for name in CLASSES)
    assert "of the 16x16 map of stages.0.blocks.1.mixer" in said
    arrays = np.load(out / "arrays.npz")
    assert {*arrays} == ARRAYS | {"points", "reference_points", "heard"}
    assert arrays["attention"].sum() == pytest.approx(1, abs=1e-4)
    assert arrays["grad_cam"].shape == (64, 64)
    assert "by the 4x4 map of stage 3" in said  # the last one that tells places apart
    assert arrays["heard"].shape == arrays["points"].shape[1:3]
    for name in ("attention.png", "evidence.png"):
        with Image.open(out / name) as figure:
            assert min(figure.size) > 300


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_dense_tasks(kind, picture, tmp_path, capsys):
    torch.manual_seed(0)
    if kind == "segmentation":
        palette = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
        task = SegmentationTask("debiformer_nano", CLASSES, palette, head="semantic_fpn", short_side=64, **NANO)
    else:
        options = dict(detector_args=dict(score_thresh=0.0), short_side=64, long_side=128, milestones=[8, 11])
        task = DetectionTask("debiformer_nano", CLASSES, detector="retinanet", **options, **NANO)
    checkpoint = save(task.eval(), tmp_path / "dense.ckpt")
    code, said = explain(
        capsys, picture, "--checkpoint", checkpoint, "--query", "139,89", "--stage", 2, "--block", 1, "--output", tmp_path / "out"
    )
    assert code == 0, said
    arrays = np.load(tmp_path / "out/arrays.npz")
    assert {*arrays} == ARRAYS
    assert np.isfinite(arrays["grad_cam"]).all()
    assert 0.5 < arrays["rollout"].sum() < 1.001  # a detector pads images, and the padding has its share


def test_places_are_those_that_the_crop_keeps(classifier):
    """A pixel of the image as given, marked, is where the view says it is."""
    from debiformer.data.images import eval_transform
    from debiformer.tasks.prediction import PREPROCESSING, load_classifier

    task = load_classifier(classifier)
    transform = eval_transform(**{name: task.hparams[name] for name in PREPROCESSING})
    image = Image.new("RGB", (400, 300))
    image.paste((255, 255, 255), (180, 120, 190, 130))
    view = classified(task.model, image, transform, CLASSES, torch.device("cpu"))
    bright = np.asarray(view.look.image.convert("L"), dtype=float)
    y, x = np.unravel_index(bright.argmax(), bright.shape)
    found = view.place(184.5, 124.5)
    assert (abs(found[0] - x), abs(found[1] - y)) <= (1, 1)
    with pytest.raises(ValueError, match=r"query 10,124 is outside of what the model sees of the image: x from \d+ to \d+"):
        view.place(10, 124)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--stage", 5], "stage 5 is none of 1, 2, 3, 4"),
        (["--stage", 0], "stage 0 is none of 1, 2, 3, 4"),
        (["--block", 0], "block 0 of stage 1 is none of 1, 2"),
        (["--cam-stage", 5], "stage 5 is none of 1, 2, 3, 4"),
        (["--stage", 4, "--block", 2], "block 2 of stage 4 is none of 1"),
        (["--head", 7], "head 7 is not one of the 1 of stages.0.blocks.1.mixer, from 0 on"),
        (["--query", "140,0"], "query 140,0 is not on the image, which is 140 wide and 90 high"),
        (["--label", "d"], "class d: the model knows no such class; choose from a, b, c"),
    ],
)
def test_what_is_not_there_is_named(given, message, classifier, picture, tmp_path, capsys):
    code, said = explain(capsys, picture, "--checkpoint", classifier, "--output", tmp_path / "out", *given)
    assert code == 2
    assert message in said
    assert not (tmp_path / "out").exists()


def test_files_and_numbers_that_are_none(classifier, picture, tmp_path, capsys):
    assert "none.ckpt: no such file" in explain(capsys, picture, "--checkpoint", tmp_path / "none.ckpt")[1]
    code, said = explain(capsys, tmp_path / "none.png", "--checkpoint", classifier)
    assert code == 2
    assert "none.png" in said
    for option, value, message in [
        ("--query", "a,b", "is not X,Y: two numbers of pixels"),
        ("--head", "x", "is neither 'all' nor the number of a head"),
    ]:
        with pytest.raises(SystemExit):
            main(["explain", str(picture), "--checkpoint", str(classifier), option, value])
        assert message in capsys.readouterr().err
