import pytest
import safetensors.torch
import timm
import torch
from goldens import Golden

import debiformer
from debiformer.cli import main


@pytest.mark.parametrize(
    ("case", "preset", "kind", "kwargs"),
    [
        ("biformer_tiny", "biformer_tiny", "a classifier of 1000 classes", {}),
        ("debi_det_tiny_96x160", "debiformer_tiny", "a backbone without classifier", dict(num_classes=0, feature_norms=True)),
    ],
)
def test_converts_and_names_the_preset(tmp_path, capsys, case, preset, kind, kwargs):
    golden = Golden(case)
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"model": golden.state_dict}, source)
    assert main(["convert", str(source), str(out)]) == 0
    assert f"{preset}, {kind}" in capsys.readouterr().out
    model, expected = (timm.create_model(preset, **kwargs) for _ in range(2))
    model.load_state_dict(safetensors.torch.load_file(out))
    debiformer.load_published(golden.state_dict, expected)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))


def test_errors_come_before_any_work(tmp_path, capsys):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "in.pth")
    for output, message in [("out.pth", "must end in .safetensors"), ("no/out.safetensors", "there is no folder")]:
        assert main(["convert", str(tmp_path / "nowhere.pth"), str(tmp_path / output)]) == 2
        assert message in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "these weights fit none of debiformer_nano" in error
    assert "1 unexpected:\n  a" in error
    assert not (tmp_path / "out.safetensors").exists()


def test_models_lists_every_preset_with_its_published_numbers(capsys):
    assert main(["models"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if "former" in line}
    assert lines["debiformer_small"][1:4] == ["44.0", "5.40", "224"]
    assert lines["biformer_stl"][1:4] == ["28.4", "4.57", "224"]
    assert "not from the paper" in " ".join(lines["debiformer_nano"])
