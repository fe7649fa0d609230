"""Peak memory above the loaded model, every case in a fresh process: python benchmarks/memory.py [--device cuda]

On a CPU the peak is VmHWM of /proc/self/status, the largest resident size so far, which writing 5 to /proc/self/clear_refs sets back to
the present size (the peak of getrusage cannot be set back, and would show the loading of the libraries). Before that a small input has run,
so that threads and compiled primitives exist, gradients are dropped, and free memory is returned to the system by malloc_trim. The
allocator is left as it is. On a GPU it is torch's own peak of allocated memory.

The routing layer alone on a 1x20x600x500 map is the case that users of the published layer report as 100 GB. By arithmetic: the published
form cuts regions of 600 // 7 by 500 // 7 = 6,035 tokens, which makes 8 x 8 = 64 of them, and the logits of one head take
64 * 6035 * 4 * 6035 * 4 bytes = 37.3 GB, twice with the weights. It is not run here.
"""

import argparse
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from fresh import answer, call, limit_memory
from pairs import images
from record import save
from torch import Tensor, nn
from twin import Twin

from debiformer.cli import bench
from debiformer.layers import BiLevelRoutingAttention

MB = 1e6
LARGE, SQUARE = (800, 1344), (512, 512)


def extra_memory(run: Callable[[], object], device: str) -> int:
    """Bytes that a call takes at its worst, above what is taken before it."""
    gc.collect()
    if device != "cpu":
        bench.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmHWM")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of a field of this process's status."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def measure(
    model: str,
    size: list[int],
    form: str = "ours",
    train: bool = False,
    device: str = "cpu",
    threads: int = 2,
    repeats: int = 1,
    **kwargs: Any,
) -> dict[str, float] | None:
    """Peak extra MB of a model or of the layer, and the median seconds of up to `repeats` calls; None if the memory does not suffice."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if model == "layer":
        layer = BiLevelRoutingAttention(dim=20, num_heads=4, region_grid=7, topk=4, layout="NCHW").to(device)
        inputs = [torch.randn(1, 20, *hw, device=device, requires_grad=True) for hw in ((32, 32), size)]
        small, large = (bench.training(layer, x) for x in inputs)
        return peak(small, large, layer, inputs, device, repeats)
    net = timm.create_model(model, **kwargs).to(device).train(train)
    if form == "twin":
        net = Twin(net).train(train)
    step = bench.training if train else bench.inference
    small = step(net, images(2, 224, device=device))
    large = step(net, images(1, *size, device=device))
    return peak(small, large, net, [], device, repeats)


def peak(
    small: Callable[[], Any], large: Callable[[], Any], net: nn.Module, inputs: list[Tensor], device: str, repeats: int
) -> dict[str, float] | None:
    """Warm up on a small input, then measure a large one."""
    small()
    net.zero_grad(set_to_none=True)
    for x in inputs:
        x.grad = None
    if device == "cpu":
        limit_memory()
    seconds: list[float] = []
    try:
        extra = extra_memory(lambda: seconds.append(bench.seconds_of(large)), device)
        while len(seconds) < repeats and sum(seconds) < 10:
            seconds.append(bench.seconds_of(large))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
            return None
        raise
    return {"MB": extra / MB, "s": sorted(seconds)[len(seconds) // 2]}


CASES: dict[str, dict[str, Any]] = {
    "small 800x1344, grid 16": dict(model="debiformer_small", size=LARGE, region_grid=16),
    "tiny 512x512, grid 8": dict(model="debiformer_tiny", size=SQUARE, region_grid=8),
    "tiny 512x512, grid 8, training": dict(model="debiformer_tiny", size=SQUARE, region_grid=8, train=True),
    "tiny 800x1344, grid 16": dict(model="debiformer_tiny", size=LARGE, region_grid=16),
    "tiny 800x1344, grid 16, training": dict(model="debiformer_tiny", size=LARGE, region_grid=16, train=True),
    "layer 1x20x600x500, training": dict(model="layer", size=(600, 500), train=True),
}


def compare(name: str, device: str, threads: int) -> dict[str, Any]:
    """Ours and the twin's peak of a case; the layer's twin is not run."""
    case = CASES[name] | dict(device=device, threads=threads)
    ours = call(__file__, case)
    if ours is None:
        raise RuntimeError(f"{name}: ours does not fit into the memory of this machine")
    row = {"case": name, "ours MB": ours["MB"], "ours s": ours["s"]}
    if case["model"] == "layer":
        return row | {"twin MB": "not run", "twin s": "", "less": ""}
    twin = call(__file__, case | dict(form="twin"))
    if twin is None:
        return row | {"twin MB": "does not fit", "twin s": "", "less": ""}
    return row | {"twin MB": twin["MB"], "twin s": twin["s"], "less": twin["MB"] / ours["MB"]}


def main() -> None:
    """Every case that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=f"some of: {'; '.join(CASES)}; nothing is saved then")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows = []
    for name in options.only or CASES:
        bench.tell(name)
        rows.append(compare(name, options.device, options.threads))
    print(bench.table(rows))
    if not options.only:
        print(save("memory" if options.device == "cpu" else "memory_gpu", rows, options.device))


if __name__ == "__main__":
    answer(measure) or main()
