"""The one way to answer a name nobody knows: with the names nearest to it."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause naming up to three `known` names nearest to `name`, or all of them where none is near and they are few."""
    known = list(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    return "choose from " + ", ".join(known) if len(known) <= 20 else "nothing known is spelt like it"


def check_names(argument: str, given: dict[str, Any], taker: str, known: list[str]) -> None:
    """Raise a ValueError that names the first of the further arguments `given` that its taker does not know."""
    for name in given:
        if name not in known:
            raise ValueError(f"{argument}={given}: {taker} takes no {name}; {did_you_mean(name, known)}")
