"""Attention rollout: what reaches the last map from where, through the attention of all layers (Abnar & Zuidema, ACL 2020)."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .attention import Trace, uniform


def rollout(traces: Mapping[Any, Trace], weights: Tensor | None = None, image: int = 0, residual: float = 0.5) -> Tensor:
    """How much each pixel (H, W) of the first traced map gives to the last one, through all layers in between; it sums to the weights' sum.

    Going back layer by layer, weights w become residual * w + (1 - residual) * A^T w, where A is the attention averaged over heads, and the
    residual stands for what passes a layer by. Between stages a pixel's weight is shared by those of the finer map that it lies over.
    Feed-forwards, convolutions and values are left out, as in all rollouts: it says where information can come from, not what it is worth.

    Args:
        traces: In the order of execution, as `tracing` and `Look` have them; their names do not matter.
        weights: Of the last map's pixels (h, w); None for all alike, as in front of a classifier that averages.
        image: Of the batch.
        residual: From 0 to 1.

    Raises:
        ValueError: If nothing is traced, the weights are not of the last map, `residual` is out of range, or there is no such image.
    """
    if not traces:
        raise ValueError("nothing is traced: run the model inside `with tracing(model) as traces`")
    if not 0 <= residual <= 1:
        raise ValueError(f"residual={residual} is not from 0 to 1")
    *_, last = traces.values()
    height, width = last.size
    found = uniform(last.size) if weights is None else weights
    if found.shape != last.size:
        raise ValueError(f"weights {tuple(found.shape)} are not of the last map, which is {height}x{width}")
    total = found.sum()
    for trace in reversed(list(traces.values())):
        if found.shape != trace.size:
            found = F.interpolate(found[None, None], size=trace.size, mode="nearest")[0, 0]
            found = found / found.sum() * total
        attended = trace.spread(found, image).mean(0)
        # What padding or the border of a map takes is left out.
        found = residual * found + (1 - residual) * attended * (found.sum() / attended.sum())
    return found
