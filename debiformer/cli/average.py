"""Command average: one checkpoint whose weights are the mean of several."""

import argparse
from pathlib import Path

from ..tasks.averaging import average
from ..tasks.checkpointing import WholeCheckpoints


def run(arguments: list[str]) -> int:
    """Average checkpoints into a file that validate, test, predict and share take.

    Raises:
        ValueError: If the output is no .ckpt file, or the checkpoints cannot be averaged.
        FileNotFoundError: If a checkpoint or the output's folder is missing.
        FileExistsError: If the output exists.
        OSError: If it cannot be written.
    """
    parser = argparse.ArgumentParser(prog="debiformer average", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="checkpoints of one run, or of runs of one recipe")
    parser.add_argument(
        "--output", required=True, type=Path, help="the .ckpt file to write; in the folder of a run's checkpoints it belongs to it"
    )
    options = parser.parse_args(arguments)
    output = options.output
    if output.suffix != ".ckpt":
        raise ValueError(f"--output {output} must end in .ckpt")
    if output.exists():
        raise FileExistsError(f"--output {output} is there already: name another file")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: there is no folder {output.parent}")
    WholeCheckpoints().save_checkpoint(average(options.checkpoints), output)
    print(f"{output}: the mean of {', '.join(file.name for file in options.checkpoints)}")
    print(f"to validate  debiformer validate --ckpt_path {output}")
    return 0
