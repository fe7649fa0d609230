"""Pure functions on tensors: regions, routing, and the two attention operations with their backends."""

from .deformable import deformable_attention, reference_points, sample_points
from .regions import merge, pad_to_grid, partition, region_means
from .routed_attention import routed_attention
from .routing import route

__all__ = [
    "deformable_attention",
    "merge",
    "pad_to_grid",
    "partition",
    "reference_points",
    "region_means",
    "route",
    "routed_attention",
    "sample_points",
]
