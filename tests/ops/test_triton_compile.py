"""Every kernel compiles for the GPUs that are meant, and fits their registers; no GPU is needed to see that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from debiformer.ops.backends import WIDEST_HEAD

pytest.importorskip("triton", reason="Triton is not installed")


# Of its own accord, ptxas spills a register or two where that makes room for one more block.
HARMLESS = 16  # bytes
# Compute capability, dtype, width of a head, and bytes that may be spilled: the models', and the widest heads. A minute each.
CASES = [
    (80, "float32", 32, HARMLESS),
    (90, "bfloat16", 32, HARMLESS),
    (80, "float16", 64, 2 * HARMLESS),
    pytest.param(80, "float16", 32, HARMLESS, marks=pytest.mark.thorough),
    pytest.param(90, "float32", 32, HARMLESS, marks=pytest.mark.thorough),
    pytest.param(90, "bfloat16", 64, HARMLESS, marks=pytest.mark.thorough),
]


@pytest.mark.parametrize(("capability", "dtype", "width", "harmless"), CASES)
def test_nothing_spills(capability, dtype, width, harmless):
    assert width <= WIDEST_HEAD[getattr(torch, dtype)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("kernel_resources.py")
    command = [sys.executable, str(script), str(capability), dtype, str(width)]
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    assert len({name.split()[0] for name in kernels}) == 7
    assert not {name: kernel for name, kernel in kernels.items() if kernel["spilled"] > harmless}
