"""How many images fit into a batch, by what one and two of them take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

LARGEST = {"cpu": 8, "cuda": 256}  # batches beyond which nothing is gained
SHARE = 0.8  # of the free memory


class BatchSize(NamedTuple):
    """Images of a batch, and why so many."""

    images: int
    reason: str


def batch_size(run: Callable[[Tensor], Any], image: Tensor, memory: int) -> BatchSize:
    """The largest power of two that fits.

    Args:
        run: What is done with a batch (B, 3, H, W).
        image: One to try with, (3, H, W), on its device.
        memory: Bytes that are free.

    Raises:
        MemoryError: If not even one image fits.
    """
    one, two = (peak(run, image.expand(count, -1, -1, -1)) for count in (1, 2))
    return fitting(one, max(two - one, 1), memory, LARGEST[image.device.type])


def fitting(one: int, each: int, memory: int, most: int) -> BatchSize:
    """The largest power of two up to `most`, where one image takes `one` bytes, each other `each`, and some of `memory` is left over."""
    free = SHARE * memory
    if one > free:
        raise MemoryError(f"one image takes {one / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")
    images = 1
    while 2 * images <= most and one + (2 * images - 1) * each <= free:
        images *= 2
    limit = "larger ones gain nothing" if images == most else "larger ones do not fit"
    return BatchSize(images, f"one image takes {one / 1e6:.0f} MB, each other {each / 1e6:.0f}, of {free / 1e6:.0f} free; {limit}")


def peak(run: Callable[[Tensor], Any], images: Tensor) -> int:
    """Bytes that torch holds at the worst moment of a call, beyond those before it."""
    if images.device.type == "cuda":
        before = torch.cuda.memory_allocated(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        run(images)
        return torch.cuda.max_memory_allocated(images.device) - before
    run(images[:1])  # what is made once and kept, as tables are, is no part of it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(images)
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = worst = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        worst = max(worst, held)
    return worst
