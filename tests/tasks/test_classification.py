import math

import pytest
import torch
from lightning import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from debiformer.tasks.classification import ClassificationTask

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Lookup(torch.nn.Module):
    """Logits that the images themselves hold."""

    def forward(self, images):
        return images.flatten(1)


@pytest.mark.filterwarnings("ignore:The '(val|test)_dataloader' does not have many workers")
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_by_hand(stage):
    guesses = [0, 0, 1, 2, 2, 2, 0]
    targets = [0, 0, 0, 1, 2, 2, 2]  # recall 2/3, 0/1, 2/3; precision 2/3, 0/1, 2/3
    logits = F.one_hot(torch.tensor(guesses), 3).float() * 5
    task = ClassificationTask("test_convnext", ["a", "b", "c"])
    task.model = Lookup()
    data = DataLoader(TensorDataset(logits.view(7, 3, 1, 1), torch.tensor(targets)), batch_size=3)
    (result,) = getattr(Trainer(**QUIET), stage)(task, data, verbose=False)
    prefix = {"validate": "val", "test": "test"}[stage]
    assert result[f"{prefix}/acc"] == pytest.approx(4 / 7)
    assert result[f"{prefix}/balanced_acc"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert f"{prefix}/acc_top5" not in result
    hit, miss = math.log(math.e**5 + 2) - 5, math.log(math.e**5 + 2)
    assert result[f"{prefix}/loss"] == pytest.approx((4 * hit + 3 * miss) / 7)
    assert [(s.name, s.images) for s in task.class_scores] == [("a", 3), ("b", 1), ("c", 3)]
    assert [s.recall for s in task.class_scores] == pytest.approx([2 / 3, 0, 2 / 3])
    assert [s.precision for s in task.class_scores] == pytest.approx([2 / 3, 0, 2 / 3])


@pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers")
def test_top5_counts_the_fifth_and_not_the_sixth():
    logits = torch.arange(7.0, 0, -1).repeat(7, 1)  # class 0 the likeliest
    task = ClassificationTask("test_convnext", list("abcdefg"))
    task.model = Lookup()
    (result,) = Trainer(**QUIET).validate(task, DataLoader(TensorDataset(logits, torch.arange(7)), batch_size=7), verbose=False)
    assert result["val/acc_top5"] == pytest.approx(5 / 7)
    assert result["val/acc"] == pytest.approx(1 / 7)
    assert math.isnan(task.class_scores[3].precision)  # never guessed


def evaluated(logits, targets, **options):
    """What validation logs for given logits, four at a time, and the task."""
    task = ClassificationTask("test_convnext", [f"class {index}" for index in range(logits.shape[1])], **options)
    task.model = Lookup()
    data = DataLoader(TensorDataset(logits[:, :, None, None], targets), batch_size=4)
    (result,) = Trainer(**QUIET).validate(task, data, verbose=False)
    return result, task


@pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers")
class TestEvaluation:
    def test_calibration_error_by_hand(self):
        """Two bins: of the images with a confidence of 0.95 half are right, of those with 0.7 all; 0.45 * 4/6 + 0.3 * 2/6 is the error."""
        confidences, right = [0.95, 0.95, 0.95, 0.95, 0.7, 0.7], [1, 0, 1, 0, 1, 1]
        logits = torch.tensor([[math.log(p / (1 - p)), 0.0] for p in confidences])
        result, _ = evaluated(logits, 1 - torch.tensor(right))
        assert result["val/ece"] == pytest.approx(0.45 * 4 / 6 + 0.3 * 2 / 6)

    def test_logits_between_0_and_1_are_logits_still(self):
        result, _ = evaluated(torch.tensor([[0.9, 0.1]]), torch.tensor([0]))
        assert result["val/ece"] == pytest.approx(1 - 1 / (1 + math.exp(-0.8)))

    def test_the_matrix_has_classes_in_rows_and_labels_in_columns(self):
        logits = F.one_hot(torch.tensor([0, 2, 2, 1, 2, 0, 2]), 3) * 4.0
        _, task = evaluated(logits, torch.tensor([0, 0, 0, 1, 2, 2, 0]))
        assert task.confusion_matrix.tolist() == [[1, 0, 3], [0, 1, 0], [1, 0, 1]]

    def test_targets_below_0_count_nowhere(self):
        """Not one by one, and not where they are a whole batch."""
        logits, targets = torch.randn(10, 6) * 3, torch.arange(10) % 6
        fillers, ignored = torch.full((6, 6), torch.nan), torch.full((6,), -1)
        expected, task = evaluated(logits, targets)
        found, filled = evaluated(torch.cat([logits, fillers]), torch.cat([targets, ignored]))
        assert found == pytest.approx(expected, rel=1e-6)
        assert torch.equal(filled.confusion_matrix, task.confusion_matrix)
        assert filled.confusion_matrix.sum() == 10

    def test_a_loss_that_is_no_number_is_seen(self):
        logits = torch.randn(6, 3)
        logits[5] = torch.nan
        result, _ = evaluated(logits, torch.arange(6) % 3)
        assert math.isnan(result["val/loss"])

    @pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
    def test_training_keeps_no_matrix(self):
        data = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3), batch_size=4)
        task = ClassificationTask("test_convnext", ["a", "b", "c"])
        trainer = Trainer(max_epochs=1, enable_checkpointing=False, log_every_n_steps=1, **QUIET)
        trainer.fit(task, data, data)
        assert "val/ece" in trainer.callback_metrics
        assert task.confusion_matrix is None
        assert task.class_scores == []
        trainer.validate(task, data, verbose=False)
        assert sum(score.images for score in task.class_scores) == 8


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_targets_say_how_the_images_were_mixed(batch, mixing):
    task = ClassificationTask("test_convnext", list("abcdefgh"), **mixing)
    targets = torch.arange(batch)
    images = F.one_hot(targets, 8).float()[:, :, None, None].expand(batch, 8, 16, 16).clone()  # channel k shows how much of image k is left
    mixed, soft = task.mix(images, targets)
    torch.testing.assert_close(mixed.mean(dim=(2, 3)), soft, atol=1e-5, rtol=0)
    torch.testing.assert_close(soft.sum(1), torch.ones(batch))
    if batch % 2:
        assert soft[-1].tolist() == F.one_hot(targets[-1], 8).tolist()


