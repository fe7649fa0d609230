"""What reduced precision costs: the quickstart's model exported in each, on the quickstart's test crops.

python benchmarks/precision.py CHECKPOINT

int8 takes its ranges from crops of the training split. Shares of crops labelled rightly, over all and as the mean over classes; how many
are labelled otherwise than by eager mode; and the size of the files.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import save
from torch import nn

from debiformer.cli import bench
from debiformer.cli import main as command
from debiformer.data.blood_cells import SAMPLE
from debiformer.data.images import find_images, read_image
from debiformer.deploy.example import load, prepare
from debiformer.tasks.prediction import load_classifier

VARIANTS = [
    ("onnx", "float32"),
    ("onnx", "float16"),
    ("onnx", "int8"),
    ("openvino", "float32"),
    ("openvino", "float16"),
    ("openvino", "bfloat16"),
    ("torch-export", "bfloat16"),
]
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}


def main() -> None:
    """Every variant beside eager mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="runs/quickstart/checkpoints/best.ckpt of `debiformer quickstart`")
    options = parser.parse_args()
    paths = find_images([SAMPLE / "test"])
    task = load_classifier(options.checkpoint)
    names = list(task.hparams["class_names"])
    labels = np.array([names.index(path.parent.name) for path in paths])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        decided: dict[str, np.ndarray] = {}
        for form, precision in VARIANTS:
            file = Path(folder, f"{precision}{SUFFIXES[form]}")
            calibration = ["--calibration", str(SAMPLE / "train")] if precision == "int8" else []
            arguments = ["export", options.checkpoint, "--format", form, "--precision", precision, "--output", str(file), *calibration]
            if command(arguments):
                raise RuntimeError(f"{form} in {precision} does not agree with eager mode")
            description, run = load(file)
            images = np.concatenate([prepare(read_image(path), description) for path in paths])
            if not decided:
                decided["eager"] = labelled(task, images)
                rows.append(row("eager", "float32", decided["eager"], decided["eager"], labels, 0))
            found = np.concatenate([run(part)[0].argmax(1) for part in np.array_split(images, len(images) // 32)])
            size = sum(part.stat().st_size for part in {file, file.with_suffix(".bin")} if part.exists())
            rows.append(row(form, precision, found, decided["eager"], labels, size))
    print(bench.table(rows))
    print(save("precision", rows, packages=["onnxruntime", "openvino"]))


@torch.no_grad()
def labelled(task: nn.Module, images: np.ndarray) -> np.ndarray:
    """The likeliest class of each image in eager mode."""
    return np.concatenate([task(part).argmax(1).numpy() for part in torch.from_numpy(images).split(64)])


def row(form: str, precision: str, found: np.ndarray, eager: np.ndarray, labels: np.ndarray, size: int) -> dict[str, Any]:
    """A line of the table."""
    right = found == labels
    balanced = float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
    otherwise = int((found != eager).sum())
    shares = {"accuracy": float(right.mean()), "balanced accuracy": balanced, "labelled otherwise": otherwise, "images": len(labels)}
    return {"format": form, "precision": precision} | shares | {"file MB": size / 1e6}


if __name__ == "__main__":
    main()
