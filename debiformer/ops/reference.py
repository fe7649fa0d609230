"""The readable definitions of every operation: slow, explicit, and the specification that each backend is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def partition(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Regions (B, R, T, C) of a map (B, H, W, C): slices, row by row."""
    (_, height, width, _), (rows, cols) = x.shape, grid
    h, w = height // rows, width // cols
    regions = [x[:, i * h : (i + 1) * h, j * w : (j + 1) * w].flatten(1, 2) for i in range(rows) for j in range(cols)]
    return torch.stack(regions, dim=1)


def merge(regions: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The map (B, H, W, C) whose regions these are."""
    (rows, cols), (height, width) = grid, size
    tiles = regions.unflatten(2, (height // rows, width // cols))
    return torch.cat([torch.cat([tiles[:, i * cols + j] for j in range(cols)], dim=2) for i in range(rows)], dim=1)


def route(queries: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Routes and affinities (B, R, K): all regions sorted, the first `topk` kept."""
    affinities, routes = torch.einsum("brc,bsc->brs", queries, keys).sort(dim=-1, descending=True)
    return routes[..., :topk], affinities[..., :topk]


def routed_attention(q: Tensor, k: Tensor, v: Tensor, routes: Tensor | None, scale: float, route_weights: Tensor | None = None) -> Tensor:
    """Softmax attention (B, H, R, T, D) of each region's queries over all tokens of its routed regions together; None is every region."""
    if routes is None:
        routes = torch.arange(k.shape[2], device=k.device).expand(q.shape[0], q.shape[2], -1)

    def routed(x: Tensor) -> Tensor:  # (B, H, R', T', D) -> (B, H, R, K * T', D)
        chosen = torch.stack([image[:, image_routes] for image, image_routes in zip(x, routes, strict=True)])
        if route_weights is not None:
            chosen = chosen * route_weights[:, None, :, :, None, None]
        return chosen.flatten(3, 4)

    logits = scale * q @ routed(k).transpose(-1, -2)
    return logits.softmax(dim=-1) @ routed(v)


def sample_points(x: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples (B, h, w, C) of a map (B, H, W, C) at points (B, G, h, w, 2), one channel group per point group."""
    groups = x.permute(0, 3, 1, 2).chunk(points.shape[1], dim=1)
    samples = [F.grid_sample(group, points[:, g], align_corners=True) for g, group in enumerate(groups)]
    return torch.cat(samples, dim=1).permute(0, 2, 3, 1)


def position_bias(points: Tensor, bias_table: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Relative position bias (B, H, N, M): head h's table, read bilinearly at half the displacement from each point to each query."""
    (batch, groups, _, _), (height, width) = points.shape, grid_size
    y, x = (2 * torch.arange(n, dtype=points.dtype, device=points.device) / max(n - 1, 1) - int(n > 1) for n in grid_size)
    queries = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)
    displacement = 0.5 * (queries[:, None, :] - points[:, :, None])  # (B, G, N, M, 2)
    tables = bias_table.to(points.dtype).unflatten(0, (groups, -1))
    return torch.stack(
        [
            torch.cat([F.grid_sample(tables[None, g], displacement[b, None, g], align_corners=True)[0] for g in range(groups)])
            for b in range(batch)
        ]
    )


def deformable_attention(
    q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor, grid_size: tuple[int, int], scale: float
) -> Tensor:
    """Softmax attention (B, H, N, D) of every pixel over all sampled points, with the relative position bias on the logits."""
    logits = scale * q @ k.transpose(-1, -2) + position_bias(points, bias_table, grid_size)
    return logits.softmax(dim=-1).to(v.dtype) @ v
