"""The layers: the two routing attentions, which stand alone in any network, and what the backbones put around them."""

from .bi_level_routing import BiLevelRoutingAttention
from .deformable_bi_level_routing import DeformableBiLevelRoutingAttention, OffsetNetwork
from .depthwise import DepthwiseConv2d, ResidualDepthwiseConv2d
from .feedforward import ConvFeedForward
from .full_attention import FullAttention
from .patch import ConvDownsample, ConvStem, PatchEmbedding, PatchMerging

__all__ = [
    "BiLevelRoutingAttention",
    "ConvDownsample",
    "ConvFeedForward",
    "ConvStem",
    "DeformableBiLevelRoutingAttention",
    "DepthwiseConv2d",
    "FullAttention",
    "OffsetNetwork",
    "PatchEmbedding",
    "PatchMerging",
    "ResidualDepthwiseConv2d",
]
