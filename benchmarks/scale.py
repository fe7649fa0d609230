"""Memory and speed of `debiformer predict --engine ray` and of the local engine: python benchmarks/scale.py [--images 400]

DeBiFormer-nano at 64 pixels with random weights labels JPEGs of 500x375, the same hundred over and over: so many, and ten times as many.
Memory is the largest sum, over the command and all processes that it started, of their proportional set
sizes: memory that several share, as Ray's object store is, counts once. It is looked at five times a second, and so is the time that they
spend on processors, which other work on the machine adds little to. `images/s` and `core ms` are of the long run, from the moment that its
first results are on the disk to its last ones: libraries and Ray are loaded by then. Then what the arithmetic of docs/scale.md starts from.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from record import save

from debiformer.cli import bench
from debiformer.cli.published import write_task
from debiformer.data.images import read_image
from debiformer.scale.cluster import arrange, cluster, machines, predict_parts
from debiformer.scale.findings import Labels, schema_of
from debiformer.scale.sources import find_parts
from debiformer.scale.storage import Output, PartFile
from debiformer.scale.workers import Setting
from debiformer.tasks.classification import ClassificationTask

PART = 100  # images
ENGINES = {
    "local, 1 thread": [],
    "ray, 1 actor": ["--engine", "ray", "--actors", "1"],
    "ray, 2 actors": ["--engine", "ray", "--actors", "2"],
}


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return []
    return [pid, *(each for child in children for each in family(child))]


def memory(pid: int) -> int:
    """Bytes that a process and its family take together."""
    total = 0
    for each in family(pid):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def processor_seconds(pid: int) -> dict[int, float]:
    """Seconds on processors of each process of a family."""
    found = {}
    for each in family(pid):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        found[each] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def images_in(output: Path) -> int:
    """Images whose results are on the disk."""
    if output.suffix:
        return max(len(output.read_bytes().splitlines()) - 1, 0) if output.exists() else 0
    return PART * len(list(output.glob("part-*.parquet")))


def measure(arguments: list[str], output: Path) -> dict[str, float]:
    """Seconds and largest MB of a command, and the images per second and core milliseconds per image while it writes."""
    most = 0
    busy: dict[int, float] = {}
    moments: list[tuple[int, float, float]] = []  # images, seconds and seconds on processors, whenever there are more images
    begin = time.perf_counter()
    command = [sys.executable, "-m", "debiformer", "predict", "--device", "cpu", "--output", str(output), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # of the local engine: Ray gives its workers threads by their CPUs
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None:
            most = max(most, memory(process.pid))
            busy |= processor_seconds(process.pid)
            done = images_in(output)
            if done and (not moments or done > moments[-1][0]):
                moments.append((done, time.perf_counter(), sum(busy.values())))
            time.sleep(0.2)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()
    found = {"s": time.perf_counter() - begin, "MB": most / 1e6}
    images, seconds, working = (last - first for first, last in zip(moments[0], moments[-1], strict=True))
    return found | ({"images/s": images / seconds, "core ms": 1000 * working / images} if images else {})


def write_images(folder: Path, count: int) -> None:
    """A hundred JPEGs of smooth noise, about as large as photographs are, under as many names as asked for."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(count):
        file = folder / f"{number:06}.jpg"
        if number < 100:
            pixels = noise.integers(0, 256, (125, 167, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(file, quality=90)
        else:
            os.link(folder / f"{number % 100:06}.jpg", file)


def arithmetic(folder: Path, photographs: Path) -> dict[str, float]:
    """What a larger run is reckoned from: seconds of a core to read and decode an image, bytes of names and rows, parts a second."""
    task = ClassificationTask("test_convnext", ["cat", "dog", "horse"], (3, 224, 224)).eval()
    finder = Labels(task, 3, True)
    images = sorted(photographs.iterdir())[:100]
    begin = time.process_time()
    for image in images:
        finder.prepare(read_image(image))
    found = {"decode core s": (time.process_time() - begin) / len(images)}
    names = [f"s3://bucket/photographs/of/2026/shard.tar#{number:09}" for number in range(4096)]
    found["name bytes"] = (sum(map(sys.getsizeof, names)) + sys.getsizeof(names)) / len(names)
    noise = torch.Generator().manual_seed(0)
    rows = [row for _ in range(64) for row in finder.find(torch.randn(64, 3, 224, 224, generator=noise).unbind())]
    schema = schema_of(finder, {})
    for what, columns in (("row", [name for name in schema.names if name != "embedding"]), ("embedding", ["embedding"])):
        output = Output(str(folder / what))
        output.begin({})
        with PartFile(output, 0, pa.schema([schema.field(name) for name in columns])) as file:
            file.write([{"path": name, "error": None} | row for name, row in zip(names, rows, strict=True)])
        found[f"{what} bytes"] = next((folder / what).glob("*.parquet")).stat().st_size / len(rows)
    return found | {"embedding channels": len(rows[0]["embedding"]), "parts/s": empty_parts(finder, folder)}


def empty_parts(finder: Labels, folder: Path, count: int = 2000) -> float:
    """Parts without an image that two workers are handed, and write, in a second."""
    shards = folder / "shards"
    shards.mkdir()
    for number in range(count):
        tarfile.open(shards / f"{number:06}.tar", "w").close()
    output = Output(str(folder / "nothing"))
    output.begin({})
    parts = find_parts([str(shards)], PART, "image")
    with cluster(None):
        workers = arrange(machines(), "cpu", 2)
        setting = Setting(finder, schema_of(finder, {}), output.address, "image", "cpu", workers.cpus, workers.memory, 1)
        reports = predict_parts(parts, setting, workers)
        next(reports)
        begin = time.perf_counter()
        return sum(1 for _ in reports) / (time.perf_counter() - begin)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="of the short run; the long one has ten times as many")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        checkpoint, counts = Path(work, "nano.ckpt"), (options.images, 10 * options.images)
        write_task(ClassificationTask("debiformer_nano", ["a", "b", "c"], (3, 64, 64)), checkpoint)
        for count in counts:
            write_images(Path(work, str(count)), count)
        megabytes = sum(file.stat().st_size for file in Path(work, str(counts[1])).iterdir()) / counts[1] / 1e6
        for number, (engine, arguments) in enumerate(ENGINES.items()):
            row: dict[str, object] = {"engine": engine}
            for count in counts:
                bench.tell(f"{engine}, {count} images")
                output = Path(work, f"{number}_{count}{'' if arguments else '.csv'}")
                sized = ["--part-size", str(PART)] if arguments else []
                found = measure([f"{work}/{count}", "--checkpoint", str(checkpoint), *arguments, *sized], output)
                row |= {f"{count}: s": round(found["s"], 1), f"{count}: peak MB": round(found["MB"])}
            rows.append(row | {name: round(found[name], 1) for name in ("images/s", "core ms")})
        print(bench.table(rows))
        print(f"{megabytes:.3f} MB an image")
        found = {name: float(f"{value:.3g}") for name, value in arithmetic(Path(work), Path(work, str(counts[0]))).items()}
    print(bench.table([found]))
    print(save("scale", {"MB of an image": round(megabytes, 3), "rows": rows, "arithmetic": found}, packages=("ray", "pyarrow")))


if __name__ == "__main__":
    run()
