import math
import warnings

import pytest
import timm
import torch
from lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset

from debiformer.tasks.base import create_model
from debiformer.tasks.classification import ClassificationTask

CLASSES = ["a", "b", "c"]


def trainer(default_root_dir=None, **options):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return Trainer(accelerator="cpu", limit_val_batches=0, default_root_dir=default_root_dir, **quiet, **options)


def fit(task, epochs=2, images=24, value=1.0, **options):
    """Fit on noise, four batches of six an epoch; the learning rate that every update used."""
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(images, 3, 32, 32) * value, torch.arange(images) % 3), batch_size=6)
    rates = []
    optimizer_step = task.optimizer_step

    def recording(epoch, batch_idx, optimizer, *args, **kwargs):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)

    task.optimizer_step = recording
    trainer(max_epochs=epochs, **options).fit(task, data)
    return rates


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
class TestSchedule:
    def test_linear_then_cosine_over_the_updates(self):
        rates = fit(ClassificationTask("test_convnext", CLASSES, lr=1e-3, warmup_epochs=0.5, warmup_lr=1e-5, min_lr=1e-4))
        cosine = [1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * t / 8)) for t in range(2, 8)]
        assert [max(r) for r in rates] == pytest.approx([1e-5, 1e-5 + (1e-3 - 1e-5) / 2, *cosine])

    def test_accumulated_batches_count_as_one_update(self):
        rates = fit(ClassificationTask("test_convnext", CLASSES, lr=1e-3, min_lr=0), accumulate_grad_batches=2)
        used = [max(r) for r in rates]
        assert used == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])

    def test_layer_decay_scales_every_step(self):
        rates = fit(ClassificationTask("test_convnext", CLASSES, lr=1e-3, layer_decay=0.5, min_lr=0), epochs=1)
        for used in rates:
            steps = sorted({round(math.log2(max(used) / lr)) for lr in used})
            assert len(steps) > 2
            assert all(min(abs(lr - max(used) / 2**k) for k in steps) < 1e-12 for lr in used)

    def test_a_warmup_as_long_as_the_run_is_refused(self):
        with pytest.raises(ValueError, match=r"warmup_epochs=5 takes 20 updates and the whole run has 8.*max_epochs"):
            fit(ClassificationTask("test_convnext", CLASSES, warmup_epochs=5))

    def test_a_run_without_end_is_refused(self):
        with pytest.raises(ValueError, match="max_epochs"):
            fit(ClassificationTask("test_convnext", CLASSES), epochs=-1)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
