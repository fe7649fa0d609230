"""How near OpenVINO comes to what a processor can do: its time by kind of operation, and the rate of its products beside the best there is.

python benchmarks/roofline.py [--model NAME] [--rounds N]

One image on one thread in float32, as the program beside an exported file runs it. Rates are those of OpenVINO's own counters; the best is
that of linear layers of several shapes, in OpenVINO and in PyTorch. Products of the same number of multiply-adds at that rate, and all else
in no time, would bound what one core can gain over the plain form.
"""

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import torch
from pairs import images, pair
from record import save
from torch import Tensor, nn

from debiformer.cli import bench
from debiformer.deploy.graphs import folded

OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "SNIPPETS_MODE": "DISABLE"}
PRODUCTS = ("FullyConnected", "MatMul", "Convolution")
SHAPES = ((196, 256, 256), (196, 256, 768), (784, 128, 512), (784, 512, 512), (3136, 64, 256), (2048, 2048, 2048))  # rows, in, out


@torch.no_grad()
def converted(model: nn.Module, x: Tensor) -> openvino.Model:
    """The graph of a model for inputs of one shape."""
    return openvino.convert_model(torch.export.export(model, (x,)), input=[tuple(x.shape)])


def multiply_adds(kind: str, shapes: list[tuple[int, ...]]) -> int:
    """Of an operation with these shapes of its inputs and, the last, its output."""
    _, weight, *_, out = shapes
    if "Convolution" in kind:
        return math.prod(out) * math.prod(weight[-3:])
    return math.prod(out) * math.prod(weight) // (math.prod(weight[:-2]) * out[-1])


def by_kind(graph: openvino.Model, x: Tensor, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of operation: milliseconds, and of products billions of multiply-adds."""
    network = openvino.Core().compile_model(graph, "CPU", OPTIONS | {"PERF_COUNT": True})
    operations = {operation.get_friendly_name(): operation for operation in network.get_runtime_model().get_ops()}
    request = network.create_infer_request()
    times: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(bench.WARMUP + rounds):
        request.infer([x.numpy()])
        spent: Counter[str] = Counter()
        for entry in request.get_profiling_info():
            spent[entry.node_type] += entry.real_time.total_seconds()
        for kind, seconds in spent.items():
            times[kind].append(seconds)
    work: Counter[str] = Counter()
    for entry in request.get_profiling_info():
        if entry.node_type in (*PRODUCTS, "GroupConvolution"):
            operation = operations[entry.node_name]
            shapes = [tuple(end.get_shape()) for end in (*operation.inputs(), operation.output(0))]
            work[entry.node_type] += multiply_adds(entry.node_type, shapes)
    medians = {kind: 1000 * float(np.median(found[bench.WARMUP :])) for kind, found in times.items()}
    total = sum(medians.values())
    rows = []
    for kind, ms in sorted(((kind, ms) for kind, ms in medians.items() if ms), key=lambda entry: -entry[1]):
        rate = work[kind] / ms / 1e6 if work[kind] else None
        rows.append({"operation": kind, "ms": ms, "share": ms / total, "GMAC": work[kind] / 1e9 or None, "GMAC/s": rate})
    return rows


def best_rate(rounds: int) -> list[dict[str, Any]]:
    """Linear layers in OpenVINO and in PyTorch, billions of multiply-adds a second."""
    rows = []
    for count, fewer, more in SHAPES:
        pairs = [nn.Sequential(nn.Linear(fewer, more), nn.ReLU(), nn.Linear(more, fewer), nn.ReLU()) for _ in range(4)]
        layers, x = nn.Sequential(*pairs).eval(), images(1, count, fewer)[:, 0]
        seconds = bench.alternate({"OpenVINO": in_openvino(converted(layers, x), x), "PyTorch": bench.inference(layers, x)}, rounds)
        work = 2 * len(pairs) * count * fewer * more / 1e9
        rows.append({"rows": count, "in": fewer, "out": more} | {name: work / took for name, took in seconds.items()})
    return rows


def in_openvino(graph: openvino.Model, x: Tensor) -> Callable[[], Any]:
    """A call of the compiled graph."""
    request = openvino.Core().compile_model(graph, "CPU", OPTIONS).create_infer_request()
    return lambda: request.infer([x.numpy()])


def main() -> None:
    """The model by kind of operation, the best rate, and the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="debiformer_small")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, twin = pair(options.model)
    x = images(1)
    graph = converted(folded(model), x)
    rows = by_kind(graph, x, options.rounds)
    print(f"{bench.table(rows)}\n", flush=True)
    rates = best_rate(options.rounds)
    print(f"{bench.table(rates)}\n")
    best = max(rate for row in rates for rate in (row["OpenVINO"], row["PyTorch"]))
    seconds = bench.alternate({"twin": bench.inference(twin, x), "OpenVINO": in_openvino(graph, x)}, options.rounds)
    products = sum(row["GMAC"] for row in rows if row["operation"] in PRODUCTS)
    bound = {"model": options.model, "twin ms": 1000 * seconds["twin"], "OpenVINO ms": 1000 * seconds["OpenVINO"]}
    bound |= {"x twin": seconds["twin"] / seconds["OpenVINO"], "GMAC of products": products, "best GMAC/s": best}
    bound |= {"products alone, ms": 1000 * products / best, "x twin at most": seconds["twin"] * best / products}
    print(bench.table([bound]))
    print(save("roofline", {"operations": rows, "rates": rates, "bound": bound}, packages=["openvino"]))


if __name__ == "__main__":
    main()
