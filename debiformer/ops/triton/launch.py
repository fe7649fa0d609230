"""What both kernels share: tiles, precision and memory layout."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)  # kernels use exp2, which the hardware has
PROGRAMS = 1024  # enough to fill a large GPU several times over
_DOT_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Tile(NamedTuple):
    """Queries and keys of one program, and how many warps and pipeline stages it runs with."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """How to compile. Multiply and add as one is what we want, and newer Triton wants to be told."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)


def block(n: int, low: int, high: int) -> int:
    """The power of two that holds `n`, within bounds."""
    return min(max(triton.next_power_of_2(n), low), high)


def width_block(width: int) -> int:
    """Matrix units want 16 channels at least."""
    return block(width, 16, 1 << 16)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """What matrix products take in; Triton's interpreter has no arithmetic of its own in bfloat16."""
    return tl.float32 if dtype == torch.bfloat16 and triton.knobs.runtime.interpret else _DOT_DTYPES[dtype]


def float32_precision() -> str:
    """How float32 products are computed: as torch's own are at present."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def readable(x: Tensor) -> Tensor:
    """`x` with its channels one after the other in memory, as kernels read them; an incoming gradient may be expanded."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_last(x: Tensor) -> Tensor:
    """Empty memory for a tensor like `x` (B, H, ..., D) in the order (B, ..., H, D), so that callers merge the heads without a copy."""
    batch, heads, *rows, width = x.shape
    return x.new_empty(batch, *rows, heads, width).movedim(-2, 1)


@triton.jit
def load_rows(pointer, row_offsets, row_there, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """A tile (rows, WIDTH_BLOCK) of rows that start at the given offsets; zero where there is none, and past WIDTH."""
    channel = tl.arange(0, WIDTH_BLOCK)
    there = row_there[:, None] & (channel < WIDTH)[None, :]
    return tl.load(pointer + (row_offsets[:, None] + channel[None, :]), mask=there, other=0.0).to(DTYPE)


@triton.jit
def store_rows(pointer, row_offsets, row_there, tile, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr):
    """Undo `load_rows`."""
    channel = tl.arange(0, WIDTH_BLOCK)
    there = row_there[:, None] & (channel < WIDTH)[None, :]
    tl.store(pointer + (row_offsets[:, None] + channel[None, :]), tile.to(pointer.dtype.element_ty), mask=there)
