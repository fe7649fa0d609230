"""Bounded memory: an operation over rows, a few rows at a time where all at once would be too much."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import checkpoint

CHUNK = 2**23  # elements of intermediates at a time: 32 MB in float32
KEPT = 2**26  # elements that may be kept for the backward pass, 256 MB in float32; beyond, it computes them again


def is_compiling() -> bool:
    """Whether a graph is being compiled that is to run here rather than to be exported."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def is_compiling_inference() -> bool:
    """Whether a graph is being compiled to run here that needs no gradients.

    An operation that chooses its way by size stays whole in such a graph: one graph then serves every size, with bounded memory, and
    is quickly compiled.
    """
    return is_compiling() and not torch.is_grad_enabled()


def settled(x: Tensor) -> Tensor:
    """`x` itself; a contiguous copy in an exported graph, where views of it must not depend on how it lies in memory here."""
    return x.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else x


def over_chunks(attend: Callable[[slice], Tensor], rows: int, elements_per_row: int, dim: int, *inputs: Tensor) -> Tensor:
    """`attend(slice(rows))`, computed and concatenated along `dim` in chunks of rows where the intermediates are large; exact.

    Args:
        attend: From a slice of rows to their output, whose axis `dim` counts rows.
        rows: Number of rows.
        elements_per_row: Size of the intermediates of a row.
        dim: Axis of the output.
        inputs: What `attend` reads; where one of them needs a gradient, large chunks are computed again in the backward pass.
    """
    training = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if not statically_known_true(rows * elements_per_row > (KEPT if training else CHUNK)):
        return attend(slice(0, rows))
    step = max(1, CHUNK // elements_per_row)
    chunks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if training:
        return torch.cat([checkpoint(attend, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks], dim)
    if torch.compiler.is_exporting():  # a graph does not write in place
        return torch.cat([attend(chunk) for chunk in chunks], dim)
    out: Tensor | None = None
    for chunk in chunks:
        part = attend(chunk)
        if out is None:
            out = part.new_empty([*part.shape[:dim], rows, *part.shape[dim + 1 :]])
        # Parts kept until the end would lie between large temporaries that come and go, and fray the heap by gigabytes.
        out.narrow(dim, chunk.start, chunk.stop - chunk.start).copy_(part)
    assert out is not None
    return out
