"""Peak memory of `debiformer predict` on one huge picture and on long folders: python benchmarks/predict.py [--images 1000]

Segmentation by DeBiFormer-nano with Semantic FPN and 150 classes, in windows of 512 over pictures at their own size; detection by its
RetinaNet. Weights are random. Each row is a process of its own, whose largest resident size is told, libraries included. The pictures are
noise, enlarged: what is in them does not matter. With the classes of all pixels as float32 logits, 8000x6000 would take 28.8 GB.
"""

import argparse
import contextlib
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from fresh import answer, call
from PIL import Image
from record import save

from debiformer.cli import bench, main
from debiformer.cli.published import write_task
from debiformer.data.masks import read_classes
from debiformer.tasks.base import BaseTask
from debiformer.tasks.detection import DetectionTask
from debiformer.tasks.segmentation import SegmentationTask

BACKBONE = dict(feature_norms=True, region_grid=[8, 8])
OPTIONS = {"segmentation": ["--short-side", "0", "--window", "512"], "detection": ["--min-score", "0"]}


def task_of(kind: str) -> BaseTask:
    """A task with random weights."""
    torch.manual_seed(0)
    classes = read_classes("ade20k")
    if kind == "segmentation":
        return SegmentationTask("debiformer_nano", classes.names, classes.palette, backbone_args=BACKBONE)
    sizes = dict(pyramid_channels=64, short_side=240, long_side=320)
    return DetectionTask("debiformer_nano", classes.names, backbone_args=BACKBONE, milestones=[8], **sizes)


def measure(kind: str, folder: str, threads: int) -> list[float]:
    """Largest resident MB and seconds of one prediction; what it draws is included."""
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(None):
        line = ["predict", "--checkpoint", f"{Path(folder).parent}/{kind}.ckpt", "--output", output, "--draw", "--device", "cpu", folder]
        assert main([*line, *OPTIONS[kind]]) == 0
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, time.perf_counter() - begin]


def noise(file: Path, width: int, height: int, seed: int) -> None:
    """Write a picture."""
    file.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(file)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="of the long folder; the short one has a tenth")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for kind in OPTIONS:
            write_task(task_of(kind), Path(work, f"{kind}.ckpt"))
        noise(Path(work, "huge", "0.jpg"), 8000, 6000, 0)
        noise(Path(work, "small", "0.jpg"), 640, 480, 0)
        for name, count in {"short": options.images // 10, "long": options.images}.items():
            for number in range(count):
                noise(Path(work, name, f"{number}.jpg"), 320, 240, number)
        pictures = {"small": "640x480", "huge": "8000x6000", "short": "320x240", "long": "320x240"}
        for kind in OPTIONS:
            for folder, size in pictures.items():
                bench.tell(f"{kind} of {folder}")
                megabytes, seconds = call(__file__, dict(kind=kind, folder=f"{work}/{folder}", threads=options.threads))
                count = len(list(Path(work, folder).iterdir()))
                rows.append({"task": kind, "images": count, "size": size, "peak MB": round(megabytes), "s": round(seconds, 1)})
    print(bench.table(rows))
    print(save("predict", rows))


if __name__ == "__main__":
    answer(measure) or run()
