"""The other mechanisms of DeBiFormer's Table 5: what attention can be limited to, if not to routed regions. All on maps (B, H, W, C)."""

from .axial import AxialAttention
from .criss_cross import CrissCrossAttention
from .cross_shaped_window import CrossShapedWindowAttention
from .deformable import DeformableAttention
from .grid import GridAttention
from .subsampled import SubsampledAttention
from .window import WindowAttention

__all__ = [
    "AxialAttention",
    "CrissCrossAttention",
    "CrossShapedWindowAttention",
    "DeformableAttention",
    "GridAttention",
    "SubsampledAttention",
    "WindowAttention",
]
