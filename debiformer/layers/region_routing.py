"""What the routing layers share: regions, routes, heads and layout."""

from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.backends import check_backend
from ..ops.bi_level_attention import bi_level_attention
from ..ops.regions import Grid, as_grid


def check_positive(**arguments: int) -> None:
    """Raise a ValueError that names the first argument that is not a positive integer."""
    for name, value in arguments.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} is not a positive integer")


def check_heads(dim: int, num_heads: int) -> None:
    """Raise a ValueError unless both are positive integers and `num_heads` divides `dim`."""
    check_positive(dim=dim, num_heads=num_heads)
    if dim % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")


def project_in_parts(linear: nn.Linear, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """`linear(x)` in equal parts of its channels: views of one product, or a product each in an exported graph, whose views are copies."""
    if not torch.compiler.is_exporting():
        return linear(x).chunk(parts, dim=-1)
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(linear.weight.chunk(parts), linear.bias.chunk(parts), strict=True))


class RegionRouting(nn.Module):
    """A layer that routes between regions: a region grid that holds no parameter, top-k, heads and the published scale C ** -0.5.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`.
        region_grid: Rows and columns of regions, or one number for both.
        topk: Regions each region is routed to, from 1 to rows * columns.
        soft_routing: Weigh the keys and values of each route by the softmax of its affinity, which gives the choice a gradient.
        layout: "NHWC" for maps (B, H, W, C) or "NCHW" for (B, C, H, W), in and out.
        backend: Backend of the attention operations; see `debiformer.ops`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, num_heads: int, region_grid: int | Grid, topk: int, soft_routing: bool, layout: str, backend: str) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_positive(topk=topk)
        if layout not in ("NHWC", "NCHW"):
            raise ValueError(f"layout={layout!r} is neither 'NHWC' nor 'NCHW'")
        check_backend(backend)
        self.dim, self.num_heads, self.topk = dim, num_heads, topk
        self.soft_routing, self.layout, self.backend = soft_routing, layout, backend
        self.scale = dim**-0.5
        self.set_region_grid(region_grid)

    def set_region_grid(self, region_grid: int | Grid) -> None:
        """Cut maps into another grid from now on; no parameter depends on it.

        Raises:
            ValueError: If the grid has fewer regions than `topk`.
        """
        rows, cols = as_grid(region_grid)
        if not 1 <= self.topk <= rows * cols:
            raise ValueError(f"topk={self.topk} is not between 1 and the {rows * cols} regions of region_grid={(rows, cols)}")
        self.region_grid = (rows, cols)

    def forward(self, x: Tensor) -> Tensor:
        """A map in `layout`, of any height and width -> one of the same shape."""
        channels = x.shape[-1 if self.layout == "NHWC" else 1] if x.ndim == 4 else None
        if channels != self.dim:
            raise ValueError(f"expected a {self.layout} map with {self.dim} channels (layout={self.layout!r}), got shape {tuple(x.shape)}")
        if self.layout == "NHWC":
            return self.attend(x)
        return self.attend(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def attend(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        raise NotImplementedError

    def routed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a query map (B, h, w, C) over the routed regions of a key and a value map (B, H, W, C); the grid divides all."""
        options = dict(scale=self.scale, soft_routing=self.soft_routing, backend=self.backend)
        return bi_level_attention(q, k, v, self.region_grid, self.topk, self.num_heads, **options)

    def extra_repr(self) -> str:
        return f"region_grid={self.region_grid}, topk={self.topk}, num_heads={self.num_heads}, layout={self.layout}"
