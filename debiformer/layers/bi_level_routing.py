"""Bi-level routing attention (Zhu et al., CVPR 2023)."""

from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops.regions import Grid, crop, pad_to_grid
from .depthwise import DepthwiseConv2d
from .region_routing import RegionRouting, project_in_parts


@register_notrace_module  # a leaf for torchvision's feature extraction, whose tracer cannot follow its shapes
class BiLevelRoutingAttention(RegionRouting):
    """Tokens attend to the `topk` regions that their own region is routed to, and to nothing else (BiFormer, section 3.2).

    Takes maps of any height and width: one that the grid does not divide is padded with zeros below and on the right, as the published
    layer does, and the padding takes part in the attention. The arguments are those of `RegionRouting`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        region_grid: int | Grid = 7,
        topk: int = 4,
        *,
        soft_routing: bool = False,
        layout: str = "NHWC",
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, region_grid, topk, soft_routing, layout, backend)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.local_context = DepthwiseConv2d(dim, kernel_size=5)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        q, k, v = project_in_parts(self.qkv, pad_to_grid(x, self.region_grid), 3)
        out = self.routed(q, k, v) + self.local_context(v)
        return crop(self.proj(out.flatten(1, 2)).view_as(q), height, width)
