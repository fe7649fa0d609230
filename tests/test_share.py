import csv
import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from tasks_on_disk import CLASSES, random_task, save

from debiformer.cli import main
from debiformer.data.blood_cells import SAMPLE
from debiformer.data.images import eval_transform, read_image
from debiformer.tasks import sharing
from debiformer.tasks.base import create_model
from debiformer.tasks.classification import ClassificationTask
from debiformer.tasks.prediction import PREPROCESSING, load_classifier
from debiformer.tasks.sharing import Facts, portable

RUN = """
trainer:
  accelerator: cpu
  max_epochs: 3
  limit_train_batches: 2
  limit_val_batches: 2
  num_sanity_val_steps: 0
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: "{epoch}", monitor: val/loss, save_top_k: 2}
model:
  model_args: {region_grid: 5}
  drop_path_rate: 0.1
  warmup_epochs: 0
data: {init_args: {num_workers: 0}}
"""
RECIPE = {"data": {"class_path": "debiformer.data.folders.ImageFolders", "init_args": {"root": "photos"}}}
BEST = "runs/cells/checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a short run on the bundled blood cells, `runs/cells`, and its best checkpoint shared as `shared/cells`."""
    work = tmp_path_factory.mktemp("work")
    (work / "short.yaml").write_text(RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        root = ["--trainer.default_root_dir", str(work / "runs")]
        assert main(["fit", "--config", "blood_cells", "--config", "short.yaml", "--name", "cells", *root]) == 0
        assert main(["share", BEST, "shared/cells", "--license", "cc-by-4.0", "--notes", "Not for *diagnosis*."]) == 0
    return work


@pytest.fixture
def inside(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def card(inside):
    return ModelCard.load("shared/cells/README.md")


def facts(task, **more):
    run = {"epoch": 0, "global_step": 1, "hyper_parameters": dict(task.hparams)}
    return Facts(run, RECIPE, sum(p.numel() for p in task.model.parameters()), 1e6, **more)


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("model", "arguments"),
        [
            ("debiformer_nano", {"model_args": {"region_grid": [5, 6]}, "drop_path_rate": 0.2}),
            ("biformer_tiny", {"model_args": {"region_grid": 8}}),
            ("test_convnext", {"channels_last": True}),
            ("test_vit", {"model_args": {"img_size": 64, "global_pool": "avg"}, "input_size": (3, 64, 64)}),
        ],
    )
    def test_timm_builds_the_very_model(self, tmp_path, model, arguments):
        task = random_task(model, **arguments)
        sharing.save(task, tmp_path / "shared", facts(task))
        there = timm.create_model(f"local-dir:{tmp_path / 'shared'}", pretrained=True).eval()
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(there(x), task.model(x))
        assert list(there.pretrained_cfg["label_names"]) == CLASSES
        config = json.loads((tmp_path / "shared/config.json").read_text())
        assert config["model_args"].get("drop_path_rate") == arguments.get("drop_path_rate")
        assert getattr(there, "region_grid", None) == getattr(task.model, "region_grid", None)

    def test_the_whole_command(self, inside):
        assert {path.name for path in Path("shared/cells").iterdir()} == {"model.safetensors", "config.json", "recipe.yaml", "README.md"}
        here = load_classifier(BEST).model
        there = (
            timm.create_model("local-dir:shared/cells", pretrained=True).eval().requires_grad_(False)
        )  # PyTorch multiplies otherwise with it
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(there(x), here(x))
        assert there.region_grid == (5, 5)

    def test_images_are_prepared_as_the_run_did(self, inside):
        task = load_classifier(BEST)
        ours = eval_transform(**{name: task.hparams[name] for name in PREPROCESSING})
        model = timm.create_model("local-dir:shared/cells", pretrained=True)
        theirs = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
        image = read_image(next((SAMPLE / "test" / "wbc").iterdir())).resize((150, 90))
        assert torch.equal(theirs(image), ours(image))

    def test_load_published_reads_the_weights(self, inside):
        import debiformer

        model = timm.create_model("debiformer_nano", num_classes=3)
        assert debiformer.load_published("shared/cells/model.safetensors", model).left_behind == []
        assert torch.equal(model.head.fc.weight, load_classifier(BEST).model.head.fc.weight)

    def test_other_users_may_read_the_weights(self, inside):
        weights, config = (os.stat(f"shared/cells/{name}").st_mode for name in ("model.safetensors", "config.json"))
        assert weights == config


class TestCard:
    def test_its_header_is_what_the_hub_reads(self, card):
        assert card.data.license == "cc-by-4.0"
        assert card.data.library_name == "debiformer"
        assert card.data.pipeline_tag == "image-classification"
        assert set(card.data.tags) == {"image-classification", "timm", "debiformer"}
        (result,) = card.data.eval_results
        saved = torch.load(BEST, weights_only=True)
        (score,) = [state["best_model_score"].item() for state in saved["callbacks"].values() if state["monitor"] == "val/acc"]
        assert (result.metric_name, result.metric_type, result.dataset_split) == ("val/acc", "accuracy", "val")
        assert result.metric_value == pytest.approx(score)
        assert result.dataset_name == "BloodCells"

    def test_it_says_what_the_model_is(self, card):
        task = load_classifier(BEST)
        saved = torch.load(BEST, weights_only=True)
        parameters = sum(p.numel() for p in task.model.parameters()) / 1e6
        for text in (
            f"| parameters | {parameters:.2f} M |",
            f"| weights | {saved['epoch'] + 1} epochs, {saved['global_step']} updates |",
            "classes apart:\nplatelet, rbc, wbc.",
            "Not for *diagnosis*.",
            "| input_size | 3, 64, 64 |",
            f"| torch | {torch.__version__} | {torch.__version__} |",
            f"| timm | {timm.__version__} | {timm.__version__} |",
            "@inproceedings{zhu2023biformer",
            "@inproceedings{long2024debiformer",
        ):
            assert text in card.text

    def test_the_recipe_is_that_of_the_run(self, card):
        recipe = yaml.safe_load(Path("shared/cells/recipe.yaml").read_text())
        begun = yaml.safe_load(Path("runs/cells/config.yaml").read_text())
        assert recipe["trainer"].pop("default_root_dir") == "runs"
        del begun["trainer"]["default_root_dir"]
        assert recipe == begun
        (_, shown) = re.findall(r"```yaml\n(.*?)```", card.text, flags=re.DOTALL)
        assert shown == Path("shared/cells/recipe.yaml").read_text()

    def test_the_recipe_trains(self, inside, capsys):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["fit", "--config", "shared/cells/recipe.yaml", "--print_config"])
        assert "region_grid: 5" in capsys.readouterr().out

    def test_no_path_of_this_machine_is_in_the_folder(self, inside):
        assert str(inside) in Path("runs/cells/config.yaml").read_text()
        for name in ("README.md", "config.json", "recipe.yaml"):
            assert str(inside) not in Path("shared/cells", name).read_text()
            assert str(Path.home()) + "/" not in Path("shared/cells", name).read_text()

    def test_its_python_runs(self, card, monkeypatch):
        monkeypatch.chdir("shared")
        (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
        space = {}
        exec(code, space)
        image = read_image(next((SAMPLE / "test" / "wbc").iterdir()))
        assert space["model"](space["transform"](image).unsqueeze(0)).shape == (1, len(space["labels"]))

    def test_a_mean_of_checkpoints_is_called_one(self, inside, tmp_path):
        files = sorted(map(str, Path("runs/cells/checkpoints").glob("epoch=*.ckpt")))
        assert len(files) == 2
        mean = "runs/cells/checkpoints/mean.ckpt"
        assert main(["average", *files, "--output", mean]) == 0
        assert main(["validate", "--ckpt_path", mean, "--trainer.limit_val_batches", "1"]) == 0  # though the recipe has a ModelCheckpoint
        assert main(["share", mean, str(tmp_path / "mean")]) == 0
        card = ModelCard.load(tmp_path / "mean/README.md")
        assert f"the mean of {', '.join(Path(file).name for file in files)} |" in card.text
        assert card.data.license is None
        assert "None is stated" in card.text


class TestMetrics:
    @pytest.fixture
    def evaluated(self, inside, tmp_path, monkeypatch):
        """A run of its own, evaluated: what validate and test write."""
        shutil.copytree("runs/cells", tmp_path / "runs/cells")
        monkeypatch.chdir(tmp_path)
        return yaml.safe_load(Path("runs/cells/config.yaml").read_text())["data"]

    def write(self, command, data, checkpoint=BEST, top1=0.8125, **more):
        file = Path("runs/cells/evaluation", command, "metrics.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        scores = dict(top1=top1, top5=None, balanced_accuracy=0.75, ece=0.0625, loss=0.5, images=32, forward_speed=None, whole_speed=9.0)
        file.write_text(json.dumps({"command": command, "checkpoint": checkpoint, "data": data, "scores": scores} | more))
        return file

    def shared(self):
        shutil.rmtree("out", ignore_errors=True)
        assert main(["share", BEST, "out"]) == 0
        return {result.metric_name: result.metric_value for result in ModelCard.load("out/README.md").data.eval_results}

    def test_evaluations_are_on_the_card(self, evaluated):
        self.write("validate", evaluated)
        elsewhere = {"class_path": evaluated["class_path"], "init_args": evaluated["init_args"] | {"crop_pct": 0.5, "batch_size": 1}}
        self.write("test", elsewhere, top1=0.5, v2={"top1": 0.25, "images": 10})
        expected = {
            f"{split}/{name}": value
            for split in ("val", "test")
            for name, value in [("balanced_acc", 0.75), ("ece", 0.0625), ("loss", 0.5)]
        }
        assert self.shared() == expected | {"val/acc": 0.8125, "test/acc": 0.5, "ImageNet-V2/acc": 0.25}
        text = Path("out/README.md").read_text()
        assert "| val/acc | 0.8125 | 32 images |" in text
        assert "| test/acc | 0.5000 | 32 images, crop_pct=0.5 |" in text

    def test_those_of_other_checkpoints_and_of_an_earlier_file_are_not(self, evaluated, capsys):
        self.write("validate", evaluated, checkpoint="runs/cells/checkpoints/last.ckpt")
        old = self.write("test", evaluated)
        before = Path(BEST).stat().st_mtime - 60
        os.utime(old, (before, before))
        assert self.shared().keys() == {"val/acc"}
        assert f"{old}: it is older than {BEST}" in capsys.readouterr().out

    def test_a_foreign_file_is_named(self, evaluated, capsys):
        self.write("test", evaluated).write_text('{"accuracy": 1}')
        assert main(["share", BEST, "out"]) == 2
        assert "evaluation/test/metrics.json is not from debiformer validate or test" in capsys.readouterr().err
        assert not Path("out").exists()

    def test_a_checkpoint_that_nothing_scored_has_none(self, evaluated):
        assert main(["share", "runs/cells/checkpoints/last.ckpt", "out"]) == 0
        card = ModelCard.load("out/README.md")
        assert card.data.eval_results is None
        assert "None is recorded for these weights." in card.text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/someone/data/flowers", "flowers"),
        ("/home/someone/data/flowers/", "flowers/"),
        ("local-dir:/home/someone/models/nano", "local-dir:nano"),
        ("file:///srv/shards/train-{000..031}.tar", "file://train-{000..031}.tar"),
        ("pipe:cat /srv/shards/a.tar", "pipe:cat a.tar"),
        ("https://example.org/shards/a.tar", "https://example.org/shards/a.tar"),
        ("s3://bucket/shards/a.tar", "s3://bucket/shards/a.tar"),
        ("../data/flowers", "../data/flowers"),
        ("val/acc", "val/acc"),
        (0.5, 0.5),
        (None, None),
        ({"a": ["/srv/x/y", {"b": ("/srv/z",)}]}, {"a": ["y", {"b": ["z"]}]}),
    ],
)
def test_absolute_paths_are_cut(value, expected):
    assert portable(value) == expected


