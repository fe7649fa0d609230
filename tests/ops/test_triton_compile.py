"""Every kernel compiles for the GPUs that are meant, and fits their registers; no GPU is needed to see that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


# Of its own accord, ptxas spills a register or two where that makes room for one more block.
HARMLESS = 16  # bytes


@pytest.mark.parametrize(("capability", "dtype"), [(80, "float16"), (80, "float32"), (90, "bfloat16"), (90, "float32")])
def test_nothing_spills(capability, dtype):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("kernel_resources.py")
    command = [sys.executable, str(script), str(capability), dtype]
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    assert len({name.split()[0] for name in kernels}) == 7
    assert not {name: kernel for name, kernel in kernels.items() if kernel["spilled"] > HARMLESS}
