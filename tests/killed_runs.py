"""Train, and kill the run at random moments: python tests/killed_runs.py KILLS SEED ARGUMENTS OF FIT ...

Every start is a fork of this process, which has the libraries loaded, so that most of a start's time is the run's own. The kills are
SIGKILL, which a process cannot see coming. After the last the run is left to finish. Prints how often it was killed at work.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from debiformer.cli.training import run

LAST = Path("runs/run/checkpoints/last.ckpt")


def start(arguments: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)  # its loading processes go with it
    run("fit", arguments)
    os._exit(0)


def wait(moments: random.Random, over: Callable[[], bool]) -> None:
    """Until the moment of a kill: some time after the start, or soon after the run has written its next checkpoint, however fast it is."""
    if moments.random() < 0.3:
        end = time.monotonic() + moments.uniform(0.5, 4.0)
    else:
        before = written()
        while written() == before and not over():
            time.sleep(0.01)
        end = time.monotonic() + moments.uniform(0.0, 0.2)
    while time.monotonic() < end and not over():
        time.sleep(0.01)


def written() -> int:
    """Which last.ckpt there is: each takes the place of the one before."""
    return LAST.stat().st_mtime_ns if LAST.exists() else 0


def main(kills: int, seed: int, arguments: list[str]) -> None:
    moments = random.Random(seed)
    hit = 0
    for _ in range(kills):
        pid = start(arguments)
        status: list[int] = []

        def over(pid=pid, status=status) -> bool:
            done, code = os.waitpid(pid, os.WNOHANG) if not status else (0, 0)
            status.extend([code] if done else [])
            return bool(status)

        wait(moments, over)
        if over():
            if status[0]:
                sys.exit(f"the run failed by itself, status {status[0]}")
            print(hit)
            return
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        hit += 1
    _, code = os.waitpid(start(arguments), 0)
    if code:
        sys.exit(f"the run failed by itself, status {code}")
    print(hit)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
