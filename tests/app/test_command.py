"""The command app: what it offers, what it refuses, and that it serves and ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from tasks_on_disk import CLASSES, random_task, save

from debiformer.app.explorer import LONG_SIDE, Explorer, bundled
from debiformer.app.seeing import load_model, untrained
from debiformer.cli import main
from debiformer.cli.exploring import latest_runs, sources
from debiformer.models.swin_layout import MIXERS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    task = random_task("debiformer_nano", input_size=(3, 64, 64), crop_pct=1.0)
    folder = tmp_path_factory.mktemp("runs") / "mine" / "checkpoints"
    folder.mkdir(parents=True)
    return save(task, folder / "best.ckpt")


def test_models_are_offered_by_the_names_of_their_runs(checkpoint):
    names = list(sources([str(checkpoint), "hf-hub:us/model"], torch.device("cpu")))
    assert names[:2] == [str(checkpoint.parents[1]), "hf-hub:us/model"]
    assert len(names[2:]) == len(MIXERS) - 1
    assert all(name.startswith("untrained: ") for name in names[2:])


def test_runs_of_the_folder_are_found_newest_first(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert latest_runs() == []
    for seconds, name in ((100, "old"), (200, "new")):
        file = tmp_path / "runs" / name / "checkpoints" / "best.ckpt"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (seconds, seconds))
    assert latest_runs() == ["runs/new/checkpoints/best.ckpt", "runs/old/checkpoints/best.ckpt"]


def test_what_will_not_do_is_said_before_the_page_opens(tmp_path, checkpoint, capsys):
    assert main(["app", str(tmp_path / "none.ckpt"), "--port", "0"]) == 2
    assert "none.ckpt: no such file" in capsys.readouterr().err
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    assert main(["app", str(checkpoint), str(tmp_path / "bad.ckpt"), "--port", "0"]) == 2
    assert "bad.ckpt" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", str(checkpoint), "--port", str(port)]) == 2
    assert f"--port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err
    assert main(["app", "--port", "70000"]) == 2
    assert "--port 70000" in capsys.readouterr().err


def test_it_serves_until_it_is_interrupted(checkpoint, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "debiformer", "app", str(checkpoint), "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as served:
        try:
            said = served.stdout.readline()
            assert re.fullmatch(rf"The explorer is at http://127\.0\.0\.1:{port}/? until you press Ctrl-C\.\n", said)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                assert b"DeBiFormer explorer" in answer.read()
            served.send_signal(signal.SIGINT)
            rest, _ = served.communicate(timeout=60)
        finally:
            served.kill()
    assert "Traceback" not in rest
    assert served.returncode == 0


def test_pictures_and_views_are_kept_and_bounded(checkpoint, tmp_path):
    explorer = Explorer({"mine": lambda: load_model(str(checkpoint))})
    file = str(bundled()[0])
    assert explorer.view("mine", file) is explorer.view("mine", file)
    for i in range(20):
        Image.new("RGB", (40, 30), (i, i, i)).save(tmp_path / f"{i}.png")
        explorer.view("mine", str(tmp_path / f"{i}.png"))
    assert len(explorer._views.values) == 8
    assert len(explorer._pictures.values) == 16
    Image.fromarray(np.zeros((1000, 2000, 3), dtype=np.uint8)).save(tmp_path / "large.png")
    assert explorer.picture(str(tmp_path / "large.png")).size == (LONG_SIDE, LONG_SIDE // 2)
    (tmp_path / "bad.png").write_text("nothing")
    with pytest.raises(ValueError, match=r"^bad\.png: not an image"):
        explorer.picture(str(tmp_path / "bad.png"))


def test_findings_are_what_the_command_line_predicts(checkpoint, capsys):
    file = bundled()[1]
    explorer = Explorer({"mine": lambda: load_model(str(checkpoint))})
    found = dict(explorer.findings("mine", str(file)).shares)
    assert main(["predict", "--checkpoint", str(checkpoint), str(file), "--device", "cpu"]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert sorted(found) == CLASSES
    for label, share in found.items():
        assert re.search(rf"\b{label}\b.*{share:.4f}|{share:.4f}", said)


def test_untrained_models_are_the_same_each_time():
    image = Image.new("RGB", (64, 64), "teal")
    torch.manual_seed(5)
    first, second = (untrained("block_grid", size=64).see(image).look.output for _ in range(2))
    assert torch.equal(first, second)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), expected)  # nor does it touch the generator of others
