"""Command models: the presets with parameters, MACs and a line on each."""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import timm

from ..models import PRESETS
from .bench import count


class Row(NamedTuple):
    """One preset: millions of parameters, billions of multiply-adds at the input size of its config, and what it is."""

    name: str
    parameters: float
    macs: float
    size: int
    description: str


def rows() -> Iterator[Row]:
    """Every preset, at the input size of its config."""
    for name in PRESETS:
        cfg: Any = timm.get_pretrained_cfg(name)
        parameters, macs = count(name, cfg.input_size[1:])
        yield Row(name, parameters / 1e6, macs / 1e9, cfg.input_size[-1], cfg.description)


def run(arguments: list[str]) -> int:
    """Print the table."""
    argparse.ArgumentParser(prog="debiformer models", description=__doc__).parse_args(arguments)
    print(f"{'preset':<25}{'params, M':>10}{'GMACs':>8}{'at':>5}  description")
    for row in rows():
        print(f"{row.name:<25}{row.parameters:>10.1f}{row.macs:>8.2f}{row.size:>5}  {row.description}")
    print('\ntimm.create_model("debiformer_small", num_classes=10) after import debiformer; all take any image from 32x32 up')
    return 0
