"""What needs a GPU, in parts of a few minutes: python benchmarks/gpu.py --part correctness|ops|models|largest-batch

correctness: the fused kernels against the readable definitions in float64, output and gradients, at the shapes and routes of a model.
ops: routed attention at 512x512 and deformable attention of stage 1 at 800x1344 in bf16, against the eager backend and plain forms.
models: inference and training at 224 in bf16 autocast, against the twin, Swin-T and ConvNeXt-T.
largest-batch: the largest batch of 800x1344 images that a training step of the backbone fits into the memory, with gradient checkpointing
and without.

--toy shrinks every part to seconds on any machine: it shows that the logic runs (with --device cpu on the eager backend); nothing is saved.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import ops
import timm
import torch
from memory import MB, extra_memory
from pairs import images, pair, relative_error
from record import save
from torch import Tensor

from debiformer import choose_backend, use_backend
from debiformer.cli import bench
from debiformer.ops import reference

Rows = list[dict[str, Any]]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny")


class Setting(NamedTuple):
    """Sizes of every part: the real ones, or a toy's."""

    model: str
    peers: tuple[str, ...]
    square: tuple[int, int, int]  # batch, size and region grid of the routed attention
    large: tuple[int, int, int, int]  # batch, height, width and region grid of the deformable attention, and of the largest batch
    inference_batch: int
    training_batch: int
    size: int
    rounds: int
    most: int  # images that the search for the largest batch goes up to


REAL = Setting("debiformer_small", PEERS, (16, 512, 8), (2, 800, 1344, 16), 128, 64, 224, 20, 256)
TOY = Setting("debiformer_nano", ("test_convnext",), (2, 64, 4), (1, 64, 96, 4), 2, 2, 64, 1, 2)


def correctness(setting: Setting, device: str) -> Rows:
    """Relative L2 errors of the output and of every gradient; a RuntimeError after the last if one is too large."""
    batch, size, grid = setting.square
    rows = []
    for dtype, tolerance in TOLERANCE.items():
        x = images(min(batch, 2), min(size, 256), device=device)
        for operation, stage, arguments in ops.catch(setting.model, x, region_grid=grid):
            rounded = arguments | {name: random_like(arguments[name], dtype) for name in ("q", "k", "v")}
            if operation == "deformable_attention":  # away from the kinks of the bilinear bias, where gradients are a matter of rounding
                rounded["points"] = torch.rand_like(arguments["points"]) * 1.9 - 0.95
            exact = {
                name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in rounded.items()
            }
            found, expected = with_gradients(ops.OURS[operation], rounded), with_gradients(getattr(reference, operation), exact)
            errors = {name: relative_error(found[name], expected[name]) for name in found}
            shown = {"operation": operation, "stage": stage, "dtype": str(dtype).removeprefix("torch.")}
            shown |= {"backend": choose_backend(operation, *(rounded[name] for name in "qkv"), rounded.get("routes")).backend}
            rows.append(shown | {"largest error": max(errors.values()), "in": max(errors, key=errors.__getitem__)})
            rows[-1]["passed"] = max(errors.values()) < tolerance
    print(bench.table(rows))
    if not all(row["passed"] for row in rows):
        raise RuntimeError("errors above the tolerance, see the table")
    return rows


def random_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Normal values in the shape and the memory layout of `x`; the near-uniform attention of untrained weights would amplify rounding."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device).normal_()


