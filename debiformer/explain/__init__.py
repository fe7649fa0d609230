"""Explanations: what routing layers look at, as arrays first and figures second."""

from .attention import Trace, tracing

__all__ = ["Trace", "tracing"]
