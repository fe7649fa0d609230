"""The backbones and their presets; importing this registers the presets with timm."""

from .biformer import BiFormer
from .checkpoints import LoadReport, load_published
from .debiformer import DeBiFormer
from .swin_layout import SwinLayout

ROUTED = (  # presets with regions: all that are published, and nano
    "debiformer_nano",
    "debiformer_tiny",
    "debiformer_small",
    "debiformer_base",
    "biformer_tiny",
    "biformer_small",
    "biformer_base",
    "biformer_stl",
    "biformer_stl_nchw",
    "debiformer_stl",
)
PRESETS = (
    *ROUTED,
    "shifted_window_stl",
    "spatially_separable_stl",
    "sequential_axial_stl",
    "criss_cross_stl",
    "cross_shaped_window_stl",
    "deformable_stl",
    "block_grid_stl",
)

__all__ = ["PRESETS", "ROUTED", "BiFormer", "DeBiFormer", "LoadReport", "SwinLayout", "load_published"]
