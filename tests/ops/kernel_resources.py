"""What every kernel takes of a GPU, as JSON: compiled ahead of time, no GPU needed.

python tests/ops/kernel_resources.py 90 bfloat16 [width of a head]
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from debiformer.ops.triton import deformable_attention, routed_attention

# The blocks of the models, at 224 pixels and beyond: R, T, R', T', K. Only what differs in tiles is worth compiling.
ROUTED = {
    "224, stage 1": (49, 64, 49, 64, 1),
    "224, stage 1, agents": (49, 1, 49, 64, 4),
    "224, stage 2": (49, 16, 49, 16, 4),
    "800x1344, stage 1": (49, 1392, 49, 1392, 1),
    "800x1344, stage 1, agents": (49, 24, 49, 1392, 4),
}
# Height and width of the grid, M, and the side of the grid that the table is made for.
DEFORMABLE = {
    "224, stage 1": ((56, 56), 49, 56),
    "224, stage 3": ((14, 14), 49, 14),
    "800x1344, stage 1": ((203, 336), 1176, 56),
    "64, stage 3": ((4, 4), 16, 4),
}
HEADS = 2
WIDTH = 32  # of a head in all models


class Nowhere:
    """A driver without a device."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # what is compiled is kept for each device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_kernels(capability: int) -> Iterator[dict[str, object]]:
    """Inside, launching a kernel compiles it and does nothing more; the dictionary collects what was compiled."""
    found: dict[str, object] = {}
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        found[f"{Path(kernel.fn.__code__.co_filename).stem}.{kernel.fn.__name__} {compiled.hash[:8]}"] = compiled
        return compiled

    JITFunction.run = compile_only
    driver.set_active(Nowhere(capability))
    try:
        yield found
    finally:
        JITFunction.run = run


def routed_case(case, dtype: torch.dtype, width: int) -> None:
    regions, tokens, key_regions, key_tokens, topk = case
    q, d_out = (torch.empty(2, regions, tokens, HEADS, width, dtype=dtype, device="meta").permute(0, 3, 1, 2, 4) for _ in range(2))
    k, v = (torch.empty(2, key_regions, key_tokens, HEADS, width, dtype=dtype, device="meta").permute(0, 3, 1, 2, 4) for _ in range(2))
    routes = torch.empty(2, regions, topk, dtype=torch.int64, device="meta")
    out, lse = routed_attention.forward(q, k, v, routes, 0.1)
    routed_attention.backward(q, k, v, routes, out, lse, d_out, 0.1)


def deformable_case(case, dtype: torch.dtype, width: int) -> None:
    grid_size, count, side = case
    queries = grid_size[0] * grid_size[1]
    q, d_out = (torch.empty(2, queries, HEADS, width, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
    k, v = (torch.empty(2, count, HEADS, width, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
    points, table = torch.empty(2, 1, count, 2, device="meta"), torch.empty(HEADS, 2 * side - 1, 2 * side - 1, device="meta")
    out, lse = deformable_attention.forward(q, k, v, points, table, grid_size, 0.1)
    deformable_attention.backward(q, k, v, points, table, out, lse, d_out, grid_size, 0.1)


def resources(kernel) -> dict[str, int]:
    """Registers of a thread, bytes that it keeps in memory for want of them, shared memory, and warps."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", log)[1]) for name in ("REG", "STACK", "LOCAL"))
    return dict(registers=registers, spilled=stack + local, shared=kernel.metadata.shared, warps=kernel.metadata.num_warps)


def main(capability: int, dtype: str, width: int = WIDTH) -> None:
    table = {}
    with compiled_kernels(capability) as found:
        for run, cases in ((routed_case, ROUTED), (deformable_case, DEFORMABLE)):
            for name, case in cases.items():
                before = set(found)
                run(case, getattr(torch, dtype), width)
                table |= {f"{kernel} ({name})": resources(found[kernel]) for kernel in found if kernel not in before}
    print(json.dumps(table))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
