import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from debiformer import __version__
from debiformer.cli import COMMANDS, main, written_by_us
from debiformer.cli.training import known_recipes, task_of
from debiformer.data.blood_cells import SAMPLE

COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}
SMALL_RUN = """
data:
  class_path: debiformer.data.folders.ImageFolders
  init_args: {input_size: 32, batch_size: 5, num_workers: 0}
model: {model: test_convnext, lr: 2.0e-3}
trainer: {accelerator: cpu, max_epochs: 4, log_every_n_steps: 2}
"""


def make_folders(root, splits=("train", "val", "test"), each=6):
    """Noisy squares in three colours, a class each."""
    noise = np.random.default_rng(0)
    for split in splits:
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for k in range(each):
                pixels = noise.normal(colour, 25, (40, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{k}.png")
    return root


def debiformer(*arguments, **options):
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "debiformer", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def test_a_reader_that_has_seen_enough_is_no_error():
    """As `debiformer tables | head -1`."""
    line = (
        f'{sys.executable} -c \'from debiformer.cli import tables, main; tables.run = lambda _: print(10**5 * "row\\n"); main(["tables"])\''
    )
    run = subprocess.run(f"{line} | head -1", shell=True, capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("row\n", "")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data, a small recipe, and a run `small` trained by it."""
    work = tmp_path_factory.mktemp("work")
    make_folders(work / "data")
    (work / "small.yaml").write_text(SMALL_RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert main(["fit", "--config", "small.yaml", "--data.root", "data"]) == 0
    return work


@pytest.fixture
def inside(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


class TestCommands:
    def test_help_lists_every_command(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert all(f"{name:<11} {command.summary}" in shown for name, command in COMMANDS.items())

    def test_help_and_version_load_no_trainer(self):
        script = (
            "import sys; sys.argv = ['debiformer', '--version']\nfrom debiformer.cli import main\ntry: main()\nfinally: print(*sys.modules)"
        )
        out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        assert out.startswith(f"debiformer {__version__}\n")
        assert not {"lightning", "torchmetrics", "jsonargparse", "matplotlib", "rich.table"} & set(out.split())

    def test_an_unknown_command_is_answered_with_the_nearest(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["predct"])
        assert stop.value.code == 2
        assert "no command 'predct': did you mean predict?" in capsys.readouterr().err

    @pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
    def test_a_missing_extra_is_named(self, command, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "torchmetrics", None)  # as if it were not installed
        with pytest.raises(SystemExit) as stop:
            main([command])
        assert stop.value.code == 2
        assert f'debiformer {command} needs torchmetrics: pip install "debiformer[train]"' in capsys.readouterr().err


def test_a_cause_that_was_never_raised_is_no_obstacle():
    """Some libraries make an error the cause of another without raising it."""
    with pytest.raises(RuntimeError) as found:
        raise RuntimeError("no network") from OSError("made, and not raised")
    assert written_by_us(found.value) is None


class TestFit:
    def test_a_run_leaves_its_best_and_last_checkpoint_logs_and_config(self, inside):
        run = Path("runs/small")
        last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
        assert (last["epoch"], last["global_step"]) == (3, 4 * 3)  # 18 images make three whole batches of five
        assert last["hyper_parameters"]["class_names"] == ["blue", "green", "red"]
        assert last["hyper_parameters"]["input_size"] == (3, 32, 32)
        rows = list(csv.DictReader((run / "csv/version_0/metrics.csv").open()))
        assert [int(row["epoch"]) for row in rows if row["val/acc"]] == [0, 1, 2, 3]
        best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
        accuracies = [float(row["val/acc"]) for row in rows if row["val/acc"]]
        assert accuracies[best["epoch"]] == max(accuracies)
        assert list(run.glob("events.out.tfevents.*"))
        assert (run / "config.yaml").is_file()

    def test_a_finished_run_stays_as_it_is(self, inside, capsys):
        before = Path("runs/small/checkpoints/last.ckpt").read_bytes()
        assert main(["fit", "--config", "small.yaml", "--data.root", "data"]) == 0
        assert "runs/small/checkpoints/best.ckpt (val/acc" in capsys.readouterr().out
        assert Path("runs/small/checkpoints/last.ckpt").read_bytes() == before

    def test_a_run_goes_on_with_the_settings_it_began_with_or_not_at_all(self, inside, capsys):
        changed = ["--model.lr", "0.5", "--data.crop_pct", "0.9", "--data.num_workers", "1"]  # the last is of no consequence
        assert main(["fit", "--config", "small.yaml", "--data.root", "data", *changed]) == 2
        told = (
            "runs/small holds a run with other settings: data.init_args.crop_pct was 0.875 and is 0.9, model.lr was 0.002 and is 0.5. Go on"
        )
        assert told in capsys.readouterr().err

    def test_other_images_in_the_same_number_are_told(self, inside):
        shutil.copytree("data", "others")
        with pytest.warns(UserWarning, match="goes on as if the images were the same: data.init_args.root was data and is others"):
            assert main(["fit", "--config", "small.yaml", "--data.root", "others"]) == 0

    def test_two_processes_do_not_train_the_same_run(self, inside, capsys):
        lock = "file = open('runs/small/.lock', 'w'); fcntl.lockf(file, fcntl.LOCK_EX)"
        holder = f"import fcntl, sys; {lock}; print(flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            assert main(["fit", "--config", "small.yaml", "--data.root", "data"]) == 2
            process.stdin.close()
        assert "runs/small is being trained by another process: wait for it, or" in capsys.readouterr().err
        assert main(["fit", "--config", "small.yaml", "--data.root", "data"]) == 0

    def test_a_killed_run_goes_on_with_the_same_command(self, inside):
        command = ("fit", "--config", "small.yaml", "--data.root", "data", "--name", "killed", "--trainer.max_epochs", "20")
        last = Path("runs/killed/checkpoints/last.ckpt")
        process = debiformer(*command)
        while not last.exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        saved = torch.load(last, weights_only=True)
        assert saved["epoch"] < 19, "the run ended before it could be killed"

        process = debiformer(*command)
        out, _ = process.communicate()
        assert process.returncode == 0, out
        resumed = torch.load(last, weights_only=True)
        assert (resumed["epoch"], resumed["global_step"]) == (19, 3 * 20)
        logs = [list(csv.DictReader(path.open())) for path in sorted(Path("runs/killed/csv").glob("*/*.csv"))]
        validated = [[int(row["epoch"]) for row in rows if row["val/acc"]] for rows in logs]
        assert len(validated) == 2
        assert validated[1][0] == saved["epoch"] + 1
        assert {epoch for epochs in validated for epoch in epochs} == set(range(20))
        assert "debiformer predict --checkpoint runs/killed/checkpoints/best.ckpt" in out

    def test_a_checkpoint_to_go_on_from_must_exist(self, inside, capsys):
        assert main(["fit", "--config", "small.yaml", "--data.root", "data", "--name", "new", "--ckpt_path", "absent.ckpt"]) == 2
        assert "checkpoint absent.ckpt: no such file" in capsys.readouterr().err

    def test_a_damaged_checkpoint_is_named(self, inside, tmp_path, capsys):
        shutil.copytree("runs/small", tmp_path / "damaged")
        last = tmp_path / "damaged/checkpoints/last.ckpt"
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
        command = ["fit", "--config", "small.yaml", "--data.root", "data", "--name", "damaged", "--trainer.default_root_dir", str(tmp_path)]
        (tmp_path / "damaged/config.yaml").write_text(Path("runs/small/config.yaml").read_text().replace("name: small", "name: damaged"))
        for line in (command, ["validate", "--ckpt_path", str(last)], ["predict", "--checkpoint", str(last), "data"]):
            assert main(line) == 2
            assert f"checkpoint {last} is damaged in archive/data/" in capsys.readouterr().err
        last.write_bytes(content[:-1000])
        assert main(command) == 2
        assert f"checkpoint {last} is damaged: " in capsys.readouterr().err

    def test_a_folder_of_something_else_is_left_alone(self, inside, capsys):
        Path("runs/thesis").mkdir()
        Path("runs/thesis/chapter.tex").touch()
        assert main(["fit", "--config", "small.yaml", "--data.root", "data", "--name", "thesis"]) == 2
        assert "runs/thesis is no run of debiformer fit, it has no config.yaml: name another folder with --name" in capsys.readouterr().err

    def test_a_place_that_cannot_be_written_is_named(self, inside, capsys):
        root = ["--trainer.default_root_dir", "/proc/runs"]  # which refuses root too
        assert main(["fit", "--config", "small.yaml", "--data.root", "data", *root]) == 2
        assert "no place for the run /proc/runs/small, /proc cannot be written" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "needs --config"),
            (["--config", "image_foldr"], "did you mean image_folder?"),
            (["--config", "debiformer_small"], "did you mean imagenet1k/debiformer_small"),
            (["--config", "absent.yaml"], "--config absent.yaml: no such file"),
            (["--config", "small.yaml", "--name", "x", "--data.root", "absent"], "error: root=absent: no such folder\n"),
            (
                ["--config", "small.yaml", "--name", "x", "--data.root", "data", "--model.model", "debiformer_tinny"],
                "did you mean debiformer_tiny",
            ),
        ],
    )
    def test_mistakes_are_named_before_anything_is_written(self, inside, capsys, arguments, message):
        assert main(["fit", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not Path("runs/x").exists()


def recipes():
    """Those of classification; of what differs from others in the size of the model alone, thoroughly."""
    large = ("debiformer_base", "debiformer_base_released", "debiformer_small_released", "biformer_base")
    for name, file in known_recipes().items():
        if task_of([file]) == "classification":
            yield pytest.param(name, marks=pytest.mark.thorough if name.rpartition("/")[2] in large else ())


@pytest.mark.parametrize("recipe", list(recipes()))
def test_every_recipe_trains(recipe, tmp_path, monkeypatch):
    """Two updates on photographs of blood cells, with nothing changed but sizes, files and the length of the run."""
    monkeypatch.chdir(tmp_path)
    where = {"cifar10": ["--data.train_root", SAMPLE / "train", "--data.val_root", SAMPLE / "val"], "blood_cells": []}
    options = where.get(recipe.split("/")[0], ["--data.root", SAMPLE])
    if recipe in ("imagenet1k/finetune_384", "imagenet1k/linear_probe"):  # which begin with a published checkpoint of a thousand classes
        torch.save(timm.create_model("debiformer_small").state_dict(), "published.pth")
        options += ["--model.pretrained", "published.pth"]
    small = ["--data.batch_size", 4, "--data.num_workers", 0, "--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 1]
    small += ["--data.input_size", 96 if recipe == "imagenet1k/finetune_384" else 64, "--trainer.precision", "32-true"]
    short = ["--trainer.max_epochs", 1, "--model.warmup_epochs", 0, "--trainer.num_sanity_val_steps", 0, "--trainer.accelerator", "cpu"]
    line = ["--config", recipe, *options, *small, *short, "--trainer.log_every_n_steps", 1, "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *map(str, line)]) == 0
    (run,) = Path("runs").iterdir()
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert last["hyper_parameters"]["model"] in timm.list_models("*biformer*") + timm.list_models("debiformer*")
    losses = [float(row["train/loss"]) for row in csv.DictReader((run / "csv/version_0/metrics.csv").open()) if row["train/loss"]]
    assert len(losses) == 2
    assert all(0 < loss < math.inf for loss in losses)


class TestEvaluate:
    @pytest.mark.parametrize(("command", "prefix"), [("validate", "val"), ("test", "test")])
    def test_the_table_agrees_with_the_model(self, inside, capsys, command, prefix):
        from debiformer.data.images import eval_transform, read_image
        from debiformer.tasks.prediction import load_classifier

        assert main([command, "--ckpt_path", "runs/small/checkpoints/best.ckpt"]) == 0
        out = capsys.readouterr().out
        task = load_classifier(Path("runs/small/checkpoints/best.ckpt"))
        transform = eval_transform(32, crop_pct=0.875)
        for target, name in enumerate(COLOURS):
            inputs = torch.stack([transform(read_image(path)) for path in sorted(Path("data", prefix, name).iterdir())])
            recall = (task(inputs).argmax(1) == target).float().mean().item()
            assert next(line.split()[1:6:2] for line in out.splitlines() if f" {name} " in line) == [name, "6", f"{recall:.4f}"]

    def test_a_checkpoint_is_needed(self, inside, capsys):
        assert main(["test"]) == 2
        assert "debiformer test needs --ckpt_path" in capsys.readouterr().err

    def test_a_missing_or_moved_checkpoint_is_named(self, inside, tmp_path, capsys):
        assert main(["test", "--ckpt_path", "runs/absent/checkpoints/best.ckpt"]) == 2
        assert "checkpoint runs/absent/checkpoints/best.ckpt: no such file" in capsys.readouterr().err
        moved = tmp_path / "elsewhere" / "best.ckpt"
        moved.parent.mkdir()
        moved.write_bytes(Path("runs/small/checkpoints/best.ckpt").read_bytes())
        assert main(["test", "--ckpt_path", str(moved)]) == 2
        assert f"there is no {tmp_path / 'config.yaml'}" in capsys.readouterr().err
        assert main(["test", "--ckpt_path", str(moved), "--config", "runs/small/config.yaml"]) == 0

    def test_the_model_comes_from_the_checkpoint_whatever_the_recipe_says(self, inside, capsys):
        best = "runs/small/checkpoints/best.ckpt"
        recipe = ["--config", "image_folder", "--data.root", "data", "--data.input_size", "32", "--data.num_workers", "0"]
        assert main(["test", "--ckpt_path", best, *recipe, "--trainer.accelerator", "cpu"]) == 0
        by_recipe = capsys.readouterr().out
        assert main(["test", "--ckpt_path", best]) == 0
        own = capsys.readouterr().out
        assert by_recipe[by_recipe.index("per class") :] == own[own.index("per class") :]

    def test_other_classes_are_refused(self, inside, tmp_path, capsys):
        make_folders(tmp_path, each=1)
        for split in ("train", "val", "test"):
            (tmp_path / split / "red").rename(tmp_path / split / "yellow")
        assert main(["test", "--ckpt_path", "runs/small/checkpoints/best.ckpt", "--data.root", str(tmp_path)]) == 2
        assert "trained on the classes ['blue', 'green', 'red'], the data has ['blue', 'green', 'yellow']" in capsys.readouterr().err

    def test_other_preprocessing_is_reported(self, inside):
        with pytest.warns(UserWarning, match=r"data.input_size is \(3, 64, 64\) here; checkpoint .* was trained with \(3, 32, 32\)"):
            assert main(["test", "--ckpt_path", "runs/small/checkpoints/best.ckpt", "--data.input_size", "64"]) == 0


class TestPredict:
    CHECKPOINT = ("--checkpoint", "runs/small/checkpoints/best.ckpt", "--device", "cpu")

    @pytest.fixture
    def mixed(self, inside, tmp_path):
        """Good files, whose names the screen's markup could mistake, among unreadable ones."""
        Image.new("RGB", (50, 30), COLOURS["red"]).save(tmp_path / "a [red].png")
        (tmp_path / "b.jpg").write_text("not an image")
        (tmp_path / "c.png").write_bytes((tmp_path / "a [red].png").read_bytes()[:60])
        Image.new("RGB", (30, 50), COLOURS["blue"]).save(tmp_path / "d,blue.png")
        return tmp_path

    def test_good_and_bad_files_to_csv(self, mixed, capsys, tmp_path_factory):
        output = tmp_path_factory.mktemp("out") / "labels.csv"
        assert main(["predict", *self.CHECKPOINT, str(mixed), "--output", str(output), "--topk", "2", "--batch-size", "3"]) == 0
        rows = list(csv.DictReader(output.open(encoding="utf-8")))
        assert list(rows[0]) == ["file", "label", "probability", "label_2", "probability_2", "error"]
        assert [Path(row["file"]).name for row in rows] == ["a [red].png", "b.jpg", "c.png", "d,blue.png"]
        assert [row["label"] for row in rows] == ["red", "", "", "blue"]
        assert [bool(row["error"]) for row in rows] == [False, True, True, False]
        assert "b.jpg" in rows[1]["file"]
        assert "b.jpg" not in rows[1]["error"]
        assert 1 >= float(rows[0]["probability"]) > float(rows[0]["probability_2"]) >= 0
        screen = capsys.readouterr()
        assert "[red]" in screen.out.replace("\n", "").replace(" ", "")
        assert "2 labelled, 2 unreadable" in screen.err

    def test_json_lines_hold_the_model_s_probabilities(self, mixed, tmp_path_factory):
        from debiformer.data.images import eval_transform, read_image
        from debiformer.tasks.prediction import load_classifier

        output = tmp_path_factory.mktemp("out") / "labels.jsonl"
        assert main(["predict", *self.CHECKPOINT, str(mixed), "--output", str(output)]) == 0
        first, bad, *_ = map(json.loads, output.read_text().splitlines())
        assert (bad["predictions"], "b.jpg" in bad["file"], bool(bad["error"])) == ([], True, True)
        task = load_classifier(Path("runs/small/checkpoints/best.ckpt"))
        probabilities = task(eval_transform(32)(read_image(mixed / "a [red].png"))[None]).softmax(-1)[0]
        found = {guess["label"]: guess["probability"] for guess in first["predictions"]}
        assert [found[name] for name in COLOURS] == pytest.approx(probabilities.tolist(), abs=1e-5)

    def test_a_file_named_like_an_option(self, mixed, monkeypatch):
        checkpoint = str(Path(self.CHECKPOINT[1]).absolute())
        (mixed / "d,blue.png").rename(mixed / "-d.png")
        monkeypatch.chdir(mixed)
        assert main(["predict", "--checkpoint", checkpoint, "--device", "cpu", "--output", "labels.jsonl", "--", "-d.png"]) == 0
        (line,) = map(json.loads, Path("labels.jsonl").read_text().splitlines())
        assert (line["file"], line["predictions"][0]["label"]) == ("-d.png", "blue")

    def test_nothing_readable_exits_with_1(self, mixed):
        assert main(["predict", *self.CHECKPOINT, str(mixed / "b.jpg"), str(mixed / "c.png")]) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["data", "--output", "labels.txt"], "--output labels.txt: the suffix must be .csv or .jsonl"),
            (["data", "--output", "absent/labels.csv"], "there is no folder absent"),
            (["absent.png"], "absent.png"),
            (["data", "--checkpoint", "absent.ckpt"], "absent.ckpt: no such file"),
            (["data", "--checkpoint", "small.yaml"], "small.yaml is not a torch checkpoint"),
        ],
    )
    def test_mistakes_are_named(self, inside, capsys, arguments, message):
        assert main(["predict", *self.CHECKPOINT, *arguments]) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert not shown.out

    @pytest.mark.parametrize(("option", "value"), [("--topk", "0"), ("--batch-size", "many"), ("--device", "abacus")])
    def test_bad_options_are_named(self, inside, capsys, option, value):
        with pytest.raises(SystemExit):
            main(["predict", *self.CHECKPOINT, "data", option, value])
        assert f"argument {option}: '{value}'" in capsys.readouterr().err
