"""Whole models: against the twin on the same weights, and against timm's models per multiply-add.

python benchmarks/models.py [--only inference|training|bf16|peers] [--models NAME ...] [--device cuda]

Every part runs in a fresh process, once with glibc's allocator as it is and once with it tuned to keep large temporaries: page faults are a
large part of the twin's time, and no merit of an algorithm. Runs are alternated, and medians compared. On a GPU there is one allocator.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import timm
import torch
from fresh import ALLOCATORS, answer, call
from pairs import check_equal, images, pair, relative_error
from record import save
from twin import Twin

from debiformer.cli import bench

Rows = list[dict[str, Any]]

PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "maxvit_tiny_tf_224", "nextvit_small", "resnet50")
YARDSTICK = "convnext_tiny"
BATCH = 8


def inference(names: list[str], device: str, rounds: int) -> Rows:
    """The model as it is made and with its norms folded, against the twin, float32."""
    rows = []
    for name in names:
        model, twin = pair(name, device)
        models = {"twin": twin, "eager": model, "fused": deepcopy(model).fuse_for_inference()}
        for batch in (BATCH, 1):
            x = images(batch, device=device)
            error = check_equal(models, x)
            runs = {form: bench.inference(m, x) for form, m in models.items()}
            rows.append({"model": name, "batch": batch} | ratios(bench.alternate(runs, rounds, progress=True), "twin") | {"error": error})
    return rows


def training(names: list[str], device: str, rounds: int) -> Rows:
    """Forward and backward pass in training mode against the twin's, float32.

    Outputs are held equal in evaluation mode, and in training mode in float64: there batch norms amplify the rounding of float32, in which
    the difference is stated.
    """
    rows = []
    for name in names:
        model, twin = pair(name, device)
        x = images(BATCH, device=device)
        error = check_equal({"twin": twin, "eager": model}, x)
        exact = deepcopy(model).double().train()
        check_equal({"twin": Twin(exact), "eager": exact}, x.double())
        models = {"twin": twin.train(), "eager": model}  # the twin holds the model
        with torch.no_grad():
            rounding = relative_error(model(x), twin(x))
        runs = {form: bench.training(m, x) for form, m in models.items()}
        seconds = bench.alternate(runs, rounds, progress=True)
        rows.append({"model": name, "batch": BATCH} | ratios(seconds, "twin") | {"error": error, "error in training": rounding})
    return rows


def bf16(names: list[str], device: str, rounds: int) -> Rows:
    """Inference under autocast against the twin in float32; errors of both under autocast against the model in float64."""
    rows = []
    for name in names:
        model, twin = pair(name, device)
        x = images(BATCH, device=device)
        check_equal({"twin": twin, "eager": model}, x)
        runs = {
            "twin": bench.inference(twin, x),
            "twin bf16": bench.inference(twin, x, torch.bfloat16),
            "bf16": bench.inference(model, x, torch.bfloat16),
            "fused bf16": bench.inference(deepcopy(model).fuse_for_inference(), x, torch.bfloat16),
        }
        with torch.no_grad():
            exact = deepcopy(model).double()(x.double())
        errors = {f"{form} error": relative_error(runs[form](), exact) for form in runs if form != "twin"}
        rows.append({"model": name, "batch": BATCH} | ratios(bench.alternate(runs, rounds, progress=True), "twin") | errors)
    return rows


def peers(names: list[str], device: str, rounds: int) -> Rows:
    """Ours and timm's in one process, float32: multiply-adds per second beside those of ConvNeXt-T."""
    x = images(BATCH, device=device)
    runs, costs = {}, {}
    for name in (*names, *PEERS):
        costs[name] = bench.count(name, x.shape[2:], bench.model_arguments(name, x.shape[2:]))
        torch.manual_seed(0)
        model = timm.create_model(name, **bench.model_arguments(name, x.shape[2:])).to(device).eval()
        runs[name] = bench.inference(model, x)
    seconds = bench.alternate(runs, rounds, progress=True)
    yardstick = costs[YARDSTICK][1] / seconds[YARDSTICK]
    return [
        {"model": name, "M params": parameters / 1e6}
        | bench.speeds(macs, BATCH, seconds[name])
        | {"per MAC": macs / seconds[name] / yardstick, "per image": seconds[YARDSTICK] / seconds[name]}
        for name, (parameters, macs) in costs.items()
    ]


def ratios(seconds: dict[str, float], baseline: str) -> dict[str, float]:
    """Milliseconds of every run, and how many times as fast as the baseline the others are."""
    times = {f"{name} ms": 1000 * value for name, value in seconds.items()}
    return times | {f"{name} x": seconds[baseline] / value for name, value in seconds.items() if name != baseline}


PARTS: dict[str, Callable[..., Rows]] = {"inference": inference, "training": training, "bf16": bf16, "peers": peers}
MODELS = {
    "inference": ["debiformer_tiny", "debiformer_small", "debiformer_base", "biformer_tiny"],
    "training": ["debiformer_tiny"],
    "bf16": ["debiformer_tiny", "debiformer_small", "debiformer_base"],
    "peers": ["debiformer_tiny", "debiformer_small", "debiformer_base"],
}


def measure(part: str, threads: int, **case: Any) -> Rows:
    """One part, in this process."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # which torch allows convolutions by default, and products not
    return PARTS[part](**case)


def main() -> None:
    """Every part that is asked for, with every allocator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part (default: all); results go to a file for each")
    parser.add_argument("--models", nargs="+", help="presets (default: those that the part is about)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    for part in [options.only] if options.only else PARTS:
        case = dict(part=part, names=options.models or MODELS[part], device=options.device, threads=options.threads, rounds=options.rounds)
        results: Rows = []
        for allocator in ["default"] if on_gpu else ALLOCATORS:
            rows = [({} if on_gpu else {"allocator": allocator}) | row for row in call(__file__, case, allocator)]
            print(f"\n{part}\n{bench.table(rows)}", flush=True)
            results += rows
        print(save(f"models_{part}_gpu" if on_gpu else f"models_{part}", results, options.device))


if __name__ == "__main__":
    answer(measure) or main()
