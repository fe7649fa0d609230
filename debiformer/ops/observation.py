"""Watching the operations: what explanations read, straight from the code path that the model runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_watcher: ContextVar[Callable[..., None] | None] = ContextVar("debiformer_watcher", default=None)


@contextmanager
def watch(callback: Callable[..., None] | None) -> Iterator[None]:
    """Call `callback(name, **arguments)` with the checked arguments of every attention operation that runs inside the block; None: nobody.

    The operations run unchanged. Watching is local to the thread (and asyncio task) that asks for it, and sees nothing of a compiled model;
    of one that is being exported it sees what is traced.
    """
    token = _watcher.set(callback)
    try:
        yield
    finally:
        _watcher.reset(token)


def is_watched() -> bool:
    """Whether there is a watcher: arguments that only it needs are not made in vain."""
    return (torch.compiler.is_exporting() or not torch.compiler.is_compiling()) and _watcher.get() is not None


def report(name: str, **arguments: Any) -> None:
    """Tell the watcher, if there is one, that operation `name` is about to run with these arguments."""
    if is_watched():
        _watcher.get()(name, **arguments)  # type: ignore[misc]  # there is one
