"""The quickstart with a few steps of training: everything but the accuracy."""

import re

import numpy as np
from PIL import Image

from debiformer.cli import main
from debiformer.data.blood_cells import linear_baseline

SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--model.warmup_epochs=0", "--trainer.limit_val_batches=2"]


def test_trains_tests_compares_and_draws_and_keeps_an_earlier_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "runs" / "quickstart" / "quickstart.png"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("drawn yesterday")
    assert main(["quickstart", "--seed", "1", *SHORT]) == 0
    assert earlier.read_text() == "drawn yesterday"
    out = capfd.readouterr().out
    for label, crops in (("platelet", 69), ("rbc", 408), ("wbc", 71)):
        assert re.search(rf"{label}\D+{crops}\D+[01]\.\d+\D+[01]\.\d+", out), out
    assert f"{linear_baseline().balanced_accuracy:.3f}" in out
    assert "debiformer predict --checkpoint runs/quickstart-2/checkpoints/best.ckpt" in out
    figure = np.asarray(Image.open(tmp_path / "runs/quickstart-2/quickstart.png").convert("RGB"))
    assert min(figure.shape[:2]) > 600
    assert len(np.unique(figure.reshape(-1, 3), axis=0)) > 10_000  # photographs, not a blank page
    assert (tmp_path / "runs/quickstart-2/checkpoints/last.ckpt").is_file()
