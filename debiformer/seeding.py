"""Random numbers as a function of what they are for, so that a run that was cut off goes on with those it would have had."""

import os
import random
from enum import IntEnum

import numpy as np
import torch


class Use(IntEnum):
    """What random numbers are for; no two uses share theirs."""

    ORDER = 0  # of images in an epoch
    IMAGE = 1  # augmentation of one image
    ERASING = 2  # of a batch
    STEP = 3  # mixing, dropout and stochastic depth of a training step


def run_seed() -> int:
    """The seed that Lightning's `seed_everything` was called with; 0 where it was not."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def seed_from(use: Use, *key: int) -> int:
    """A seed of 63 bits from numbers of 0 and above: unlike their sum, it differs wherever they do."""
    return int(np.random.SeedSequence((use, *key)).generate_state(1, np.uint64)[0] >> 1)


def reseed(use: Use, *key: int, devices: bool = True) -> None:
    """Seed the generators of Python, NumPy and PyTorch from `key` and from nothing else; those of accelerators only with `devices`."""
    seed = seed_from(use, *key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)  # three times as fast, and fit for loading processes
