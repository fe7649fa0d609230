"""Tail latencies of `debiformer serve` on localhost: python benchmarks/serve.py [--seconds 20]

So many clients, each of which sends its next photograph (JPEG, 640x480) when the last is answered, to a server on the same processor.
Weights are random. With batches of one, the model sees one image at a time; with eight, what has gathered meanwhile.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families
from record import save

from debiformer.cli import bench
from debiformer.cli.published import write_task
from debiformer.data.blood_cells import whole_images
from debiformer.tasks.classification import ClassificationTask

MODELS = {"debiformer_nano": 64, "debiformer_tiny": 224}
WARMUP = 3  # seconds that are not counted


def client(port: int, seconds: float, bodies: list[bytes]) -> list[float]:
    """Seconds of each request, one after the other, but for those of the warm-up."""
    connection, taken, begin = HTTPConnection("127.0.0.1", port), [], time.perf_counter()
    while (sent := time.perf_counter()) < begin + WARMUP + seconds:
        connection.request("POST", "/predict", bodies[len(taken) % len(bodies)])
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        if sent > begin + WARMUP:
            taken.append(time.perf_counter() - sent)
    return taken


def batches(port: int) -> np.ndarray:
    """How many images the model has seen so far, and in how many batches."""
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    families = text_string_to_metric_families(connection.getresponse().read().decode())
    values = {sample.name: sample.value for family in families for sample in family.samples}
    return np.array([values["debiformer_batch_images_sum"], values["debiformer_batch_images_count"]])


def measure(port: int, clients: int, seconds: float, bodies: list[bytes]) -> dict[str, float]:
    """Quantiles in milliseconds, and what the server managed meanwhile."""
    before = batches(port)
    with ThreadPoolExecutor(clients) as pool:
        parts = pool.map(lambda number: client(port, seconds, bodies[number:] + bodies[:number]), range(clients))
        taken = [value for part in parts for value in part]
    images, passes = batches(port) - before
    quantiles = {f"p{q} ms": round(1000 * float(np.percentile(taken, q)), 1) for q in (50, 95, 99)}
    return quantiles | {"requests": len(taken), "requests/s": round(len(taken) / seconds, 1), "images per batch": round(images / passes, 2)}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each row, after the warm-up")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="at once")
    options = parser.parse_args()
    bodies = [path.read_bytes() for path, _ in whole_images()]
    rows = []
    for model, size in MODELS.items():
        for batch_size in (1, 8):
            with tempfile.TemporaryDirectory() as work:
                torch.manual_seed(0)
                checkpoint = Path(work, "random.ckpt")
                write_task(ClassificationTask(model, ["a", "b", "c"], input_size=(3, size, size)), checkpoint)
                command = [sys.executable, "-m", "debiformer", "serve", str(checkpoint), "--port", "0", "--batch-size", str(batch_size)]
                with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
                    assert server.stderr is not None
                    port = next(int(found[1]) for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
                    for clients in options.clients:
                        bench.tell(f"{model}, batches up to {batch_size}, {clients} clients")
                        found = measure(port, clients, options.seconds, bodies)
                        rows.append({"model": model, "size": size, "batch size": batch_size, "clients": clients} | found)
                    server.terminate()
    print(bench.table(rows))
    print(save("serve", rows, packages=["starlette", "uvicorn"]))


if __name__ == "__main__":
    run()
