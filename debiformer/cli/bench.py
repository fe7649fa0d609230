"""Command bench: the speed of timm models side by side, in one process and by turns."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..models import ROUTED
from ..nearest import did_you_mean
from ..ops import use_backend
from .arguments import at_least_one

WARMUP = 2  # rounds that are not counted: caches fill, and cuDNN and oneDNN choose their algorithms
TRAINING_FACTOR = 3  # multiply-adds of a training step: the gradients of inputs and of weights take a forward pass each
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def run(arguments: list[str]) -> int:
    """Compare models, print the table, and write it as JSON where a file is named.

    Raises:
        ValueError: If an argument will not do, or a model does not run at the image size.
        FileNotFoundError: If the folder of the JSON file does not exist.
    """
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)  # the one that `synchronize` waits for
    kwargs = {name: model_arguments(name, options.image_size, options.region_grid) for name in dict.fromkeys(options.models)}
    costs = {name: count(name, options.image_size, kwargs[name]) for name in kwargs}
    x = torch.randn(options.batch_size, 3, *options.image_size, device=options.device)
    runs = {}
    for name in kwargs:
        tell(f"building {name}")
        torch.manual_seed(0)
        model = timm.create_model(name, **kwargs[name]).to(options.device).train(options.train)
        if options.compile:
            model.compile()
        runs[name] = (training if options.train else inference)(model, x, DTYPES[options.dtype])
    first_calls = {}
    if options.compile:
        for name, call in runs.items():
            tell(f"compiling {name}")
            first_calls[name] = seconds_of(call)
    seconds = alternate(runs, options.rounds, progress=True)
    tell("")
    macs = {name: costs[name][1] * (TRAINING_FACTOR if options.train else 1) for name in runs}
    rows = [
        {"model": name, "M params": costs[name][0] / 1e6}
        | speeds(macs[name], options.batch_size, seconds[name])
        | {"ratio": seconds[next(iter(runs))] / seconds[name]}
        | ({"first call s": first_calls[name]} if options.compile else {})
        for name in runs
    ]
    print(table(rows))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("models", "json")}
        settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "timm": timm.__version__}
        options.json.write_text(json.dumps({"settings": settings, "models": rows}, indent=2) + "\n")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of bench, checked before any work is done."""
    parser = argparse.ArgumentParser(
        prog="debiformer bench",
        description="Compare the speed of timm models, those of this library and all others, by medians of alternated rounds.",
        epilog="GMACs: multiply-adds per image, counted on the definition of each operation, however it runs; a training step counts "
        f"as {TRAINING_FACTOR} forward passes. Ratio: images per second relative to the first model.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names as timm.create_model takes them, such as debiformer_small")
    parser.add_argument("--batch-size", type=at_least_one, default=8, help="images per batch (default 8)")
    parser.add_argument("--image-size", type=at_least_one, nargs="+", default=[224], metavar="N", help="N, or H W (default 224)")
    parser.add_argument("--region-grid", type=at_least_one, help="rows and columns of regions, for the models that have them")
    parser.add_argument("--threads", type=at_least_one, help="threads of the CPU (default: as torch chooses)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="half precisions run under autocast (default float32)")
    parser.add_argument("--train", action="store_true", help="forward and backward pass in training mode, instead of inference")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model, and show the seconds of its first call")
    parser.add_argument("--rounds", type=at_least_one, default=10, help="timed rounds; every round runs each model once (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table and the settings to this file too")
    options = parser.parse_args(arguments)
    known = timm.list_models()
    for name in options.models:
        if not timm.is_model(name):
            raise ValueError(f"no model {name!r} in timm: {did_you_mean(name, known)}")
    if len(options.image_size) > 2:
        raise ValueError(f"--image-size {' '.join(map(str, options.image_size))}: give one number, or height and width")
    options.image_size = (options.image_size * 2)[:2]
    if options.region_grid and not any(name in ROUTED for name in options.models):
        raise ValueError(f"--region-grid {options.region_grid}: none of {', '.join(options.models)} has regions")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device} cannot be used here: {str(error).splitlines()[0]}") from error
    if options.json and not options.json.parent.is_dir():
        raise FileNotFoundError(f"--json {options.json}: there is no folder {options.json.parent}")
    return options


def model_arguments(name: str, image_size: Sequence[int], region_grid: int | None = None) -> dict[str, Any]:
    """What `timm.create_model` needs to build a model for images of this height and width."""
    if name in ROUTED:
        return {"region_grid": region_grid} if region_grid else {}
    cfg = timm.get_pretrained_cfg(name)
    return {"img_size": tuple(image_size)} if cfg is not None and cfg.fixed_input_size else {}


def count(name: str, image_size: Sequence[int], kwargs: dict[str, Any] | None = None) -> tuple[int, float]:
    """Parameters, and multiply-adds per image of this height and width; counted without storage, on the readable form of each operation.

    Raises:
        ValueError: If the model does not run at this size.
    """
    try:
        return cost(lambda: timm.create_model(name, **(kwargs or {})), lambda model: model(torch.empty(1, 3, *image_size)))
    except Exception as error:  # whatever a model of timm's raises
        raise ValueError(f"{name} does not run at {'x'.join(map(str, image_size))}: {error or type(error).__name__}") from error


def cost(build: Callable[[], nn.Module], run: Callable[[nn.Module], object]) -> tuple[int, float]:
    """Parameters of what `build` makes and multiply-adds of what `run` does with it, as `count` counts them."""
    with torch.device("meta"), torch.no_grad(), use_backend("reference"), _Unsampled(), FlopCounterMode(display=False) as counter:
        model = build().eval()
        run(model)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2


class _Unsampled(TorchFunctionMode):
    """Answers `grid_sample` by the shape alone: nothing in it is counted, and tracing it would take most of the time."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.grid_sample:
            image, grid = args
            return image.new_empty(*image.shape[:2], *grid.shape[1:-1])
        return function(*args, **(kwargs or {}))


def inference(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    """One forward pass without gradients, under autocast where `dtype` is a half precision."""

    @torch.inference_mode()
    def run() -> Any:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return model(x)

    return run


def training(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """One forward and backward pass, under autocast where `dtype` is a half precision."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            out = model(x)
        out.float().square().mean().backward()

    return run


def alternate(runs: dict[str, Callable[[], object]], rounds: int, warmup: int = WARMUP, progress: bool = False) -> dict[str, float]:
    """Median seconds of each run; every round runs all of them in turn, so that a busy moment meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name, run in runs.items():
            if progress:
                tell(f"{f'round {i - warmup + 1} of {rounds}' if i >= warmup else 'warming up'}: {name}")
            took = seconds_of(run)
            if i >= warmup:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that one call takes until its work is done."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def speeds(macs: float, batch_size: int, seconds: float) -> dict[str, float]:
    """The columns that follow from multiply-adds per image and seconds per batch."""
    images = batch_size / seconds
    return {"GMACs": macs / 1e9, "ms": 1000 * seconds, "images/s": images, "GMAC/s": images * macs / 1e9}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as aligned text, names to the left and numbers to the right."""
    cells = [list(rows[0]), *([f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    named = [isinstance(value, str) for value in rows[0].values()]
    aligned = ([f"{text:<{n}}" if left else f"{text:>{n}}" for text, n, left in zip(line, widths, named, strict=True)] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def tell(message: str) -> None:
    """A line of progress on stderr, which the next one replaces where a person is watching."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)
    elif message:
        print(message, file=sys.stderr, flush=True)
