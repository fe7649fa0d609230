import subprocess
import sys

import pytest
import torch

from debiformer.tasks.checkpointing import WholeCheckpoints, verify

CONTENT = {"weights": torch.arange(100_000.0)}


def test_a_checkpoint_comes_back(tmp_path):
    io, file = WholeCheckpoints(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint(CONTENT, file)
    assert torch.equal(io.load_checkpoint(file)["weights"], CONTENT["weights"])
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_damage_is_found_on_reading(tmp_path, damage):
    io, file = WholeCheckpoints(), tmp_path / "last.ckpt"
    io.save_checkpoint(CONTENT, file)
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"last.ckpt is damaged"):
        io.load_checkpoint(file)
    with pytest.raises(ValueError, match=r"put another one in its place, such as best.ckpt"):
        verify(file)


FULL = """
import resource, signal, sys, torch
from debiformer.tasks.checkpointing import WholeCheckpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
WholeCheckpoints().save_checkpoint({"weights": torch.arange(100_000.0)}, sys.argv[1])
"""


def test_no_room_leaves_the_one_before(tmp_path):
    """The operating system refuses to write more than a part of the file, as a full disk does."""
    file = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"weights": torch.zeros(3)}, file)
    run = subprocess.run([sys.executable, "-c", FULL, str(file)], capture_output=True, text=True, check=False)
    assert f"checkpoint {file} cannot be written" in run.stderr
    assert "the one before it is whole" in run.stderr
    verify(file)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
