"""Ways to make training cheaper, each against plain training on the same images."""

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, TensorDataset

from debiformer.tasks.classification import ClassificationTask

CLASSES = ["a", "b", "c"]
pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")


def make(model="test_convnext", **options):
    torch.manual_seed(0)
    return ClassificationTask(model, CLASSES, **{"optimizer": "sgd", "lr": 0.1, **options})


def train(task, batch_size=6, value=1.0, **options):
    """The model's weights after two updates on twelve images of noise."""
    torch.manual_seed(1)
    images = TensorDataset(torch.randn(12, 3, 32, 32) * value, torch.arange(12) % 3)
    quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    Trainer(**quiet, max_epochs=1, **options).fit(task, DataLoader(images, batch_size))
    return task.model.state_dict()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_accumulated_batches_are_one(batch_size):
    parts = train(make(), batch_size, accumulate_grad_batches=6 // batch_size, precision="64-true")
    torch.testing.assert_close(parts, train(make(), precision="64-true"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model", ["test_convnext", "debiformer_nano"])
def test_checkpointed_blocks_give_the_same_gradients_from_less_memory(model):
    """With stochastic depth, which must leave out the same paths when blocks are computed again."""
    saved, weights = [], []
    for grad_checkpointing in (False, True):
        task = make(model, grad_checkpointing=grad_checkpointing, drop_path_rate=0.3)
        weights.append(train(task, precision="64-true"))
        sizes: dict[int, int] = {}

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            task.train()(torch.randn(4, 3, 32, 32, dtype=torch.float64))
        saved.append(sum(sizes.values()) - sum(p.numel() * 8 for p in task.parameters()))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-12)
    assert saved[1] < 0.6 * saved[0]


def test_a_compiled_model_trains_to_the_same_weights(monkeypatch):
    """By tracing and differentiating as always; the code is not generated, which would take a minute."""
    torch.compiler.reset()
    counter, compile = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=counter, **options))
    weights = train(make(compile=True), precision="64-true")
    assert counter.frame_count == 1
    torch.testing.assert_close(weights, train(make(), precision="64-true"), rtol=1e-9, atol=1e-12)


def test_channels_last_is_kept_in_training():
    task = make(channels_last=True)
    weights = train(task, precision="64-true")
    wide = [p for p in task.model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert wide
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)
    torch.testing.assert_close(weights, train(make(), precision="64-true"), rtol=1e-9, atol=1e-12)


def test_bfloat16_computes_in_it_and_keeps_weights_in_float32():
    task, outputs = make(), []
    task.model.get_classifier().register_forward_hook(lambda _, images, logits: outputs.append(logits.dtype))
    weights = train(task, precision="bf16-mixed")
    assert set(outputs) == {torch.bfloat16}
    before, exact = make().model.state_dict(), train(make())
    for name, value in weights.items():
        assert value.dtype == torch.float32
        assert (value - exact[name]).norm() <= 0.1 * (exact[name] - before[name]).norm() + 1e-6, name


class TestHalfPrecision:
    """What GPUs do, on the CPU, which PyTorch has a scaler for too."""

    def test_gradients_that_overflow_are_left_to_the_scaler(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        task, outputs = make(), []
        task.model.get_classifier().register_forward_hook(lambda _, images, logits: outputs.append(logits.dtype))
        weights = train(task, plugins=MixedPrecision("16-mixed", "cpu", scaler))
        assert set(outputs) == {torch.float16}
        assert scaler.get_scale() == 2.0**38  # halved at both updates
        assert task.skipped == 0
        torch.testing.assert_close(weights, make().model.state_dict(), rtol=0, atol=0)

    def test_others_are_applied(self):
        weights = train(make(), plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8)))
        before, exact = make().model.state_dict(), train(make())
        for name, value in weights.items():
            assert (value - exact[name]).norm() <= 0.02 * (exact[name] - before[name]).norm() + 1e-6, name

    def test_a_loss_that_is_not_finite_stops(self, tmp_path):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        with pytest.raises(FloatingPointError, match=r"train/loss is nan"):
            train(make(), value=torch.nan, plugins=plugin, default_root_dir=tmp_path)

    def test_or_is_skipped_and_counted(self):
        task = make(on_nonfinite="skip")
        weights = train(task, value=torch.nan, plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")))
        assert task.skipped == 2
        torch.testing.assert_close(weights, make().model.state_dict(), rtol=0, atol=0)
