"""The two attention operations alone, against a gather with SDPA and the materialised form of the twin: python benchmarks/ops.py

The arguments, routes and points included, are those that a model really passes: they are caught while it runs on random images. Equal
outputs are asserted, runs are alternated, and memory is the peak above the arguments. --device cuda measures the fused kernels. On a CPU
the model attends to small maps under a mask (`bi_level_attention`), which gathers nothing: their rows are what gathering would cost.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from memory import MB, extra_memory
from pairs import images, pair, relative_error
from record import save
from torch import Tensor

from debiformer.cli import bench
from debiformer.ops import deformable_attention, routed_attention
from debiformer.ops.observation import watch

Arguments = dict[str, Any]
Attend = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
DIFFERENTIABLE = ("q", "k", "v", "points", "bias_table")


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention without stored weights where torch has it."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype), scale=scale)


def materialised(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention with logits and weights as matrices."""
    logits = (q.contiguous() * scale) @ k.contiguous().transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1).to(v.dtype) @ v.contiguous()


def gathered(attend: Attend, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, scale: float, route_weights: None) -> Tensor:
    """Routed attention over gathered keys and values."""
    batch, heads, regions, _, _ = q.shape

    def gather(x: Tensor) -> Tensor:  # (B, H, R', T', D) -> (B * R, H, K * T', D), over an expanded view
        x = x.permute(0, 2, 3, 1, 4).flatten(3)
        index = routes[..., None, None].expand(-1, -1, -1, *x.shape[2:])
        chosen = x[:, None].expand(-1, regions, -1, -1, -1).gather(2, index)
        return chosen.flatten(2, 3).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)

    out = attend(q.transpose(1, 2).flatten(0, 1), gather(k), gather(v), scale, None)
    return out.unflatten(0, (batch, regions)).transpose(1, 2)


def displaced(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, points: Tensor, bias_table: Tensor, grid_size: tuple[int, int], scale: float
) -> Tensor:
    """Deformable attention with the bias sampled at the displacement of every pair of query and point."""
    batch, groups = points.shape[:2]
    y, x = (torch.linspace(-1, 1, n, dtype=points.dtype, device=points.device) for n in grid_size)
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(1, -1, 1, 2)
    displacement = 0.5 * (pixels - points.flatten(0, 1)[:, None])
    tables = bias_table.to(points.dtype).unflatten(0, (groups, -1)).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    bias = F.grid_sample(tables, displacement, align_corners=True).view(batch, q.shape[1], q.shape[2], -1)
    return attend(q, k, v, scale, bias)


FORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "routed_attention": {"gather + SDPA": partial(gathered, sdpa), "materialised": partial(gathered, materialised)},
    "deformable_attention": {"bias + SDPA": partial(displaced, sdpa), "materialised": partial(displaced, materialised)},
}
OURS = {"routed_attention": routed_attention, "deformable_attention": deformable_attention}


def catch(name: str, x: Tensor, dtype: torch.dtype = torch.float32, **kwargs: Any) -> list[tuple[str, int, Arguments]]:
    """Every distinct one of `OURS` that a model runs on these images: its name, the stage it is first seen in, and its arguments."""
    model, _ = pair(name, str(x.device), **kwargs)
    calls: dict[Any, tuple[str, int, Arguments]] = {}
    stage = 0

    def see(operation: str, **arguments: Any) -> None:
        if operation not in OURS or (operation == "routed_attention" and arguments["routes"].shape[2] == arguments["k"].shape[2]):
            return  # dense attention, no routing; or none of those that are compared
        shapes = (operation, stage, *(tuple(value.shape) for value in arguments.values() if isinstance(value, Tensor)))
        calls.setdefault(shapes, (operation, stage, arguments))

    with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32), watch(see):
        maps = model.embed(x)
        for stage, part in enumerate(model.stages, 1):  # noqa: B007  see() reads it
            maps = part(maps)
    return list(calls.values())


def step(operation: Callable[..., Tensor], arguments: Arguments, backward: bool) -> Callable[[], Tensor]:
    """A call of the operation, with the gradients of all that has some."""
    leaves = {name: arguments[name].detach().requires_grad_(backward) for name in DIFFERENTIABLE if name in arguments}

    def run() -> Tensor:
        with torch.set_grad_enabled(backward):
            out = operation(**arguments | leaves)
        if backward:
            out.backward(torch.ones_like(out))
        for leaf in leaves.values():
            leaf.grad = None  # freed here, so that the next call's are counted as its own
        return out.detach()

    return run


def compare(operation: str, arguments: Arguments, rounds: int, tolerance: float = 1e-5, **more: Callable[..., Tensor]) -> list[Arguments]:
    """Times and peaks of ours, of `more`, and of the plain forms; a RuntimeError where outputs differ."""
    rows = []
    for backward in (False, True):
        runs = {name: step(form, arguments, backward) for name, form in ({"ours": OURS[operation]} | more | FORMS[operation]).items()}
        out = runs["ours"]()
        errors = {name: relative_error(run(), out) for name, run in runs.items()}
        if max(errors.values()) > tolerance:
            raise RuntimeError(f"{operation}: outputs differ, relative L2 {errors}")
        peaks = {name: extra_memory(run, str(out.device)) / MB for name, run in runs.items()}
        seconds = bench.alternate(runs, rounds)
        row = {"operation": operation, "pass": "forward + backward" if backward else "forward"}
        for name in runs:
            row |= {f"{name} ms": 1000 * seconds[name], f"{name} MB": peaks[name]}
        rows.append(row | {f"x {name}": seconds[name] / seconds["ours"] for name in runs if name != "ours"})
    return rows


def main() -> None:
    """Every routed and deformable attention of a model at two sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="debiformer_small")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512], help="the region grid is 7 at 224 and 8 elsewhere")
    parser.add_argument("--pixels", type=int, default=8 * 224**2, help="pixels of a batch, whatever the size of its images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for size in options.sizes:
        x = images(max(1, options.pixels // size**2), size, device=options.device)
        for operation, stage, arguments in catch(options.model, x, region_grid=7 if size == 224 else 8):
            bench.tell(f"{operation} of stage {stage} at {size}")
            shapes = {"size": size, "batch": len(x), "stage": stage, "q": list(arguments["q"].shape), "k": list(arguments["k"].shape)}
            rows += [shapes | row for row in compare(operation, arguments, options.rounds)]
    for operation in FORMS:
        print(bench.table([row for row in rows if row["operation"] == operation]), "\n")
    print(save("ops" if options.device == "cpu" else "ops_gpu", rows, options.device))


if __name__ == "__main__":
    main()
