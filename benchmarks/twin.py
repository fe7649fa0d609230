"""The baseline: any backbone of this library in plain eager PyTorch that copies, gathers and materialises, as the published code does.

Maps are NCHW, 1x1 convolutions stand for linear layers, regions are cut out by copies, keys and values are gathered over an expanded view,
logits and weights are matrices, and the position bias is sampled at a displacement for every pair of query and point. The twin shares
the parameters of the model it is made from, and gives the same output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiformer.layers import BiLevelRoutingAttention, ConvFeedForward, DeformableBiLevelRoutingAttention, FullAttention
from debiformer.models.pyramid import Pyramid
from debiformer.models.stages import Block


def pointwise(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer as a 1x1 convolution of an NCHW map."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A depthwise convolution of an NCHW map."""
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)


def pad(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """An NHWC map, padded to the grid."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % grid[1], 0, -x.shape[1] % grid[0]))


def cut(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """NHWC map -> regions (B, R, h, w, C)."""
    batch, height, width, channels = x.shape
    (rows, cols), (h, w) = grid, (height // grid[0], width // grid[1])
    return x.reshape(batch, rows, h, cols, w, channels).permute(0, 1, 3, 2, 4, 5).reshape(batch, rows * cols, h, w, channels)


def lay(regions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Regions (B, R, h, w, C) -> NHWC map."""
    batch, _, h, w, channels = regions.shape
    tiles = regions.reshape(batch, *grid, h, w, channels).permute(0, 1, 3, 2, 4, 5)
    return tiles.reshape(batch, grid[0] * h, grid[1] * w, channels)


def gathered_attention(layer: BiLevelRoutingAttention | DeformableBiLevelRoutingAttention, q: Tensor, kv: Tensor) -> Tensor:
    """Query regions (B, R, h, w, C) over the gathered regions of keys and values (B, R, h', w', 2C); NHWC map."""
    (batch, regions, h, w, channels), heads, topk = q.shape, layer.num_heads, layer.topk
    logits = (q.mean((2, 3)) * layer.scale) @ kv[..., :channels].mean((2, 3)).transpose(-2, -1)
    routes = logits.topk(topk, dim=-1).indices
    pixels = kv.reshape(batch, 1, regions, -1, 2 * channels)
    chosen = torch.gather(
        pixels.expand(-1, regions, -1, -1, -1), 2, routes[..., None, None].expand(-1, -1, -1, pixels.shape[3], 2 * channels)
    )
    k, v = chosen.split(channels, dim=-1)
    k = k.reshape(batch * regions, -1, heads, channels // heads).permute(0, 2, 3, 1).contiguous()
    v = v.reshape(batch * regions, -1, heads, channels // heads).permute(0, 2, 1, 3).contiguous()
    q = q.reshape(batch * regions, h * w, heads, channels // heads).permute(0, 2, 1, 3).contiguous()
    out = ((q * layer.scale) @ k).softmax(dim=-1) @ v
    return lay(out.permute(0, 2, 1, 3).reshape(batch, regions, h, w, channels), layer.region_grid)


def bi_level_routing(layer: BiLevelRoutingAttention, x: Tensor) -> Tensor:
    """NHWC -> NHWC."""
    height, width = x.shape[1:3]
    q, kv = layer.qkv(cut(pad(x, layer.region_grid), layer.region_grid)).split([layer.dim, 2 * layer.dim], dim=-1)
    v = lay(kv[..., layer.dim :], layer.region_grid).permute(0, 3, 1, 2).contiguous()
    out = gathered_attention(layer, q, kv) + depthwise(layer.local_context, v).permute(0, 2, 3, 1)
    return layer.proj(out)[:, :height, :width].contiguous()


def deformable_bi_level_routing(layer: DeformableBiLevelRoutingAttention, x: Tensor) -> Tensor:
    """NHWC -> NHWC."""
    height, width = x.shape[1:3]
    grid, heads, offsets = layer.region_grid, layer.num_heads, layer.offset_network
    groups = offsets.groups
    x = pad(x, grid).permute(0, 3, 1, 2).contiguous()
    batch, channels, H, W = x.shape
    q, kv = pointwise(layer.qkv, x).split([channels, 2 * channels], dim=1)
    kv_regions = cut(kv.permute(0, 2, 3, 1), grid)
    v = lay(kv_regions[..., channels:], grid).permute(0, 3, 1, 2).contiguous()

    summary = depthwise(offsets.depthwise, q.reshape(batch * groups, channels // groups, H, W)).permute(0, 2, 3, 1)
    summary = F.gelu(offsets.norm(summary).permute(0, 3, 1, 2))
    shift = pointwise(offsets.project, summary).permute(0, 2, 3, 1)  # (B * G, h, w, 1 or 2)
    h, w = shift.shape[1:3]
    rows = (torch.linspace(0.5, h - 0.5, h, dtype=x.dtype, device=x.device) / h) * 2 - 1
    cols = (torch.linspace(0.5, w - 0.5, w, dtype=x.dtype, device=x.device) / w) * 2 - 1
    points = (shift + torch.stack(torch.meshgrid(cols, rows, indexing="xy"), dim=-1)).clamp(-1, 1)
    agents = F.grid_sample(x.reshape(batch * groups, -1, H, W), points, align_corners=True).reshape(batch, channels, h, w)

    agents = pad(agents.permute(0, 2, 3, 1), grid).permute(0, 3, 1, 2)
    context = pad(depthwise(layer.local_context, v).permute(0, 2, 3, 1), grid).permute(0, 3, 1, 2)
    points = pad(points, grid)
    queries = cut(pointwise(layer.agent_query, agents).permute(0, 2, 3, 1), grid)
    out = gathered_attention(layer, queries, kv_regions).permute(0, 3, 1, 2).contiguous() + context
    agents = agents + pointwise(layer.agent_proj, out)
    agents = agents + feed_forward(layer.agent_mlp, layer.agent_norm1(agents.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    agents = layer.agent_norm2(agents.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    k, v = (pointwise(linear, agents).reshape(batch * heads, channels // heads, -1) for linear in (layer.agent_key, layer.agent_value))
    logits = torch.einsum("bcm,bcn->bmn", q.reshape(batch * heads, channels // heads, -1), k) * layer.scale
    rows, cols = (torch.arange(n, dtype=x.dtype, device=x.device) / (n - 1.0) * 2.0 - 1.0 for n in (H, W))
    pixels = torch.stack(torch.meshgrid(cols, rows, indexing="xy"), dim=-1).reshape(1, H * W, 1, 2).expand(batch * groups, -1, -1, -1)
    displacement = (pixels - points.reshape(batch * groups, 1, -1, 2)) * 0.5
    tables = layer.bias_table[None].expand(batch, -1, -1, -1).reshape(batch * groups, heads // groups, *layer.bias_table.shape[1:])
    bias = F.grid_sample(tables, displacement, align_corners=True).reshape(batch * heads, H * W, -1)
    weights = (logits + bias).softmax(dim=2)
    out = torch.einsum("bmn,bcn->bcm", weights, v).reshape(batch, channels, H, W).contiguous()
    return pointwise(layer.proj, out).permute(0, 2, 3, 1)[:, :height, :width].contiguous()


def full_attention(layer: FullAttention, x: Tensor) -> Tensor:
    """NHWC -> NHWC."""
    batch, height, width, channels = x.shape
    q, k, v = layer.qkv(x).reshape(batch, height * width, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (channels // layer.num_heads) ** -0.5).softmax(dim=-1)
    out = (weights @ v).transpose(1, 2).reshape(batch, height, width, channels)
    return layer.proj(out + depthwise(layer.local_context, x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1))


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """NHWC -> NHWC."""
    if not isinstance(layer, ConvFeedForward):
        return layer(x)
    hidden = pointwise(layer.fc1, x.permute(0, 3, 1, 2))
    return pointwise(layer.fc2, F.gelu(hidden + depthwise(layer.depthwise, hidden))).permute(0, 2, 3, 1)


MIXERS = {
    BiLevelRoutingAttention: bi_level_routing,
    DeformableBiLevelRoutingAttention: deformable_bi_level_routing,
    FullAttention: full_attention,
}


class Twin(nn.Module):
    """The plain form of a backbone, on the same parameters. Images (B, C, H, W) -> logits."""

    def __init__(self, model: Pyramid) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.stem(x)
        for stage in self.model.stages:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = self.block(block, x)
        return self.model.head(self.model.norm(x))

    @staticmethod
    def block(block: Block, x: Tensor) -> Tensor:
        """NCHW -> NCHW."""
        if isinstance(block.position, nn.Conv2d):
            x = x + depthwise(block.position, x)
        x = x.permute(0, 2, 3, 1)
        x = x + block.drop_path(MIXERS[type(block.mixer)](block.mixer, block.norm1(x)))
        return (x + block.drop_path(feed_forward(block.mlp, block.norm2(x)))).permute(0, 3, 1, 2)
