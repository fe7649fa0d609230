"""Which backend an operation runs on: what the call names, else the `use_backend` block, else DEBIFORMER_BACKEND, else the best."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "eager", "reference")
ENVIRONMENT_VARIABLE = "DEBIFORMER_BACKEND"
WIDEST_HEAD = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}  # for the kernels; wider ones would not fit the registers

_TRITON_IS_INSTALLED = find_spec("triton") is not None  # looks it up without importing it
_block: ContextVar[str] = ContextVar("debiformer_backend", default="auto")


class Choice(NamedTuple):
    """A backend, and in a few words why."""

    backend: str
    reason: str


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run the operations inside the block on `backend`, unless a call or layer names one itself; local to the thread (and asyncio task).

    Raises:
        ValueError: If there is no such backend.
    """
    check_backend(backend)
    token = _block.set(backend)
    try:
        yield
    finally:
        _block.reset(token)


def choose_backend(
    operation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor | None = None,
    route_weights: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Choice:
    """The backend that "routed_attention" or "deformable_attention" runs on with these arguments, and why.

    Args:
        operation: The name of the operation.
        q: Its queries.
        k: Its keys.
        v: Its values.
        routes: Its routes, for "routed_attention".
        route_weights: Its weights of routes, for "routed_attention".
        backend: Its `backend`.

    Raises:
        ValueError: If there is no such operation or backend, or the backend that was asked for cannot run this.
    """
    if operation not in ("routed_attention", "deformable_attention"):
        raise ValueError(f"operation={operation!r} is neither 'routed_attention' nor 'deformable_attention'")
    asked = requested_backend(backend)
    if operation == "routed_attention" and routes is None and asked.backend != "reference":
        return Choice("eager", "all regions are routed to, which scaled_dot_product_attention does best")
    if asked.backend in ("eager", "reference"):
        return asked
    # Triton's interpreter, for tests, runs on the CPU, and only where asked to.
    interpreted = asked.backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    obstacle = _obstacle(q, k, v, route_weights, "cpu" if interpreted else "cuda")
    if asked.backend == "triton":
        if obstacle:
            raise ValueError(f"{operation} cannot run on Triton, though {asked.reason}: {obstacle}")
        return asked
    return Choice("eager", obstacle) if obstacle else Choice("triton", "the fused kernels take all of this")


def requested_backend(backend: str = "auto") -> Choice:
    """What the call, the block around it or the environment asks for, in this order, and which of them did; "auto" where none does.

    Raises:
        ValueError: If there is no such backend.
    """
    check_backend(backend)
    if backend != "auto":
        return Choice(backend, f"backend={backend!r} was given")
    backend = _block.get()
    if backend != "auto":
        return Choice(backend, f"use_backend({backend!r}) is in force")
    backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    check_backend(backend, ENVIRONMENT_VARIABLE)
    return Choice(backend, f"{ENVIRONMENT_VARIABLE}={backend}")


def check_backend(backend: str, name: str = "backend") -> None:
    """Raise a ValueError unless `backend`, which the message calls `name`, is one."""
    if backend not in BACKENDS:
        raise ValueError(f"{name}={backend!r} is not one of {', '.join(BACKENDS)}")


def _obstacle(q: Tensor, k: Tensor, v: Tensor, route_weights: Tensor | None, device: str) -> str | None:
    """Why the kernels cannot run this on such a device, or None if they can."""
    if torch.compiler.is_exporting():
        return "a graph is exported, which has to run without Triton"
    if q.dtype not in WIDEST_HEAD:
        return f"q is {str(q.dtype).removeprefix('torch.')}"
    if route_weights is not None:
        return "soft routing"
    if v.shape[-1] != k.shape[-1]:
        return "values of another width than the keys"
    if q.shape[-1] > WIDEST_HEAD[q.dtype]:
        return f"heads wider than {WIDEST_HEAD[q.dtype]} in {str(q.dtype).removeprefix('torch.')}"
    if not _TRITON_IS_INSTALLED:
        return "Triton is not installed"
    if q.device.type != device:
        return f"q is on {q.device.type}"
    if device == "cuda" and (gpu := torch.cuda.get_device_properties(q.device)).major < 8:
        return f"compute capability {gpu.major}.{gpu.minor} is below 8.0"
    return None
