"""Pure functions on tensors: regions, routing, and the two attention operations with their backends."""

from .backends import Choice, choose_backend, use_backend
from .bi_level_attention import bi_level_attention
from .deformable import deformable_attention, reference_points, sample_points
from .regions import merge, pad_to_grid, partition
from .routed_attention import routed_attention
from .routing import route

__all__ = [
    "Choice",
    "bi_level_attention",
    "choose_backend",
    "deformable_attention",
    "merge",
    "pad_to_grid",
    "partition",
    "reference_points",
    "route",
    "routed_attention",
    "sample_points",
    "use_backend",
]
