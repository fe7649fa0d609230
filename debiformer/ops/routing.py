"""Top-k routing between regions (BiFormer, eqs. 3-4)."""

from torch import Tensor


def route(queries: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Send each query region to the `topk` key regions whose mean key answers its mean query best.

    Args:
        queries: Mean queries (B, R, C).
        keys: Mean keys (B, R', C).
        topk: Regions to choose, K, from 1 to R'.

    Returns:
        Routes (B, R, K), int64 indices of key regions in falling order of affinity, and their affinities (B, R, K), the unscaled
        dot products. The choice itself carries no gradient; the affinities do.

    Raises:
        ValueError: If the shapes do not match or `topk` is not between 1 and R'.
    """
    if queries.ndim != 3 or keys.ndim != 3 or queries.shape[::2] != keys.shape[::2]:
        raise ValueError(f"mean queries {tuple(queries.shape)} and keys {tuple(keys.shape)} are not (B, R, C) and (B, R', C)")
    if not 1 <= topk <= keys.shape[1]:
        raise ValueError(f"topk={topk} is not between 1 and the {keys.shape[1]} key regions")
    affinities, routes = (queries @ keys.transpose(1, 2)).topk(topk, dim=-1)
    return routes, affinities
