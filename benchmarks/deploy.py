"""Deployed models: ONNX Runtime and OpenVINO against the twin and eager mode, on the same weights, on the CPU in float32.

python benchmarks/deploy.py [--models NAME ...] [--batches N ...] [--only PATH ...] [--compiled]

Graphs are exported once, for fixed sizes and from the model with its norms folded. Every comparison runs in a fresh process, with glibc's
allocator as it is and tuned; its paths are alternated, and medians compared. "OpenVINO, by image" serves a batch as single images, one on
each core: nothing then waits for another core, and an image stays in its cache. Errors are those against the eager model in float64.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from fresh import ALLOCATORS, answer, call
from models import ratios
from pairs import TOLERANCE, images, pair, relative_error
from record import save
from torch import Tensor, nn

from debiformer.cli import bench

Run = Callable[[], Tensor]

PACKAGES = {"onnx": "ONNX Runtime", "onnxscript": "ONNX Runtime", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
FORMATS = {"ONNX Runtime": "onnx", "OpenVINO": "xml"}


def export(name: str, batch: int, path: str, folder: str) -> float:
    """Write the graph of a preset for `path` into the folder; returns the seconds it took."""
    model, x = pair(name)[0].fuse_for_inference(), images(batch)
    start = time.perf_counter()
    write(model, x, path, graph(folder, name, batch, path))
    return time.perf_counter() - start


@torch.no_grad()
def write(model: nn.Module, x: Tensor, path: str, file: str) -> None:
    """Write the graph of a model for `path`, for images of this shape."""
    if path == "ONNX Runtime":
        torch.onnx.export(model, (x,), dynamo=True, optimize=False, verbose=False).save(file)
    else:
        import openvino

        # Without the shapes all of the graph would be dynamic.
        converted = openvino.convert_model(torch.export.export(model, (x,)), input=[tuple(x.shape)])
        openvino.save_model(converted, file, compress_to_fp16=False)


def graph(folder: str, name: str, batch: int, path: str) -> str:
    """Where `export` writes."""
    return str(Path(folder, f"{name}_{batch}.{FORMATS[path]}"))


def in_onnx_runtime(file: str, x: Tensor, threads: int) -> Run:
    """The graph in ONNX Runtime, all of whose optimisations are on by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # hundreds of lines tell of constants that it does not fold
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def in_openvino(file: str, x: Tensor, threads: int, streams: int = 1) -> Run:
    """The graph in OpenVINO: batches of the graph's own size, spread over this many streams."""
    from openvino import AsyncInferQueue, Core

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams}
    options["SNIPPETS_MODE"] = "DISABLE"  # with them, OpenVINO 2026.4 gives wrong numbers at some sizes
    compiled = Core().compile_model(file, "CPU", options)
    parts = x.split(compiled.input(0).shape[0])
    queue = AsyncInferQueue(compiled, streams)
    out: list[Tensor] = [torch.empty(0)] * len(parts)
    queue.set_callback(lambda request, i: out.__setitem__(i, torch.from_numpy(request.get_output_tensor(0).data.copy())))

    def run() -> Tensor:
        for i, part in enumerate(parts):
            queue.start_async([part.numpy()], i)
        queue.wait_all()
        return torch.cat(out)

    return run


def measure(name: str, batch: int, paths: list[str], folder: str, compiled: bool, threads: int, rounds: int) -> dict[str, Any]:
    """One model at one batch size, in this process.

    Raises:
        RuntimeError: If the output of a path is not that of the model.
    """
    torch.set_num_threads(threads)
    model, twin = pair(name)
    x = images(batch)
    forms: dict[str, nn.Module] = {"twin": twin, "eager": model, "eager, fused": deepcopy(model).fuse_for_inference()}
    if compiled:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)  # its first call compiles everything anew
        forms["compiled by blocks"] = deepcopy(model).fuse_for_inference().compile_blocks()
    runs: dict[str, Run] = {form: bench.inference(m, x) for form, m in forms.items()}
    if "ONNX Runtime" in paths:
        runs["ONNX Runtime"] = in_onnx_runtime(graph(folder, name, batch, "ONNX Runtime"), x, threads)
    if "OpenVINO" in paths:
        runs["OpenVINO"] = in_openvino(graph(folder, name, batch, "OpenVINO"), x, threads)
        if batch > 1:
            runs["OpenVINO, by image"] = in_openvino(graph(folder, name, 1, "OpenVINO"), x, threads, streams=threads)
    took = {path: bench.seconds_of(run) for path, run in runs.items()}
    times = ratios(bench.alternate(runs, rounds, progress=True), "twin")
    with torch.no_grad():  # after the timing: what it frees would change how glibc allocates from then on
        exact = deepcopy(model).double()(x.double())
    errors = {path: relative_error(run(), exact) for path, run in runs.items()}
    if max(errors.values()) > TOLERANCE:
        raise RuntimeError(f"{name}, batch {batch}: outputs differ from those of the model in float64, relative L2 {errors}")
    return {"times": times, "errors": errors, "first calls": took}


def act(task: str, **case: Any) -> Any:
    """What a fresh process is started for."""
    return {"export": export, "measure": measure}[task](**case)


def check_packages(paths: list[str]) -> None:
    """Raise a ModuleNotFoundError that says how to install what these paths need."""
    missing = [package for package, path in PACKAGES.items() if path in paths and not find_spec(package)]
    if missing:
        raise ModuleNotFoundError(f"{' and '.join(paths)} need what is not installed: pip install {' '.join(missing)}")


def main() -> None:
    """Every model at every batch size, with both allocators."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["debiformer_tiny", "debiformer_small", "debiformer_base"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS), help="of the engines")
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well, which takes minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    check_packages(options.only)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            needed = [(path, batch) for path in options.only for batch in {*options.batches, *([1] if path == "OpenVINO" else [])}]
            took = {
                (path, batch): call(__file__, dict(task="export", name=name, batch=batch, path=path, folder=folder))
                for path, batch in needed
            }
            for batch in options.batches:
                for allocator in ALLOCATORS:
                    case = dict(task="measure", name=name, batch=batch, paths=options.only, folder=folder)
                    case |= dict(compiled=options.compiled, threads=options.threads, rounds=options.rounds)
                    found = call(__file__, case, allocator)
                    rows = [
                        {"model": name, "batch": batch, "allocator": allocator, "path": path, "ms": found["times"][f"{path} ms"]}
                        | {"x twin": found["times"].get(f"{path} x", 1.0), "error": error}
                        | {"export s": took.get((path.split(",")[0], 1 if "by image" in path else batch), 0.0)}
                        | {"first call s": found["first calls"][path]}
                        for path, error in found["errors"].items()
                    ]
                    print(f"\n{bench.table(rows)}", flush=True)
                    results += rows
                    save("deploy", results, packages=[package for package, path in PACKAGES.items() if path in options.only])


if __name__ == "__main__":
    answer(act) or main()
