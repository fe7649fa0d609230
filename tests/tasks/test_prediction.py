from pathlib import Path

import pytest
import torch
from lightning import Trainer
from PIL import Image

from debiformer.tasks.classification import ClassificationTask
from debiformer.tasks.prediction import load_classifier, predict

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ByColour(torch.nn.Module):
    """The mean of each channel is the logit of its colour, so a pure colour has probability e / (e + 2)."""

    def forward(self, images):
        assert not torch.is_grad_enabled()
        return images.mean(dim=(2, 3))


@pytest.fixture
def task():
    task = ClassificationTask("test_convnext", list(COLOURS))
    task.model = ByColour()
    return task.eval()


def transform(image):
    return torch.tensor(image.getpixel((0, 0))).view(3, 1, 1).expand(3, 8, 8) / 255


def stream(names):
    for name in names:
        yield Path(name), Image.new("RGB", (4, 4), COLOURS[name]) if name in COLOURS else ValueError(f"{name} is broken")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_order_labels_and_errors_survive_batching(task, batch_size):
    names = ["red", "bad1", "blue", "blue", "bad2", "bad3", "green"]
    found = list(predict(task, stream(names), transform, batch_size, topk=2))
    assert [p.path.name for p in found] == names
    assert [p.guesses[0].label if p.guesses else p.error for p in found] == [
        "red",
        "bad1 is broken",
        "blue",
        "blue",
        *(f"bad{k} is broken" for k in (2, 3)),
        "green",
    ]
    for prediction in found:
        if prediction.guesses:
            assert prediction.error is None
            assert [g.probability for g in prediction.guesses] == pytest.approx([2.718282 / 4.718282, 1 / 4.718282], abs=1e-6)


def test_topk_beyond_the_classes_gives_them_all(task):
    (prediction,) = predict(task, stream(["green"]), transform, topk=9)
    assert {g.label for g in prediction.guesses} == set(COLOURS)
    assert sum(g.probability for g in prediction.guesses) == pytest.approx(1)


def test_no_more_than_a_batch_is_read_ahead(task):
    drawn = 0

    def endless():
        nonlocal drawn
        while True:
            drawn += 1
            yield from stream(["red"])

    predictions = predict(task, endless(), transform, batch_size=4)
    for _ in range(10):
        next(predictions)
    assert drawn == 12


class TestLoading:
    def test_a_saved_task_is_loaded_for_evaluation(self, tmp_path):
        task = ClassificationTask("test_convnext", list(COLOURS))
        trainer = Trainer(accelerator="cpu", logger=False)
        trainer.strategy.connect(task)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        loaded = load_classifier(tmp_path / "run.ckpt")
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(loaded.model.head.fc.weight, task.model.head.fc.weight)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"absent.ckpt: no such file"):
            load_classifier(tmp_path / "absent.ckpt")

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
    def test_another_format(self, tmp_path, content):
        path = tmp_path / "odd.ckpt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"odd.ckpt is not a torch checkpoint"):
            load_classifier(path)

    def test_a_file_that_was_cut_short(self, tmp_path):
        torch.save(ClassificationTask("test_convnext", ["a", "b"]).state_dict(), tmp_path / "cut.ckpt")
        (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:5000])
        with pytest.raises(ValueError, match=r"cut.ckpt is damaged"):
            load_classifier(tmp_path / "cut.ckpt")

    def test_bare_weights(self, tmp_path):
        torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "bare.pth")
        with pytest.raises(ValueError, match=r"bare.pth is not from a classification run, it lacks class_names"):
            load_classifier(tmp_path / "bare.pth")

    def test_code_in_a_pickle_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "touched",))

        torch.save({"hyper_parameters": Evil()}, tmp_path / "evil.ckpt")
        with pytest.raises(ValueError, match="not a torch checkpoint"):
            load_classifier(tmp_path / "evil.ckpt")
        assert not (tmp_path / "touched").exists()
