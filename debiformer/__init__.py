"""Vision backbones with bi-level routing attention: BiFormer and DeBiFormer."""

__version__ = "0.1.0"
