"""Cases in fresh processes: with an allocator of their own, and no memory of what ran before."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALLOCATORS = {
    "default": {},
    # glibc keeps large temporaries instead of returning them to the system after every use
    "tuned": {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_TOP_PAD_": str(128 << 20)},
}


def call(script: str, case: dict[str, Any], allocator: str = "default", seconds: float | None = None) -> Any:
    """What `answer` in this script gives for a case, or None if it takes longer than `seconds`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | ALLOCATORS[allocator]
    command = [sys.executable, script, "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def answer(measure: Callable[..., Any]) -> bool:
    """Whether this process was started by `call`; the case is then measured and the result printed."""
    if sys.argv[1:2] != ["--case"]:
        return False
    print(json.dumps(measure(**json.loads(sys.argv[2]))))
    return True


def limit_memory(share: float = 0.85) -> int:
    """Let this process fail, rather than the machine, when it asks for more than a share of the free memory; returns the bytes."""
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    limit = int(share * available)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return limit
