import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from tasks_on_disk import random_task, save
from torch.utils.data import DataLoader, TensorDataset

from debiformer.cli import main
from debiformer.tasks.averaging import average
from debiformer.tasks.classification import ClassificationTask
from debiformer.tasks.prediction import load_classifier


def by_hand(states, name):
    """NumPy's mean of a tensor of several state dicts."""
    return np.mean([state[name].double().numpy() for state in states], axis=0)


class TestMean:
    @pytest.fixture
    def tasks(self):
        return [random_task("debiformer_nano", model_args={"region_grid": 5}) for _ in range(3)]

    def test_weights_and_buffers_are_those_of_numpy(self, tasks, tmp_path):
        files = [save(task, tmp_path / f"{k}.ckpt") for k, task in enumerate(tasks)]
        mean = average(files)
        states = [task.state_dict() for task in tasks]
        assert mean["state_dict"].keys() == states[0].keys()
        whole = 0
        for name, value in mean["state_dict"].items():
            assert value.dtype == states[0][name].dtype
            if value.is_floating_point():
                np.testing.assert_array_equal(value.numpy(), by_hand(states, name).astype(np.float32))
            else:
                whole += 1
                assert torch.equal(value, states[-1][name])
                assert not torch.equal(value, states[0][name])
        assert whole == sum(name.endswith("num_batches_tracked") for name in states[0]) > 0
        assert mean["averaged"] == ["0.ckpt", "1.ckpt", "2.ckpt"]

    def test_half_precision_is_averaged_in_double(self, tmp_path):
        """The sum of two overflows in half precision, and a small addend is lost in bfloat16."""
        files = []
        for k, (half, brain) in enumerate([(57344.0, 1.0), (49152.0, 1.0), (40960.0, 1.0234375)]):
            task = random_task()
            task.half_weight = torch.nn.Parameter(torch.tensor([half], dtype=torch.half))
            task.brain_weight = torch.nn.Parameter(torch.tensor([brain], dtype=torch.bfloat16))
            files.append(save(task, tmp_path / f"{k}.ckpt"))
        state = average(files)["state_dict"]
        assert state["half_weight"].dtype == torch.half
        assert state["half_weight"].item() == 49152
        assert state["brain_weight"].dtype == torch.bfloat16
        assert state["brain_weight"].item() == 1.0078125  # its neighbour: 1 + 2**-7

    @pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers", "ignore:You defined a `validation_step`")
    def test_of_a_running_mean_the_mean_is_taken(self, tmp_path):
        data = DataLoader(TensorDataset(torch.randn(12, 3, 32, 32), torch.arange(12) % 3), batch_size=3)
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path, "ema", every_n_train_steps=4)],
        )
        trainer.fit(ClassificationTask("test_convnext", ["a", "b", "c"], lr=0.1), data)
        other = save(random_task(), tmp_path / "other.ckpt")
        saved = [torch.load(file, weights_only=True) for file in (tmp_path / "ema.ckpt", other)]
        weight = "model.head.fc.weight"
        raw = {name.removeprefix("module."): value for name, value in saved[0]["current_model_state"].items()}
        assert not torch.equal(raw[weight], saved[0]["state_dict"][weight])
        found = average([tmp_path / "ema.ckpt", other])["state_dict"]
        np.testing.assert_array_equal(found[weight].numpy(), by_hand([s["state_dict"] for s in saved], weight).astype(np.float32))
        assert found.keys() == saved[1]["state_dict"].keys()


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path):
        return [str(save(random_task(), tmp_path / f"{k}.ckpt")) for k in range(2)]

    def test_the_output_is_a_checkpoint_like_any_other(self, files, tmp_path):
        out = tmp_path / "mean.ckpt"
        assert main(["average", *files, "--output", str(out)]) == 0
        expected = random_task()
        states = [torch.load(file, weights_only=True)["state_dict"] for file in files]
        expected.load_state_dict({name: torch.from_numpy(np.asarray(by_hand(states, name))) for name in states[0]})
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(load_classifier(out)(x), expected(x))

    def test_a_mean_is_not_resumed(self, files, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["average", *files, "--output", "mean.ckpt"]) == 0
        assert main(["fit", "--config", "blood_cells", "--ckpt_path", "mean.ckpt"]) == 2
        assert "mean.ckpt was averaged or converted, and has no optimizer to go on with" in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize(
        ("output", "message"),
        [("0.ckpt", "0.ckpt is there already"), ("mean.pth", "must end in .ckpt"), ("no/mean.ckpt", "there is no folder")],
    )
    def test_a_bad_output_is_named_and_nothing_overwritten(self, files, tmp_path, capsys, output, message):
        before = (tmp_path / "0.ckpt").read_bytes()
        assert main(["average", *files, "--output", str(tmp_path / output)]) == 2
        assert message in capsys.readouterr().err
        assert (tmp_path / "0.ckpt").read_bytes() == before
        assert {path.name for path in tmp_path.iterdir()} == {"0.ckpt", "1.ckpt"}


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def spoil(task, value):
    task.model.head.fc.bias.data[1] = value
    return task


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"odd.ckpt: no such file"),
        (lambda path: path.write_bytes(b"something else"), r"odd.ckpt is not a torch checkpoint"),
        (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), r"odd.ckpt is not from a classification run"),
        (lambda path: damage(save(random_task(), path)), r"odd.ckpt is damaged"),
        (
            lambda path: save(random_task("test_resnet"), path),
            r"odd.ckpt cannot be averaged with .*first.ckpt: model is test_resnet, there",
        ),
        (
            lambda path: save(random_task(classes=["a", "b", "d"]), path),
            r"odd.ckpt .*class_names is \['a', 'b', 'd'\], there \['a', 'b', 'c'\]",
        ),
        (
            lambda path: save(random_task(model_args={"kernel_sizes": 3}), path),
            r"odd.ckpt .*: model_args is {'kernel_sizes': 3}, there None",
        ),
        (lambda path: save(random_task(crop_pct=1.0), path), r"odd.ckpt .*: crop_pct is 1.0, there 0.9"),
        (lambda path: save(random_task().half(), path), r"odd.ckpt .*: model.stem.0.weight is float16 \(24, 3, 4, 4\), there float32"),
        (lambda path: save(spoil(random_task(), torch.nan), path), r"odd.ckpt: model.head.fc.bias is not finite"),
    ],
)
def test_what_cannot_be_averaged_is_named(tmp_path, make, message):
    first, odd = save(random_task(), tmp_path / "first.ckpt"), tmp_path / "odd.ckpt"
    make(odd)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        average([first, odd])


def test_one_checkpoint_has_no_mean(tmp_path):
    file = save(random_task(), tmp_path / "0.ckpt")
    with pytest.raises(ValueError, match=r"1 checkpoint to average: give two or more"):
        average([file])
    with pytest.raises(ValueError, match=r"given twice: .*0.ckpt"):
        average([file, tmp_path / "." / "0.ckpt"])
