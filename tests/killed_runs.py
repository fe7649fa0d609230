"""Train, and kill the run at random moments: python tests/killed_runs.py KILLS SEED ARGUMENTS OF FIT ...

Every start is a fork of this process, which has the libraries loaded, so that most of a start's time is the run's own. The kills are
SIGKILL, which a process cannot see coming. After the last the run is left to finish. Prints how often it was killed at work.
"""

import os
import random
import signal
import sys
import time

from debiformer.cli.training import run

LONGEST = 8.0  # seconds until a kill


def start(arguments: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)  # its loading processes go with it
    run("fit", arguments)
    os._exit(0)


def main(kills: int, seed: int, arguments: list[str]) -> None:
    moments = random.Random(seed)
    hit = 0
    for _ in range(kills):
        pid = start(arguments)
        end = time.monotonic() + moments.uniform(0.5, LONGEST)
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                if status:
                    sys.exit(f"the run failed by itself, status {status}")
                print(hit)
                return
            time.sleep(0.01)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        hit += 1
    _, status = os.waitpid(start(arguments), 0)
    if status:
        sys.exit(f"the run failed by itself, status {status}")
    print(hit)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