class TestNonFinite:
    def test_the_run_stops_and_leaves_what_is_needed_to_find_out(self, tmp_path):
        task = ClassificationTask("test_convnext", CLASSES)
        with pytest.raises(
            FloatingPointError, match=r"train/loss is nan .* at epoch 0, update 0.*nonfinite_step0_rank0.pt. Lower model.lr"
        ):
            fit(task, value=math.nan, default_root_dir=tmp_path)
        dump = torch.load(tmp_path / "nonfinite_step0_rank0.pt", weights_only=True)
        assert dump["batch"][0].isnan().all()
        assert dump["batch"][1].tolist() == [0, 1, 2, 0, 1, 2]
        assert torch.equal(dump["weights"]["model.head.fc.weight"], task.model.head.fc.weight)

    @pytest.mark.parametrize("model", ["test_convnext", "debiformer_nano"])  # without batch norms, and with them
    def test_or_leaves_the_update_out_and_counts_it(self, tmp_path, model):
        """One image is broken: the run is that of the other updates, as if this one had not been."""
        images = torch.randn(24, 3, 32, 32)
        broken = images.clone()
        broken[7] = math.inf
        weights = {}
        for name, data, skipped in (("whole", images, 0), ("broken", broken, 1)):
            torch.manual_seed(1)
            task = ClassificationTask(model, CLASSES, on_nonfinite="skip", optimizer="sgd", weight_decay=0.1, lr=0.1)
            seen = []
            task.on_before_zero_grad = lambda _, task=task, seen=seen: seen.append(task.model.head.fc.weight.clone())
            loader = DataLoader(TensorDataset(data, torch.arange(24) % 3), batch_size=6)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                trainer(tmp_path, max_epochs=1).fit(task, loader)
            assert task.skipped == skipped
            assert [True for w in told if "update left out, the 1. of this run" in str(w.message)] == [True] * skipped
            weights[name] = seen
        assert torch.equal(weights["broken"][1], weights["whole"][1])  # after the first update
        assert torch.equal(weights["broken"][2], weights["broken"][1])  # the second was left out, decay and momentum too
        assert weights["broken"][3].isfinite().all()
        assert not torch.equal(weights["broken"][3], weights["broken"][2])
        assert all(buffer.isfinite().all() for buffer in task.model.buffers())


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_vectors_and_what_the_model_names_go_without_weight_decay():
    task = ClassificationTask("test_resnet", CLASSES, weight_decay=0.3)
    task.model.no_weight_decay = lambda: {"layer1.0.conv1.weight"}
    fit(task, epochs=1)
    (optimizer,) = task.trainer.optimizers
    undecayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert undecayed == {id(p) for name, p in task.model.named_parameters() if p.ndim == 1 or name == "layer1.0.conv1.weight"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet05"}, r"model='resnet05' is unknown to timm: did you mean .*resnet"),
        ({"optimizer": "adamww"}, r"optimizer='adamww' is unknown to timm: did you mean .*adamw"),
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
        ({"lr": math.nan}, "lr=nan must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must not be below 0"),
        ({"layer_decay": 1.5}, "layer_decay=1.5 must be above 0 and at most 1"),
        ({"label_smoothing": 1.2}, "label_smoothing=1.2 must be between 0 and 1"),
        ({"mixup": -0.1}, "mixup=-0.1 must not be below 0"),
        ({"class_names": ["only"]}, "at least two classes"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassificationTask(**{"model": "test_convnext", "class_names": CLASSES, **arguments})


class TestPretrained:
    def test_weights_of_a_file_with_another_classifier(self, tmp_path):
        published = timm.create_model("test_convnext", num_classes=10)
        torch.save({"model": published.state_dict()}, tmp_path / "published.pth")
        model = create_model("test_convnext", 3, pretrained=str(tmp_path / "published.pth"))
        for name, value in published.state_dict().items():
            if not name.startswith("head.fc."):
                assert torch.equal(model.state_dict()[name], value)
        assert model.head.fc.weight.shape == (3, published.head.fc.in_features)

    def test_a_classifier_of_the_same_width_is_kept(self, tmp_path):
        published = timm.create_model("test_convnext", num_classes=3)
        torch.save(published.state_dict(), tmp_path / "published.pth")
        model = create_model("test_convnext", 3, pretrained=str(tmp_path / "published.pth"))
        assert torch.equal(model.head.fc.weight, published.head.fc.weight)

    @pytest.mark.parametrize("name", ["test_convnext", "debiformer_nano"])
    def test_a_checkpoint_of_a_run(self, tmp_path, name):
        task = ClassificationTask(name, ["a", "b"])
        torch.save({"state_dict": task.state_dict(), "hyper_parameters": {}}, tmp_path / "best.ckpt")
        model = create_model(name, 3, pretrained=str(tmp_path / "best.ckpt"))
        for key, value in task.model.state_dict().items():
            assert key.startswith("head.fc.") or torch.equal(model.state_dict()[key], value)

    def test_published_names_are_understood(self, tmp_path):
        ours = timm.create_model("debiformer_nano", num_classes=7)
        published = {f"backbone.{name}".replace("head.fc", "head"): value for name, value in ours.state_dict().items()}
        torch.save({"model": published}, tmp_path / "published.pth")
        model = create_model("debiformer_nano", 3, pretrained=str(tmp_path / "published.pth"))
        assert model.head.fc.out_features == 3
        for name, value in ours.state_dict().items():
            assert name.startswith("head.fc.") or torch.equal(model.state_dict()[name], value)

    def test_weights_of_another_model_are_refused(self, tmp_path):
        torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"other.pth' does not fit ConvNeXt"):
            create_model("test_convnext", 3, pretrained=str(tmp_path / "other.pth"))

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"absent.pth"):
            create_model("test_convnext", 3, pretrained=str(tmp_path / "absent.pth"))
