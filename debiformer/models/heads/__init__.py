"""Heads for dense tasks, on the maps of any backbone."""

from .semantic_fpn import SemanticFPNHead
from .upernet import FCNHead, UPerNetHead

__all__ = ["FCNHead", "SemanticFPNHead", "UPerNetHead"]
