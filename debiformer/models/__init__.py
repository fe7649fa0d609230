"""The backbones and their presets; importing this registers the presets with timm."""

from .biformer import BiFormer
from .checkpoints import LoadReport, load_published
from .debiformer import DeBiFormer
from .swin_layout import SwinLayout

PRESETS = (
    "debiformer_nano",
    "debiformer_tiny",
    "debiformer_small",
    "debiformer_base",
    "biformer_tiny",
    "biformer_small",
    "biformer_base",
    "biformer_stl",
)

__all__ = ["PRESETS", "BiFormer", "DeBiFormer", "LoadReport", "SwinLayout", "load_published"]