def labels(path):
    return list(csv.reader(Path(path).open()))


class TestPredict:
    def test_a_shared_folder_labels_as_its_checkpoint_does(self, inside, tmp_path):
        for name, source in (("run", BEST), ("folder", "shared/cells"), ("address", "local-dir:shared/cells")):
            line = [
                "predict",
                "--checkpoint",
                source,
                str(SAMPLE / "test" / "wbc"),
                "--output",
                str(tmp_path / f"{name}.csv"),
                "--device",
                "cpu",
            ]
            assert main(line) == 0
        run = labels(tmp_path / "run.csv")
        assert len(run) > 10
        assert {row[1] for row in run[1:]} <= {"platelet", "rbc", "wbc"}
        assert labels(tmp_path / "folder.csv") == labels(tmp_path / "address.csv") == run

    def test_so_does_a_repository_of_the_hub(self, inside, tmp_path, monkeypatch):
        """From the Hub's own cache, laid out as a download leaves it; the network is off."""
        repository = tmp_path / "hub/models--someone--cells"
        shutil.copytree("shared/cells", repository / "snapshots/0123456789abcdef")
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("0123456789abcdef")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        image = str(next((SAMPLE / "test" / "wbc").iterdir()))
        for name, source in (("run", BEST), ("hub", "hf-hub:someone/cells")):
            assert main(["predict", "--checkpoint", source, image, "--output", str(tmp_path / f"{name}.csv"), "--device", "cpu"]) == 0
        assert labels(tmp_path / "hub.csv") == labels(tmp_path / "run.csv")

    def test_a_repository_that_is_not_there_is_named(self, inside, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert main(["predict", "--checkpoint", "hf-hub:someone/absent", str(SAMPLE / "test"), "--device", "cpu"]) == 2
        assert "predict: error: model hf-hub:someone/absent cannot be read" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: (folder / "config.json").unlink(), r"there is no .*config.json; give a folder that `debiformer share`"),
            (lambda folder: (folder / "config.json").write_text("{"), r"config.json is not the config of a timm model"),
            (lambda folder: (folder / "config.json").write_text("[]"), r"config.json is not the config of a timm model"),
            (lambda folder: edit(folder, label_names=None), r"does not say what its labels are"),
            (lambda folder: edit(folder, architecture="resnet05"), r"Unknown model \(resnet05\)"),
            (lambda folder: (folder / "model.safetensors").unlink(), r"No suitable checkpoints found"),
            (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), r"local-dir:.*header"),
        ],
    )
    def test_a_spoilt_folder_is_named(self, inside, tmp_path, spoil, message):
        folder = tmp_path / "spoilt"
        shutil.copytree("shared/cells", folder)
        spoil(folder)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_classifier(folder)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


