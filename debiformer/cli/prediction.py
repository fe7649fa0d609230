"""Command predict: what a checkpoint finds in images. Each task has its own options and its own output."""

import argparse

from ..tasks.prediction import kind_at
from . import detecting, labelling, lacking, segmenting

RUNS = {"classification": labelling.run, "segmentation": segmenting.run, "detection": detecting.run}
ENGINES = ("local", "ray")


def run(arguments: list[str]) -> int:
    """Predict with a checkpoint of any task; returns the exit code.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ModuleNotFoundError: If the engine is not installed.
        ValueError: If it is no checkpoint.
    """
    parser = argparse.ArgumentParser(prog="debiformer predict", add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint")
    parser.add_argument("--engine", choices=ENGINES, default="local")
    options, others = parser.parse_known_args(arguments)
    kind = "classification" if options.checkpoint is None else kind_at(options.checkpoint)
    others = [*([] if options.checkpoint is None else ["--checkpoint", options.checkpoint]), *others]
    if options.engine == "local":
        return RUNS[kind](others)
    missing = lacking("predict --engine ray", ("train", "scale"))
    if missing:
        raise ModuleNotFoundError(missing)
    from . import scaling

    return scaling.run(kind, others)
