"""Exported models on the CPU: every format, against eager mode, the twin, and timm's models in the same formats.

python benchmarks/deploy.py [--models NAME ...] [--peers NAME ...] [--batches N ...] [--threads N ...] [--paths PATH ...]

Files are made as `debiformer export` makes them, for one size and any number of images. All paths of all models are alternated in one
process for each batch size, number of threads and allocator (glibc's as it is, and tuned), and medians compared. "OpenVINO, fixed" is told
the batch size before it compiles; "by image" serves a batch as single images, one on each core. Errors are those against the eager model
in float64; int8 takes its ranges from noise here, so that only its time means anything.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import timm
import torch
from fresh import ALLOCATORS, answer, call
from matplotlib import pyplot as plt
from pairs import TOLERANCE, images, pair, relative_error
from record import save
from torch import Tensor, nn

from debiformer.cli import bench
from debiformer.deploy.formats import FORMATS
from debiformer.deploy.graphs import Description, Outputs, folded, graph
from debiformer.deploy.quantization import quantize
from debiformer.models.pyramid import Pyramid

Run = Callable[[], Tensor]

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "formats.png"

PACKAGES = {"onnx": "ONNX Runtime", "onnxscript": "ONNX Runtime", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
FILES = {  # path: which file it runs, as a format, a precision, and whether it is for any size
    "torch.export": ("torch-export", "float32", False),
    "AOTInductor": ("aoti", "float32", False),
    "ONNX Runtime": ("onnx", "float32", False),
    "ONNX Runtime, any size": ("onnx", "float32", True),
    "ONNX Runtime, int8": ("onnx", "int8", False),
    "OpenVINO": ("openvino", "float32", False),
    "OpenVINO, fixed": ("openvino", "float32", False),
    "OpenVINO, by image": ("openvino", "float32", False),
    "OpenVINO, any size": ("openvino", "float32", True),
    "OpenVINO, bfloat16": ("openvino", "bfloat16", False),
}
USUAL = [path for path in FILES if path != "AOTInductor"]  # which takes minutes for each model


def file_of(folder: str, model: str, form: str, precision: str, any_size: bool) -> Path:
    """Where `export` writes."""
    return Path(folder, f"{model}_{form}_{precision}_{'any' if any_size else 'one'}{FORMATS[form].suffix}")


def export(model: str, files: list[tuple[str, str, bool]], folder: str, size: int) -> dict[str, float]:
    """Write a preset, or a timm model but for any size, in these formats and precisions; the seconds that each took."""
    outputs = Outputs(folded(made(model)))
    took = {}
    for form, precision, any_size in files:
        if any_size and not isinstance(outputs.model, Pyramid):
            continue
        start = time.perf_counter()
        how: Any = dict(
            one_image=False, stride=None, short_side=None, long_side=None, crop_pct=1.0, interpolation="bicubic", class_names=(), version=""
        )
        how |= dict(mean=(0.0,) * 3, std=(1.0,) * 3)
        description = Description("classification", ("logits",), (size, size), any_size, precision=precision, **how)
        file = file_of(folder, model, form, precision, any_size)
        FORMATS[form].save(FORMATS[form].convert(graph(outputs, description), description), file, description, 1)
        if precision == "int8":
            quantize(file, [images(4, size).numpy()])
        took[f"{form} {precision}{' any size' if any_size else ''}"] = time.perf_counter() - start
    return took


def made(name: str) -> nn.Module:
    """A model with seeded weights in evaluation mode."""
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def in_onnx_runtime(file: str, x: Tensor, threads: int) -> Run:
    """The graph in ONNX Runtime, all of whose optimisations are on by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # hundreds of lines tell of constants that it does not fold
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def in_openvino(file: str, x: Tensor, threads: int, streams: int = 1, batch: int | None = None, precision: str = "f32") -> Run:
    """The graph in OpenVINO, spread over this many streams in batches of `batch`, which it is told before; None leaves it open."""
    from openvino import AsyncInferQueue, Core

    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams}
    options["SNIPPETS_MODE"] = "DISABLE"  # with them, OpenVINO 2026.4 gives wrong numbers at some sizes
    core = Core()
    model = core.read_model(file)
    if batch is not None:
        model.reshape([batch, *x.shape[1:]])
    compiled = core.compile_model(model, "CPU", options)
    parts = x.split(batch or len(x))
    queue = AsyncInferQueue(compiled, streams)
    out: list[Tensor] = [torch.empty(0)] * len(parts)
    queue.set_callback(lambda request, i: out.__setitem__(i, torch.from_numpy(request.get_output_tensor(0).data.copy())))

    def run() -> Tensor:
        for i, part in enumerate(parts):
            queue.start_async([part.numpy()], i)
        queue.wait_all()
        return torch.cat(out)

    return run


def in_torch(file: Path, x: Tensor) -> Run:
    """A file of PyTorch's; in machine code where it holds that."""
    if "_aoti_" in file.name:
        run: Any = torch._inductor.aoti_load_package(str(file))
    else:
        run = torch.export.load(file).module()

    @torch.no_grad()
    def call() -> Tensor:
        return run(x)[0]

    return call


