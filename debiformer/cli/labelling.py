"""Command predict: labels for files, as a table on the screen and as CSV or JSON lines in a file."""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import IO

import torch
from PIL.Image import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.images import UnreadableImage, eval_transform, find_images, read_image, shown
from ..tasks.prediction import PREPROCESSING, Prediction, load_classifier, predict
from .arguments import at_least_one


def run(arguments: list[str]) -> int:
    """Label files and folders; 1 if not one image could be read, else 0.

    Raises:
        ValueError: If an argument, the checkpoint or the output's suffix will not do.
        FileNotFoundError: If the checkpoint, the output's folder or an image is missing.
    """
    options = parse(arguments)
    check_output(options.output)
    paths = find_images(options.images)
    task = load_classifier(options.checkpoint, options.device)
    transform = eval_transform(**{name: task.hparams[name] for name in PREPROCESSING})
    console = Console()
    classes = task.hparams["class_names"]
    topk = min(options.topk, len(classes))
    labels_width = min(24, max(map(len, ["unreadable", *classes])))
    read = failed = 0
    with options.output.open("w", encoding="utf-8", newline="") if options.output else nullcontext() as file:
        write = writer(file, topk) if file else None
        predictions = predict(task, read_all(paths), transform, options.batch_size, topk)
        while batch := list(islice(predictions, options.batch_size)):
            console.print(table(batch, labels_width, heading=not read + failed))
            if write:
                for prediction in batch:
                    write(prediction)
            failed += sum(prediction.error is not None for prediction in batch)
            read += sum(prediction.error is None for prediction in batch)
    print(f"{read} labelled, {failed} unreadable" + (f", written to {options.output}" if options.output else ""), file=sys.stderr)
    return 0 if read else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of predict."""
    parser = argparse.ArgumentParser(
        prog="debiformer predict",
        description="Label images with a checkpoint of `debiformer fit`.",
        epilog="Checkpoints of segmentation and detection have options of their own: --checkpoint FILE --help shows them. "
        "On a Ray cluster: --engine ray --help.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="images; folders are searched for images")
    parser.add_argument("--checkpoint", required=True, help="best.ckpt or last.ckpt of a run, a shared folder, or hf-hub:OWNER/NAME")
    parser.add_argument("--output", type=Path, help="write to this file too: .csv, or .jsonl for JSON lines")
    parser.add_argument("--topk", default=3, type=at_least_one, help="labels per image, the likeliest first (default 3)")
    parser.add_argument("--batch-size", default=32, type=at_least_one, help="images in memory at a time (default 32)")
    parser.add_argument("--device", type=device, default="auto", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    return parser.parse_args(arguments)


def device(text: str) -> torch.device:
    """A torch device that this machine has."""
    if text == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error


def check_output(output: Path | None) -> None:
    """Raise what would keep `output` from being written, before any work is done."""
    if output is None:
        return
    if output.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--output {output}: the suffix must be .csv or .jsonl")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: there is no folder {output.parent}")
    if output.is_dir():
        raise IsADirectoryError(f"--output {output} is a folder")


def read_all(paths: list[Path]) -> Iterator[tuple[Path, Image | UnreadableImage]]:
    """Every file with its image, or with the reason there is none."""
    for path in paths:
        try:
            yield path, read_image(path)
        except UnreadableImage as error:
            yield path, error


def table(batch: list[Prediction], labels_width: int, heading: bool) -> Table:
    """One batch of rows; widths do not depend on the rows, so that batches line up."""
    rows = Table(box=None, expand=True, show_header=heading)
    rows.add_column("file", ratio=3, overflow="fold")
    rows.add_column("label", width=labels_width, overflow="fold")
    rows.add_column("probability", width=11, justify="right")
    rows.add_column("runners-up", ratio=2, overflow="fold")
    for path, guesses, error in batch:
        if error is not None:
            rows.add_row(Text(shown(path)), Text("unreadable", style="red"), "", Text(error))
            continue
        first, *others = guesses
        runners_up = ", ".join(f"{label} {probability:.4f}" for label, probability in others)
        rows.add_row(Text(shown(path)), Text(first.label), f"{first.probability:.4f}", Text(runners_up))
    return rows


class CsvWriter:
    """Rows file, label, probability, label_2, probability_2, ..., error."""

    def __init__(self, file: IO[str], topk: int) -> None:
        self.topk, self.rows = topk, csv.writer(file)
        numbers = ["", *(f"_{k}" for k in range(2, topk + 1))]
        self.rows.writerow(["file", *(f"{name}{number}" for number in numbers for name in ("label", "probability")), "error"])

    def __call__(self, prediction: Prediction) -> None:
        """Write one row."""
        cells = [cell for label, probability in prediction.guesses for cell in (label, f"{probability:.6f}")]
        padding = [""] * (2 * self.topk - len(cells))
        self.rows.writerow([shown(prediction.path), *cells, *padding, prediction.error or ""])


class JsonLinesWriter:
    """Lines {"file": ..., "predictions": [{"label": ..., "probability": ...}, ...], "error": ...}."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def __call__(self, prediction: Prediction) -> None:
        """Write one line."""
        guesses = [guess._asdict() for guess in prediction.guesses]
        print(json.dumps({"file": shown(prediction.path), "predictions": guesses, "error": prediction.error}), file=self.file)


def writer(file: IO[str], topk: int) -> CsvWriter | JsonLinesWriter:
    """The writer that the file's suffix asks for."""
    return CsvWriter(file, topk) if file.name.endswith(".csv") else JsonLinesWriter(file)
