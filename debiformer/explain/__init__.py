"""Explanations: what routing layers look at, as arrays first and figures second."""

from .attention import RoutingTrace, Trace, tracing
from .rollout import rollout

__all__ = ["RoutingTrace", "Trace", "rollout", "tracing"]