def running(path: str, file: Path, x: Tensor, threads: int) -> Run:
    """What runs a file on these images."""
    if path.startswith("ONNX Runtime"):
        return in_onnx_runtime(str(file), x, threads)
    if path == "OpenVINO, by image":
        return in_openvino(str(file), x, threads, streams=threads, batch=1)
    if path.startswith("OpenVINO"):
        fixed = len(x) if path == "OpenVINO, fixed" else None
        return in_openvino(str(file), x, threads, batch=fixed, precision="bf16" if "bfloat16" in path else "f32")
    return in_torch(file, x)


def measure(models: list[str], batch: int, paths: list[str], folder: str, threads: int, rounds: int, size: int) -> list[dict[str, Any]]:
    """All paths of all models at one batch size, in this process.

    Raises:
        RuntimeError: If the output of a path in float32 is not that of the model.
    """
    torch.set_num_threads(threads)
    x = images(batch, size)
    runs: dict[tuple[str, str], Run] = {}
    eager: dict[str, nn.Module] = {}
    for name in models:
        eager[name] = made(name)
        if isinstance(eager[name], Pyramid):
            eager[name], twin = pair(name)
            runs[name, "twin"] = bench.inference(twin, x)
        runs[name, "eager"] = bench.inference(eager[name], x)
        for path in paths:
            file = file_of(folder, name, *FILES[path])
            if file.exists() and (batch > 1 or path != "OpenVINO, by image"):
                runs[name, path] = running(path, file, x, threads)
    seconds = bench.alternate({f"{name}: {path}": run for (name, path), run in runs.items()}, rounds, progress=True)
    rows = []
    with torch.no_grad():  # after the timing: what it frees would change how glibc allocates from then on
        exact = {name: deepcopy(model).double()(x.double()) for name, model in eager.items()}
    for name, path in runs:
        took = seconds[f"{name}: {path}"]
        error = relative_error(runs[name, path](), exact[name])
        if not error <= TOLERANCE and "int8" not in path and "bfloat16" not in path:
            raise RuntimeError(f"{name}, {path}, batch {batch}: output differs from that of the model in float64 by {error:.1e}")
        row = {"model": name, "batch": batch, "threads": threads, "path": path, "ms": 1000 * took, "images/s": batch / took}
        row["x twin"] = seconds[f"{name}: twin"] / took if (name, "twin") in runs else None
        row["x eager"] = seconds[f"{name}: eager"] / took
        for peer in (peer for peer in models if (peer, "twin") not in runs):
            row[f"x {peer}"] = seconds[f"{peer}: {path}"] / took if (peer, path) in runs else None
        rows.append(row | {"error": error})
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    """Images per second of every path and model, of the largest batch on the most threads."""
    largest = max((row["batch"], row["threads"]) for row in rows)
    shown = {
        (row["model"], row["path"]): row["images/s"]
        for row in rows
        if (row["batch"], row["threads"], row["allocator"]) == (*largest, rows[0]["allocator"])
    }
    models, paths = (list(dict.fromkeys(pair[index] for pair in shown)) for index in (0, 1))
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(8.4, 0.5 * len(paths) + 1), layout="constrained")
    thick = 0.8 / len(models)
    for number, model in enumerate(models):
        places = [(place + thick * number, shown[model, path]) for place, path in enumerate(paths) if (model, path) in shown]
        axis.barh(*zip(*places, strict=True), height=thick, label=model.partition("_patch")[0], color=f"C{number}")
    axis.set_yticks(
        [place + thick * (len(models) - 1) / 2 for place in range(len(paths))], ["plain form" if path == "twin" else path for path in paths]
    )
    axis.invert_yaxis()
    axis.set_xlabel(f"images per second, batch {largest[0]}, {largest[1]} threads")
    axis.grid(axis="x", alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(FIGURE, dpi=150)


def act(task: str, **case: Any) -> Any:
    """What a fresh process is started for."""
    return {"export": export, "measure": measure}[task](**case)


def packages_of(paths: list[str]) -> list[str]:
    """What these paths need, beside PyTorch."""
    return [package for package, path in PACKAGES.items() if any(asked.startswith(path) for asked in paths)]


def check_packages(paths: list[str]) -> None:
    """Raise a ModuleNotFoundError that says how to install what these paths need."""
    missing = [package for package in packages_of(paths) if not find_spec(package)]
    if missing:
        raise ModuleNotFoundError(f"{' and '.join(paths)} need what is not installed: pip install {' '.join(missing)}")


def main() -> None:
    """Every batch size and number of threads, with both allocators."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["debiformer_tiny", "debiformer_small"])
    parser.add_argument("--peers", nargs="*", default=["convnext_tiny", "swin_tiny_patch4_window7_224"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--paths", nargs="+", choices=FILES, default=USUAL)
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    check_packages(options.paths)
    models = [*options.models, *options.peers]
    files = list(dict.fromkeys(FILES[path] for path in options.paths))
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        took = {name: call(__file__, dict(task="export", model=name, files=files, folder=folder, size=options.size)) for name in models}
        for batch in options.batches:
            for threads in options.threads:
                for allocator in options.allocators:
                    case = dict(task="measure", models=models, batch=batch, paths=options.paths, folder=folder)
                    case |= dict(threads=threads, rounds=options.rounds, size=options.size)
                    rows = [{"allocator": allocator} | row for row in call(__file__, case, allocator)]
                    print(f"\n{bench.table(rows)}", flush=True)
                    results += rows
                    save("deploy", {"export seconds": took, "rows": results}, packages=packages_of(options.paths))
    plot(results)


if __name__ == "__main__":
    answer(act) or main()
