"""Deformable bi-level routing attention (Long et al., ACCV 2024)."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ops.deformable import deformable_attention, reference_points, sample_points
from ..ops.regions import Grid, as_grid, crop, pad_to_grid
from .bias_table import bias_table
from .depthwise import DepthwiseConv2d
from .feedforward import ConvFeedForward
from .region_routing import RegionRouting, check_positive, project_in_parts


class OffsetNetwork(nn.Module):
    """Where to look: one point for every `stride` x `stride` cell of a query map, in each group of channels.

    points = clamp(reference + offsets(q)), offsets = linear(GELU(norm(depthwise(q)))) (DeBiFormer, deformed points); with `max_offset`
    points = reference + max_offset * cell * tanh(offsets(q)), as in DAT.

    Args:
        dim: Channels C.
        kernel_size: Odd size of the depthwise filter that summarises a cell, K of the paper.
        stride: Cell size, r of the paper.
        groups: Channel groups with points of their own, G; must divide `dim`. All groups share the weights.
        channels: 1 adds the same number to x and y, as the released code and checkpoints do, so that points move along the diagonal only;
            2 moves them freely, as the paper's text has it.
        max_offset: Bound of the offsets along either axis, in cells, by tanh as in DAT; None clamps points to the map instead.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int, groups: int, channels: int = 1, max_offset: float | None = None) -> None:
        super().__init__()
        check_positive(dim=dim, offset_kernel_size=kernel_size, point_stride=stride, offset_groups=groups)
        if dim % groups:
            raise ValueError(f"offset_groups={groups} does not divide dim={dim}")
        if kernel_size % 2 == 0:
            raise ValueError(f"offset_kernel_size={kernel_size} is even; the cells it summarises have a centre")
        if channels not in (1, 2):
            raise ValueError(f"offset_channels={channels} is neither 1 (released code) nor 2 (paper)")
        if max_offset is not None and not max_offset > 0:
            raise ValueError(f"max_offset={max_offset} is not above 0")
        self.groups, self.stride, self.max_offset = groups, stride, max_offset
        self.depthwise = DepthwiseConv2d(dim // groups, kernel_size, stride, bias=False)
        self.norm = nn.LayerNorm(dim // groups)
        self.project = nn.Linear(dim // groups, channels, bias=False)

    def forward(self, q: Tensor) -> Tensor:
        """Queries (B, H, W, C) -> points (B, G, h, w, 2) as (x, y), with h = ceil(H / stride) and w likewise.

        Clamped points are in [-1, 1]; bounded ones at the border may lie `max_offset` cells beyond their own, outside of the map.
        """
        groups = q.unflatten(-1, (self.groups, q.shape[-1] // self.groups)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        cells = self.depthwise(groups)
        offsets = self.project(F.gelu(self.norm(cells.flatten(1, 2)))).unflatten(1, cells.shape[1:3])
        # Half precision would blur the points by more than a pixel of a large map.
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        height, width = offsets.shape[1:3]
        reference = reference_points(height, width, dtype=offsets.dtype, device=offsets.device)
        if self.max_offset is None:
            points = (offsets + reference).clamp(-1, 1)
        else:
            along = offsets.tanh().expand(-1, -1, -1, 2).unbind(-1)
            cells_to_points = [2 * self.max_offset / n for n in (width, height)]
            points = reference + torch.stack([x * factor for x, factor in zip(along, cells_to_points, strict=True)], dim=-1)
        return points.unflatten(0, (q.shape[0], self.groups))


@register_notrace_module
class DeformableBiLevelRoutingAttention(RegionRouting):
    """Agents, sampled where an offset network points, gather from the regions they are routed to; every pixel then asks the agents.

    DeBiFormer's DBRA: agents a = x sampled at the points, a += routed attention(a) + LCE(v), a += MLP(norm(a)), and then
    softmax(scale * q k(a)^T + B) v(a) for the queries q of all pixels. Takes maps of any height and width: the map and the grid of agents
    are padded with zeros below and on the right until the region grid divides them, as the published layer does, and the padding takes
    part in the attention.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`.
        region_grid: Rows and columns of regions, or one number for both.
        topk: Regions each region of agents is routed to, from 1 to rows * columns.
        point_stride: One agent for every `point_stride` x `point_stride` pixels, r of the paper.
        offset_kernel_size: Odd size of the offset network's filter, K of the paper.
        offset_groups: Channel groups with points of their own, G; must divide `num_heads`.
        bias_grid: Rows and columns of the pixel grid at which the bias table holds one entry for each displacement; at another size it is
            interpolated. The published models use the size of the stage's map for a 224 pixel image.
        agent_mlp_ratio: Hidden width of the agents' feed-forward, D_r of the paper.
        offset_channels: 1 as released, 2 as the paper's text has it; see `OffsetNetwork`.
        soft_routing, layout, backend: As for `BiLevelRoutingAttention`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        region_grid: int | Grid = 7,
        topk: int = 4,
        *,
        point_stride: int = 4,
        offset_kernel_size: int = 7,
        offset_groups: int = 1,
        bias_grid: int | Grid = 28,
        agent_mlp_ratio: float = 3,
        offset_channels: int = 1,
        soft_routing: bool = False,
        layout: str = "NHWC",
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, region_grid, topk, soft_routing, layout, backend)
        check_positive(offset_groups=offset_groups)
        if num_heads % offset_groups:
            raise ValueError(f"offset_groups={offset_groups} does not divide num_heads={num_heads}")
        bias_grid = as_grid(bias_grid, "bias_grid")
        self.qkv = nn.Linear(dim, 3 * dim)
        self.offset_network = OffsetNetwork(dim, offset_kernel_size, point_stride, offset_groups, offset_channels)
        self.local_context = DepthwiseConv2d(dim, kernel_size=5, stride=point_stride)
        self.agent_query = nn.Linear(dim, dim)
        self.agent_proj = nn.Linear(dim, dim)
        self.agent_norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.agent_mlp = ConvFeedForward(dim, agent_mlp_ratio)
        self.agent_norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.agent_key = nn.Linear(dim, dim)
        self.agent_value = nn.Linear(dim, dim)
        self.bias_table = bias_table(num_heads, bias_grid, std=0.01)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = pad_to_grid(x, self.region_grid)
        q, k, v = project_in_parts(self.qkv, x, 3)
        points = self.offset_network(q)
        agents = self.gather(pad_to_grid(sample_points(x, points, backend=self.backend), self.region_grid), k, v)
        # Agents that only fill up the grid sit at the centre of the image.
        points = pad_to_grid(points.flatten(0, 1), self.region_grid).unflatten(0, (x.shape[0], self.offset_network.groups))
        out = deformable_attention(
            self.heads(q),
            self.heads(self.agent_key(agents)),
            self.heads(self.agent_value(agents)),
            points.flatten(2, 3),
            self.bias_table,
            (x.shape[1], x.shape[2]),
            scale=self.scale,
            backend=self.backend,
        )
        return crop(self.proj(out.transpose(1, 2).flatten(2)).view_as(x), height, width)

    def gather(self, agents: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Agents (B, h, w, C) after attention to their routed regions of k and v (B, H, W, C), and their feed-forward."""
        size = agents.shape[1:3]
        context = pad_to_grid(self.local_context(v), self.region_grid)
        heard = (self.routed(self.agent_query(agents), k, v) + context).flatten(1, 2)
        tokens = agents.flatten(1, 2)  # as in a block
        tokens = tokens + self.agent_proj(heard)
        tokens = tokens + self.agent_mlp(self.agent_norm1(tokens).unflatten(1, size)).flatten(1, 2)
        return self.agent_norm2(tokens).unflatten(1, size)

    def heads(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, heads, H * W, C / heads)."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, self.dim // self.num_heads)).transpose(1, 2)
