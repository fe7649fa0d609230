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
        routes: How many times regions were chosen; 0 where the file was not asked.
        tied: Of these, how often others were chosen that answer as well, but for rounding; padding alone always ties.
        other: How often others were chosen that do not.
    """

    errors: list[float]
    routes: int = 0
    tied: int = 0
    other: int = 0

    @property
    def holds(self) -> bool:
        """Whether all outputs are within `TOLERANCE`, and no other regions were chosen."""
        return all(error <= TOLERANCE for error in self.errors) and not self.other

    @property
    def finite(self) -> bool:
        """Whether all outputs are numbers, as they must be in any precision."""
        return bool(np.isfinite(self.errors).all())


def agreement(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], outputs: int, rows: bool = False) -> Agreement:
    """Compare the outputs, the first so many, and behind them, if both have them, sorted routes and their affinities, layer by layer.

    With `rows`, the outputs are those of `Detections`, whose rows have no order where scores are alike.
    """
    ours, theirs = found[:outputs], expected[:outputs]
    pairs = paired(ours, theirs) if rows else list(zip(ours, theirs, strict=True))
    errors = [float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)) for a, b in pairs]
    total = Agreement([error if np.isfinite(values).all() else np.nan for error, values in zip(errors, ours, strict=True)])
    if len(found) == outputs:
        return total
    for layer in range(outputs, len(expected), 2):
        (routes, affinities), (other_routes, other_affinities) = ((values[layer], values[layer + 1]) for values in (expected, found))
        differ = (routes != other_routes).any(-1)
        apart = ~(np.abs(affinities - other_affinities).max(-1) <= TOLERANCE * np.abs(affinities).max())  # so is what is no number
        total.routes += differ.size
        total.tied += int((differ & ~apart).sum())
        total.other += int((differ & apart).sum())
    return total


def paired(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Detections (boxes, labels, scores, masks) in pairs: with each expected one the nearest of its label that was found, and the reverse.

    Those that are as unsure as the last that there is room for are left out: which of them there is room for is a matter of rounding.
    """
    least = np.fmax.reduce([found[2][-1], expected[2][-1], 0]) * (1 + TOLERANCE)
    of_expected, of_found = expected[2] > least, found[2] > least
    distance = np.abs(expected[0][:, None] - found[0][None]).max(-1)
    distance[(expected[1][:, None] != found[1][None]) | (expected[2][:, None] <= 0) | (found[2][None] <= 0)] = np.inf
    there, here = distance[of_expected].argmin(1), distance[:, of_found].argmin(0)
    pairs = zip(found, expected, strict=True)
    return [(np.concatenate([a[there], a[of_found]]), np.concatenate([b[of_expected], b[here]])) for a, b in pairs]