def with_gradients(operation: Callable[..., Tensor], arguments: ops.Arguments) -> dict[str, Tensor]:
    """The output, and the gradient of every argument that has one, for one and the same random cotangent."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in ops.DIFFERENTIABLE if name in arguments}
    out = operation(**arguments | leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return {"out": out.detach()} | dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), cotangent), strict=True))


def operations(setting: Setting, device: str) -> Rows:
    """Times and memory of ours, of our eager backend and of the plain forms in bf16."""
    square_batch, size, square_grid = setting.square
    batch, height, width, grid = setting.large
    calls = [
        *(c for c in catch_bf16(setting, images(square_batch, size, device=device), square_grid) if c[0] == "routed_attention"),
        *(c for c in catch_bf16(setting, images(batch, height, width, device), grid) if c[:2] == ("deformable_attention", 1)),
    ]
    rows = []
    for operation, stage, arguments in calls:
        bench.tell(f"{operation} of stage {stage}")
        eager = {"eager backend": lambda operation=operation, **kwargs: ops.OURS[operation](**kwargs, backend="eager")}
        shapes = {"stage": stage, "q": list(arguments["q"].shape), "k": list(arguments["k"].shape)}
        # The plain forms round their logits to bf16, hence the tolerance.
        rows += [shapes | row for row in ops.compare(operation, arguments, setting.rounds, 5e-2, **eager)]
    for operation in ops.FORMS:
        print(bench.table([row for row in rows if row["operation"] == operation]), "\n")
    return rows


def catch_bf16(setting: Setting, x: Tensor, grid: int) -> list[tuple[str, int, ops.Arguments]]:
    """The operations of the model under autocast."""
    return ops.catch(setting.model, x, torch.bfloat16, region_grid=grid)


def models(setting: Setting, device: str) -> Rows:
    """Milliseconds, images per second and ratios under bf16 autocast, and the peak memory of each."""
    rows = []
    for mode, batch in (("inference", setting.inference_batch), ("training", setting.training_batch)):
        x = images(batch, setting.size, device=device)
        model, twin = (m.train(mode == "training") for m in pair(setting.model, device))
        nets: dict[str, torch.nn.Module] = {setting.model: model, "twin": twin}
        for name in setting.peers:
            nets[name] = timm.create_model(name, **bench.model_arguments(name, x.shape[2:])).to(device).train(mode == "training")
        runs = {name: getattr(bench, mode)(net, x, torch.bfloat16) for name, net in nets.items()}
        runs["eager backend"] = under("eager", runs[setting.model])
        peaks = {}
        for name, run in runs.items():
            run()  # workspaces and caches come once
            for net in nets.values():
                net.zero_grad(set_to_none=True)
            peaks[name] = extra_memory(run, device) / MB
        seconds = bench.alternate(runs, setting.rounds, progress=True)
        rows += [
            {"mode": mode, "model": name, "batch": batch, "ms": 1000 * seconds[name], "images/s": batch / seconds[name]}
            | {"MB": peaks[name], f"{setting.model} x": seconds[name] / seconds[setting.model]}
            for name in runs
        ]
    print(bench.table(rows))
    return rows


def under(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    """The run with its operations on a backend."""

    def run_there() -> object:
        with use_backend(backend):
            return run()

    return run_there


def largest_batch(setting: Setting, device: str) -> Rows:
    """The largest batch that does not run out of memory, by doubling and then halving the gap, and its speed."""
    _, height, width, grid = setting.large
    rows = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(setting.model, num_classes=0, feature_norms=True, region_grid=grid).to(device).train()
        model.set_grad_checkpointing(checkpointing)
        fits: dict[int, dict[str, float]] = {}
        step, batch, too_large = 1, 1, setting.most + 1
        while batch < too_large:
            bench.tell(f"batch {batch}, gradient checkpointing {checkpointing}")
            if found := train_dense(model, batch, (height, width), device):
                fits[batch] = found
            else:
                too_large = batch
            best = max(fits, default=0)
            step = max(1, min(best, (too_large - best) // 2))
            batch = best + step
        row = {"model": setting.model, "size": f"{height}x{width}", "gradient checkpointing": checkpointing, "largest batch": best}
        rows.append(row | (fits[best] if best else {"GB": 0.0, "images/s": 0.0}))
    print(bench.table(rows))
    return rows


def train_dense(model: torch.nn.Module, batch: int, size: tuple[int, int], device: str) -> dict[str, float] | None:
    """Peak GB and images per second of forward and backward pass through the maps of all stages in bf16; None if the memory does not do."""
    x = images(batch, *size, device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            maps = model.forward_intermediates(x, norm=True, intermediates_only=True)
        torch.stack([m.float().square().mean() for m in maps]).sum().backward()

    try:
        model.zero_grad(set_to_none=True)
        peak = extra_memory(step, device)
        seconds = bench.seconds_of(step)
    except torch.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return None
    return {"GB": peak / 1e9, "images/s": batch / seconds}


PARTS = {"correctness": correctness, "ops": operations, "models": models, "largest-batch": largest_batch}


def main() -> None:
    """One part, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    for part in options.part:
        print(f"\n{part}", flush=True)
        rows = PARTS[part](TOY if options.toy else REAL, options.device)
        if not options.toy:
            print(save(f"gpu_{part}", rows, options.device))


if __name__ == "__main__":
    main()
