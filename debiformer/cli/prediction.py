"""Command predict: what a checkpoint finds in images. Each task has its own options and its own output."""

import argparse

from ..tasks.prediction import kind_at
from . import detecting, labelling, segmenting

RUNS = {"classification": labelling.run, "segmentation": segmenting.run, "detection": detecting.run}


def run(arguments: list[str]) -> int:
    """Predict with a checkpoint of any task; returns the exit code.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is none.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint")
    checkpoint = parser.parse_known_args(arguments)[0].checkpoint
    return RUNS["classification" if checkpoint is None else kind_at(checkpoint)](arguments)
