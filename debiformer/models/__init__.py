"""The backbones and their presets; importing this registers the presets with timm."""

from .biformer import BiFormer
from .checkpoints import LoadReport, load_published
from .debiformer import DeBiFormer
from .swin_layout import SwinLayout

__all__ = ["BiFormer", "DeBiFormer", "LoadReport", "SwinLayout", "load_published"]