class TestTrainFromAFolder:
    def test_the_checkpoint_needs_the_folder_no_more(self, inside, tmp_path, monkeypatch):
        shutil.copytree("shared/cells", tmp_path / "start")
        monkeypatch.chdir(tmp_path)
        source = ["--model.model", "local-dir:start", "--model.pretrained", "true"]
        quick = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
        still = ["--model.lr", "1e-30", "--model.warmup_epochs", "0", "--model.min_lr", "0", "--data.num_workers", "0"]
        assert main(["fit", "--config", "blood_cells", "--name", "on", *source, *quick, *still, "--trainer.limit_val_batches", "1"]) == 0
        start = safetensors.torch.load_file("start/model.safetensors")
        shutil.rmtree("start")
        task = load_classifier("runs/on/checkpoints/last.ckpt")
        assert task.hparams["model"] == "debiformer_nano"
        assert task.hparams["drop_path_rate"] == 0.1
        assert task.model.region_grid == (5, 5)
        weights = [name for name, _ in task.model.named_parameters()]
        assert all(torch.equal(task.model.state_dict()[name], start[name]) for name in weights)
        assert main(["validate", "--ckpt_path", "runs/on/checkpoints/last.ckpt", "--trainer.limit_val_batches", "1"]) == 0

    def test_a_rate_that_is_asked_for_takes_the_place_of_the_folders(self, inside):
        task = ClassificationTask("local-dir:shared/cells", CLASSES, pretrained=True, drop_path_rate=0.3)
        assert task.hparams["drop_path_rate"] == 0.3
        assert "drop_path_rate" not in task.hparams["model_args"]

    def test_other_classes_take_all_but_the_classifier(self, inside):
        model = create_model("local-dir:shared/cells", 5, pretrained=True)
        start = safetensors.torch.load_file("shared/cells/model.safetensors")
        assert model.head.fc.out_features == 5
        assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items() if not name.startswith("head."))

    def test_without_its_weights_there_is_a_warning(self, inside):
        with pytest.warns(UserWarning, match=r"local-dir:shared/cells' gives the architecture alone, with random weights"):
            create_model("local-dir:shared/cells", 3)

    def test_a_missing_folder_is_named(self):
        with pytest.raises(FileNotFoundError, match=r"model local-dir:absent: there is no absent/config.json"):
            create_model("local-dir:absent", 3, pretrained=True)


