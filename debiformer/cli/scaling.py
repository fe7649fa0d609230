"""Command predict on a Ray cluster: folders, shards and tables of images to a folder of Parquet files, begun again wherever it stopped."""

import argparse
import signal
import sys
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..scale.cluster import arrange, cluster, machines, predict_parts
from ..scale.findings import Boxes, Finder, Labels, Masks, schema_of, weights_digest
from ..scale.sources import find_parts
from ..scale.storage import Output
from ..scale.workers import Report, Setting
from ..tasks.detection import DetectionTask
from ..tasks.prediction import load_classifier, load_task
from ..tasks.segmentation import SegmentationTask
from .arguments import at_least_one
from .detecting import add_min_score
from .segmenting import add_inference, inference_from

EVERY = 60  # seconds between two lines about progress where there is no screen to draw a bar on


def run(kind: str, arguments: list[str]) -> int:
    """Predict what is not yet predicted; 1 if not one image could be read, 128 and the signal's number if stopped, else 0.

    Raises:
        FileNotFoundError: If the checkpoint or a source is missing, or a part's file is, at the end.
        ImportError: If the driver of a URL is not installed.
        OSError: If something cannot be read or written.
        RuntimeError: If workers die.
        ValueError: If an argument, the checkpoint, a source or what the output folder holds will not do.
    """
    options = parse(kind, arguments)
    finder, how = finder_of(kind, options)
    parts = find_parts(options.images, options.part_size, options.column)
    about = dict(task=kind, weights=weights_digest(finder.task))
    listed = sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()
    output = Output(options.output)
    output.begin({**about, **how, "part_size": options.part_size, "column": options.column, "parts": len(parts), "digest_of_files": listed})
    output.clear()
    done = output.finished()
    todo = [part for part in parts if part.number not in done]
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"{len(parts)} parts, {len(done)} of them finished before{'' if todo else ': nothing is left to do'}", highlight=False)
    if not todo:
        return 0
    schema = schema_of(finder, {**about, "checkpoint": options.checkpoint})
    with cluster(options.address):
        workers = arrange(machines(), options.device, options.actors)
        workers = workers._replace(number=min(workers.number, len(todo)))
        device = "cuda" if workers.gpu else "cpu"
        batch = getattr(options, "batch_size", None)
        setting = Setting(finder, schema, output.address, options.column, device, workers.cpus, workers.memory, batch)
        console.print(f"{workers.number} workers on {device}, {workers.cpus} CPUs each", highlight=False)
        previous = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            images, errors = follow(predict_parts(todo, setting, workers), len(parts), len(done), console)
        except Stopped as stopped:
            finished = f"{len(output.finished())} of {len(parts)} parts"
            console.print(f"stopped, with {finished} finished: the same command goes on", highlight=False)
            return 128 + stopped.signum
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
    output.clear()
    lost = {part.number for part in parts} - output.finished()
    if lost:
        raise FileNotFoundError(f"{len(lost)} parts are not in {options.output}, such as {min(lost)}: put it where all machines see it")
    again = ", beside those of finished parts" if done else ""
    print(f"{images} images, {errors} with errors, written to {options.output}{again}", file=sys.stderr)
    return 0 if done or images > errors else 1


def parse(kind: str, arguments: list[str]) -> argparse.Namespace:
    """The options for a task's checkpoint."""
    parser = argparse.ArgumentParser(prog="debiformer predict --engine ray", description=f"Predict on a Ray cluster, by {kind}.")
    told = (
        "images, tar shards, Parquet files, folders of them or patterns such as 'photos/**/*.jpg'; paths or URLs such as s3://bucket/folder"
    )
    parser.add_argument("images", nargs="+", metavar="SOURCE", help=told)
    parser.add_argument("--checkpoint", required=True, help="of a run; for labels also a shared folder or hf-hub:OWNER/NAME")
    parser.add_argument("--output", required=True, help="folder for Parquet files, a path or a URL; what is there is not done again")
    parser.add_argument("--column", default="image", help="of Parquet files that holds the images (default image)")
    parser.add_argument("--part-size", default=1024, type=at_least_one, help="images of an output file (default 1024); shards stay whole")
    parser.add_argument("--actors", type=at_least_one, help="workers (default: one on each GPU, or on each CPU)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: GPUs if the cluster has some")
    parser.add_argument("--address", help="of a Ray cluster to join: HOST:PORT, or auto (default: one is begun on this machine)")
    if kind == "classification":
        parser.add_argument("--topk", default=3, type=at_least_one, help="labels per image, the likeliest first (default 3)")
        parser.add_argument("--embeddings", action="store_true", help="also write the features that the classifier is given")
        parser.add_argument("--batch-size", type=at_least_one, help="images per pass (default: what fits into the memory)")
    elif kind == "segmentation":
        add_inference(parser)
    else:
        add_min_score(parser)
    options = parser.parse_args(arguments)
    if options.output.endswith((".csv", ".jsonl", ".json", ".parquet")):
        parser.error(f"--output {options.output}: a folder of Parquet files is written, name one")
    return options


def finder_of(kind: str, options: argparse.Namespace) -> tuple[Finder, dict[str, Any]]:
    """What finds, and the settings that its findings depend on."""
    if kind == "classification":
        how: dict[str, Any] = dict(topk=options.topk, embeddings=options.embeddings)
        return Labels(load_classifier(options.checkpoint), **how), how
    checkpoint = Path(options.checkpoint)
    if kind == "detection":
        return Boxes(load_task(DetectionTask, checkpoint), options.min_score), dict(min_score=options.min_score)
    task = load_task(SegmentationTask, checkpoint)
    task.inference = inference_from(options, task.inference)
    return Masks(task), dict(inference=repr(task.inference))


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; no Exception, lest a library takes it for its own."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def stop(signum: int, frame: Any) -> None:
    """Raise Stopped where the program is."""
    raise Stopped(signum)


def follow(reports: Iterable[Report], parts: int, done: int, console: Console) -> tuple[int, int]:
    """Show how far the run is, as a bar or as a line every minute; images and errors at the end."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("parts  {task.fields[told]}"), TimeElapsedColumn(), TimeRemainingColumn())
    images = errors = 0
    began = shown = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=parts, completed=done, told="")
        for count, report in enumerate(reports, 1):
            if count == 1:
                console.print(f"batches of {report.batch}", highlight=False)
            images, errors = images + report.images, errors + report.errors
            now = time.monotonic()
            told = f"{images} images, {images / (now - began):.1f}/s, {errors} errors"
            progress.update(bar, completed=done + count, told=told)
            if not console.is_terminal and now - shown > EVERY:
                left = (parts - done - count) * (now - began) / count
                console.print(f"{done + count} of {parts} parts, {told}, {left / 60:.0f} minutes left", highlight=False)
                shown = now
    return images, errors
