"""Vision backbones with bi-level routing attention: BiFormer and DeBiFormer.

Importing this registers the presets with timm: `timm.create_model("debiformer_small")`.
"""

from .models import LoadReport, load_published
from .ops import choose_backend, use_backend

__version__ = "0.1.0"
__all__ = ["LoadReport", "choose_backend", "load_published", "use_backend"]
