"""The one way to answer a name nobody knows: with the names nearest to it."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause naming up to three `known` names nearest to `name`, or all of them where none is near and they are few."""
    known = list(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    return "choose from " + ", ".join(known) if len(known) <= 20 else "nothing known is spelt like it"