class TestPush:
    @pytest.fixture
    def hub(self, monkeypatch):
        """Calls of the Hub's client, which go nowhere."""
        calls = []
        api = huggingface_hub.HfApi
        monkeypatch.setattr(api, "whoami", lambda self: {"name": "someone"})
        monkeypatch.setattr(api, "create_repo", lambda self, repo_id, **options: calls.append((repo_id, options)))

        def upload_folder(self, *, repo_id, folder_path, **options):
            calls.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))
            return f"https://huggingface.co/{repo_id}/commit/1"

        monkeypatch.setattr(api, "upload_folder", upload_folder)
        return calls

    def test_the_folder_goes_there_whole(self, inside, tmp_path, hub, capsys):
        assert main(["share", BEST, str(tmp_path / "out"), "--push", "someone/cells", "--private"]) == 0
        files = {"model.safetensors", "config.json", "recipe.yaml", "README.md"}
        assert hub == [("someone/cells", {"private": True, "exist_ok": True}), ("someone/cells", files)]
        assert "https://huggingface.co/someone/cells/commit/1" in capsys.readouterr().out
        card = ModelCard.load(tmp_path / "out/README.md")
        assert 'timm.create_model("hf-hub:someone/cells", pretrained=True)' in card.text
        assert "debiformer predict --checkpoint hf-hub:someone/cells" in card.text

    def test_a_push_that_fails_leaves_the_folder(self, inside, tmp_path, hub, monkeypatch, capsys):
        def refuse(self, **options):
            raise ConnectionError("no network")

        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refuse)
        assert main(["share", BEST, str(tmp_path / "out"), "--push", "someone/cells"]) == 2
        error = capsys.readouterr().err
        assert "but someone/cells did not take it: no network; try again with `hf upload someone/cells" in error
        assert (tmp_path / "out/model.safetensors").is_file()

    @pytest.mark.parametrize("repository", ["cells", "a/b/c", "some one/cells", "a/b..c"])
    def test_a_bad_name_is_told_before_any_work(self, inside, tmp_path, hub, capsys, repository):
        assert main(["share", BEST, str(tmp_path / "out"), "--push", repository]) == 2
        assert f"--push {repository}: give OWNER/NAME" in capsys.readouterr().err
        assert hub == []
        assert not (tmp_path / "out").exists()

    def test_so_is_that_nobody_is_logged_in(self, inside, tmp_path, hub, monkeypatch, capsys):
        def nobody(self):
            raise LocalTokenNotFoundError("no token found")

        monkeypatch.setattr(huggingface_hub.HfApi, "whoami", nobody)
        assert main(["share", BEST, str(tmp_path / "out"), "--push", "someone/cells"]) == 2
        assert "no token found; log in with `hf auth login`" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestMistakes:
    def test_a_folder_with_something_in_it_is_left_alone(self, inside, tmp_path, capsys):
        (tmp_path / "mine.txt").write_text("mine")
        assert main(["share", BEST, str(tmp_path)]) == 2
        assert f"{tmp_path} is there already and not empty" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_an_empty_folder_is_filled(self, inside, tmp_path):
        (tmp_path / "out").mkdir()
        assert main(["share", BEST, str(tmp_path / "out")]) == 0
        assert (tmp_path / "out/README.md").is_file()

    def test_a_checkpoint_away_from_its_run_needs_a_config(self, inside, tmp_path, capsys):
        moved = save(random_task("debiformer_nano"), tmp_path / "moved.ckpt")
        out = tmp_path / "out"
        assert main(["share", str(moved), str(out)]) == 2
        assert "say with --config which recipe or YAML file names the data" in capsys.readouterr().err
        assert main(["share", str(moved), str(out), "--config", "short.yaml"]) == 2
        assert "short.yaml does not say in data.class_path what the model was trained on" in capsys.readouterr().err
        assert main(["share", str(moved), str(out), "--config", "blood_cells"]) == 0
        assert "class_path: debiformer.data.blood_cells.BloodCells" in (out / "README.md").read_text()

    def test_what_is_no_checkpoint_is_named(self, inside, tmp_path, capsys):
        for source, message in (("absent.ckpt", "absent.ckpt: no such file"), ("short.yaml", "short.yaml is not a torch checkpoint")):
            assert main(["share", source, str(tmp_path / "out")]) == 2
            assert message in capsys.readouterr().err

    def test_a_folder_that_cannot_be_written_is_named_and_nothing_left(self, tmp_path):
        task = random_task()
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"file/out cannot be written: Not a directory"):
            sharing.save(task, tmp_path / "file/out", facts(task))
        task.hparams["model_args"] = {"odd": object()}
        with pytest.raises(ValueError, match="'odd' is not serializable"):
            sharing.save(task, tmp_path / "out", facts(task))
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_what_timm_would_not_build_again_is_refused(self, tmp_path, monkeypatch):
        task, other = random_task(), random_task()
        task.model.extra = torch.nn.Parameter(torch.zeros(1))
        with pytest.raises(ValueError, match=r"(?s)timm does not build test_convnext again from what it saved: .*extra"):
            sharing.save(task, tmp_path / "out", facts(task))
        del task.model.extra
        monkeypatch.setattr(timm, "create_model", lambda *_, **__: other.model)
        with pytest.raises(ValueError, match=r"timm builds another test_convnext from what it saved: stem.0.weight, .* differ"):
            sharing.save(task, tmp_path / "out", facts(task))
        assert not list(tmp_path.iterdir())