def test_label_smoothing_of_the_training_loss():
    task = ClassificationTask("test_convnext", ["a", "b", "c"], label_smoothing=0.3)
    task.model = Lookup()
    task.log_training = lambda loss, batch_idx: None
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    log_p = logits.log_softmax(-1)[0]
    loss = task.training_step((logits, torch.tensor([0])), 0)
    assert loss.item() == pytest.approx(-(0.8 * log_p[0] + 0.1 * log_p[1] + 0.1 * log_p[2]).item())


def test_a_checkpoint_brings_all_that_prediction_needs_and_asks_for_nothing_else(tmp_path):
    source = tmp_path / "published.pth"
    torch.save(ClassificationTask("test_convnext", ["x", "y"]).model.state_dict(), source)
    task = ClassificationTask(
        "test_convnext",
        ["cat", "dog"],
        input_size=(3, 48, 64),
        mean=(0.1, 0.2, 0.3),
        crop_pct=0.75,
        pretrained=str(source),
        model_args={"drop_rate": 0.2},
    )
    trainer = Trainer(**QUIET)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    source.unlink()
    again = ClassificationTask.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert again.hparams["class_names"] == ["cat", "dog"]
    assert again.hparams["input_size"] == (3, 48, 64)
    assert (again.hparams["mean"], again.hparams["crop_pct"], again.hparams["interpolation"]) == ((0.1, 0.2, 0.3), 0.75, "bicubic")
    images = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(again.eval()(images), task.eval()(images))
