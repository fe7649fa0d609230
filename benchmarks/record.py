"""Results with what they were measured on: benchmarks/results/NAME.json."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "numpy")


def processor() -> str:
    """The processor's own name where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def save(name: str, results: Any, device: str = "cpu", packages: Sequence[str] = ()) -> Path:
    """Write results beside the command, the machine, the versions and the date; those of a GPU go by its name too."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]  # where files lie here means nothing elsewhere
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
    if device != "cpu":
        machine["gpu"] = torch.cuda.get_device_name(device)
    versions = {package: version(package) for package in (*PACKAGES, *packages)}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    found = dict(date=date.today().isoformat(), command=command, machine=machine, versions=versions, results=results)
    path.write_text(json.dumps(found, indent=2) + "\n")
    return path
