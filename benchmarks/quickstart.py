"""The quickstart on three seeds, as a user runs it: python benchmarks/quickstart.py

Prints balanced accuracy on the held-out images, that of a linear classifier on the raw pixels, and the seconds of the whole command.
"""

import re
import subprocess
import sys
import tempfile
import time

from record import save

SEEDS = (0, 1, 2)


def run(seed: int) -> dict[str, float]:
    """One quickstart in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "debiformer", "quickstart", "--seed", str(seed)]
        out = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
        seconds = time.perf_counter() - started
    linear, nano = (float(x) for x in re.search(r"balanced \(mean\).*?(0\.\d+|1\.0+)\D+(0\.\d+|1\.0+)", out).groups())
    training = float(re.search(r"\((\d+) s of training\)", out)[1])
    return dict(seed=seed, balanced_accuracy=nano, linear=linear, seconds=round(seconds), training_seconds=training)


if __name__ == "__main__":
    rows = []
    for seed in SEEDS:
        rows.append(run(seed))
        print(rows[-1], flush=True)
    print("balanced accuracy: lowest", min(r["balanced_accuracy"] for r in rows), "; linear", rows[0]["linear"])
    print(save("quickstart", rows, packages=["lightning"]))
