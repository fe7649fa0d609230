"""How far a file agrees with the model that it was made from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-5  # of float32, relative


@dataclass
class Agreement:
    """What came out of a file, against eager mode on the same images.

    Attributes:
        errors: Of each output, the norm of the difference relative to the norm.
        routes: Sets of regions that were chosen; 0 where the file was not asked.
        other_routes: Of these, how many differ.
    """

    errors: list[float]
    routes: int = 0
    other_routes: int = 0

    @property
    def holds(self) -> bool:
        """Whether all outputs are within `TOLERANCE`, and all routes equal."""
        return max(self.errors) <= TOLERANCE and not self.other_routes


def agreement(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], outputs: int) -> Agreement:
    """Compare the outputs, the first so many, and the sorted routes behind them, if there are any in both."""
    errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found[:outputs], expected[:outputs], strict=True)]
    pairs = [*zip(found[outputs:], expected[outputs:], strict=False)]
    differing = sum(int((a != b).any(-1).sum()) for a, b in pairs)
    return Agreement(errors, sum(b[..., 0].size for _, b in pairs), differing)
