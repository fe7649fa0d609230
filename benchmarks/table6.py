"""The latency column of Table 6: top-k vectors in ONNX Runtime and OpenVINO on the CPU, as ratios to the released one.

python benchmarks/table6.py [--model NAME] [--threads N] [--rounds N]

The rows are those of `debiformer tables 6`: single images of 224x224 in float32, through DeBiFormer-T unless another model is named. Which
model the paper's rows are of is not known here; this is the smallest of its own. Graphs are exported once, for that size and with folded
norms. Every engine gets a fresh process, in which outputs are held to the eager model's, rows are alternated, and medians compared.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from deploy import PACKAGES, Run, check_packages, in_onnx_runtime, in_openvino
from fresh import answer, call
from pairs import TOLERANCE, images, relative_error
from record import save
from torch import Tensor, nn

import debiformer  # noqa: F401  registers the presets
from debiformer.cli import bench
from debiformer.cli.papers import ABLATED, RELEASED_TOPK, TOPK

KEYS = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}
SUFFIXES = {"ONNX Runtime": "onnx", "OpenVINO": "xml"}


def measure(model: str, rows: list[dict[str, list[int]]], path: str, threads: int, rounds: int) -> list[float]:
    """Median milliseconds of every row in one engine.

    Raises:
        RuntimeError: If the output of a graph is not that of its model.
    """
    torch.set_num_threads(threads)
    x = images(1)
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, row in enumerate(rows):
            bench.tell(f"exporting {row} for {path}")
            torch.manual_seed(0)
            network = timm.create_model(model, **row).eval().fuse_for_inference()
            file = str(Path(folder, f"{i}.{SUFFIXES[path]}"))
            write(network, x, path, file)
            runs[str(row)] = (in_onnx_runtime if path == "ONNX Runtime" else in_openvino)(file, x, threads)
            with torch.no_grad():
                error = relative_error(runs[str(row)](), network(x))
            if error > TOLERANCE:
                raise RuntimeError(f"{model} with {row}: the output in {path} differs from the model's, relative L2 {error}")
        return [1000 * seconds for seconds in bench.alternate(runs, rounds, progress=True).values()]


@torch.no_grad()
def write(model: nn.Module, x: Tensor, path: str, file: str) -> None:
    """Write the graph of a model for images of this shape and no other."""
    if path == "ONNX Runtime":
        torch.onnx.export(model, (x,), dynamo=True, optimize=False, verbose=False).save(file)
    else:
        import openvino

        # Without the shapes all of the graph would be dynamic.
        converted = openvino.convert_model(torch.export.export(model, (x,)), input=[tuple(x.shape)])
        openvino.save_model(converted, file, compress_to_fp16=False)


def main() -> None:
    """Every row in every engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ABLATED, help=f"a DeBiFormer (default {ABLATED})")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    check_packages(list(KEYS))
    rows: list[dict[str, Any]] = [{"bra_topk": list(bra), "dbra_topk": list(dbra)} for bra, dbra in TOPK]
    times = {path: call(__file__, dict(vars(options), rows=rows, path=path)) for path in KEYS}
    results = []
    for i, row in enumerate(rows):
        parameters, macs = bench.count(options.model, (224, 224), row)
        found = {"model": options.model} | row | {"params_m": parameters / 1e6, "macs_g": macs / 1e9}
        found |= {f"{key}_ms": times[path][i] for path, key in KEYS.items()}
        results.append(found | {f"{key}_ratio": times[path][i] / times[path][TOPK.index(RELEASED_TOPK)] for path, key in KEYS.items()})
    print(bench.table(results))
    print(save("table6", results, packages=list(PACKAGES)))


if __name__ == "__main__":
    answer(measure) or main()
