"""The documentation does what it says: its Python runs, its commands parse, its table of models is true."""

import re
import shlex
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import timm
import torch

from debiformer.cli import COMMANDS, detecting, labelling, main, scaling, segmenting, share
from debiformer.models import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page, each below as many empty lines as stand above it there, so that a traceback gives the page's line."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    return ["\n" * PAGES[page].count("\n", 0, match.start(1)) + match[1] for match in found]


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in PAGES[page]])
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    torch.manual_seed(0)
    code = blocks(page, "python")
    assert len(code) == PAGES[page].count("```python")
    namespace = {"__name__": "__main__"}
    for block in code:
        exec(compile(block, ROOT / page, "exec"), namespace)


def commands() -> list[str]:
    """Every `debiformer` line in a block of shell, less its comment."""
    lines = [line for page in PAGES for block in blocks(page, "(?:ba)?sh") for line in block.splitlines()]
    return sorted({shlex.join(shlex.split(line, comments=True)) for line in lines if line.startswith("debiformer ")})


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(line)[1:]
    assert name in COMMANDS
    if "mine.yaml" in arguments:  # which the page shows
        (page,) = (page for page in PAGES if line in PAGES[page])
        (tmp_path / "mine.yaml").write_text(blocks(page, "yaml")[0])
    if name == "fit":  # everything but the checkpoint to resume from, which is not there
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["fit", *arguments, "--print_config"])
        assert "class_path" in capsys.readouterr().out
    if name == "predict":
        kind = "segmentation" if "semantic_fpn" in line else "detection" if "retinanet" in line else "classification"
        if "--engine ray" in line:
            scaling.parse(kind, [word for word in arguments if word not in ("--engine", "ray")])
        else:
            {"segmentation": segmenting, "detection": detecting, "classification": labelling}[kind].parse(arguments)
    if name == "share":
        share.parse(arguments)


def test_the_table_of_models_is_true():
    """But for the multiply-adds, which take long to count: models/test_presets.py does."""
    found = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| [\d.]+ \| (\d+) \| (.+) \|$", PAGES["docs/models.md"], flags=re.MULTILINE)
    expected = []
    for name in PRESETS:
        with torch.device("meta"):
            model = timm.create_model(name)
        parameters = sum(p.numel() for p in model.parameters())
        cfg: Any = model.pretrained_cfg
        expected.append((name, f"{parameters / 1e6:.1f}", str(cfg["input_size"][-1]), cfg["description"]))
    assert found == expected
