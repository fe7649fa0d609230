"""The mean of checkpoints: one model whose weights lie between those of several (Izmailov et al., UAI 2018; Wortsman et al., ICML 2022)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpointing import verify
from .prediction import PREPROCESSING, read_run

ALIKE = ("model", "model_args", "class_names", *PREPROCESSING)  # arguments that checkpoints to average have in common
KEPT = ("epoch", "global_step", "pytorch-lightning_version", "hparams_name", "hyper_parameters", "versions")


def average(checkpoints: Sequence[Path]) -> dict[str, Any]:
    """The content of a checkpoint whose weights are the uniform mean of those of others.

    Floating-point weights and buffers are averaged in float64 and written as they were; whole numbers, such as counts of batches, and
    the arguments of the task come from the last of the checkpoints. `averaged` lists their names. There is no optimizer in it: it is to be
    evaluated and shared, not resumed.

    Raises:
        FileNotFoundError: If a checkpoint is missing.
        ValueError: If there are fewer than two, or one twice; if one is none of a classification run, damaged, holds weights that are not
            finite, or differs from the first in its model, classes, preprocessing or shapes.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"{len(checkpoints)} checkpoint to average: give two or more")
    if len({file.resolve() for file in checkpoints}) < len(checkpoints):
        raise ValueError(f"a checkpoint is given twice: {', '.join(map(str, checkpoints))}")
    contents = [read_run(file) for file in checkpoints]
    for file, content in zip(checkpoints, contents, strict=True):
        verify(file)
        _check_alike(checkpoints[0], contents[0], file, content)
    states = [content["state_dict"] for content in contents]
    last = contents[-1]
    mean = {name: _mean(name, [state[name] for state in states], checkpoints) for name in states[-1]}
    return {key: last[key] for key in KEPT if key in last} | {"state_dict": mean, "averaged": [file.name for file in checkpoints]}


def _mean(name: str, values: list[Tensor], checkpoints: Sequence[Path]) -> Tensor:
    if not values[-1].is_floating_point():
        return values[-1]
    for file, value in zip(checkpoints, values, strict=True):
        if not torch.isfinite(value).all():
            raise ValueError(f"checkpoint {file}: {name} is not finite; leave it out")
    return torch.stack([value.double() for value in values]).mean(dim=0).to(values[-1].dtype)


def _check_alike(first: Path, expected: dict[str, Any], file: Path, found: dict[str, Any]) -> None:
    """Raise a ValueError that names the first thing in which a checkpoint cannot be averaged with the first one."""
    for name in ALIKE:
        then, now = (content["hyper_parameters"][name] for content in (expected, found))
        if (then or None) != (now or None):  # no arguments may be written as none, or as an empty dictionary
            raise ValueError(f"checkpoint {file} cannot be averaged with {first}: {name} is {now}, there {then}")
    then, now = ({name: _shape(value) for name, value in content["state_dict"].items()} for content in (expected, found))
    for name in [*then, *now]:
        if then.get(name) != now.get(name):
            shapes = [shapes.get(name, "missing") for shapes in (now, then)]
            raise ValueError(f"checkpoint {file} cannot be averaged with {first}: {name} is {shapes[0]}, there {shapes[1]}")


def _shape(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
