"""The command line. Commands import what they need when they run."""

import argparse
import os
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .. import __version__
from ..nearest import did_you_mean

PACKAGE = Path(__file__).parents[1]
EXTRAS = {
    "train": ("lightning", "jsonargparse", "torchmetrics", "tensorboard", "rich", "faster_coco_eval"),
    "explain": ("matplotlib", "pytorch_grad_cam"),
    "app": ("gradio",),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
    "scale": ("ray", "pyarrow", "fsspec"),
}


class Command(NamedTuple):
    """A command: its line in --help, where its function is (module:name; takes arguments, returns the exit code), the extras it needs."""

    summary: str
    function: str
    extras: tuple[str, ...] = ()


COMMANDS = {
    "quickstart": Command(
        "train, test and explain a small model on bundled images, in about two minutes", "quickstart:run", ("train", "explain")
    ),
    "fit": Command("train a model with a recipe: --config image_folder --data.root DIR", "training:fit", ("train",)),
    "validate": Command("evaluate a checkpoint on the validation images", "training:validate", ("train",)),
    "test": Command("evaluate a checkpoint on the test images", "training:test", ("train",)),
    "predict": Command("labels, masks or boxes for images, with a checkpoint", "prediction:run", ("train",)),
    "explain": Command("show where a checkpoint looks in an image: --checkpoint CKPT IMAGE", "explaining:run", ("train", "explain")),
    "app": Command("explore in a browser where checkpoints look: [CKPT ...]", "exploring:run", ("train", "explain", "app")),
    "export": Command("a checkpoint as a file that runs without this library: CKPT --format onnx", "exporting:run", ("train",)),
    "serve": Command("a classifier behind HTTP, with batches, limits and metrics: CKPT --port 8000", "serving:run", ("train", "serve")),
    "average": Command("average the weights of checkpoints: CKPT CKPT... --output FILE.ckpt", "average:run", ("train",)),
    "share": Command("a checkpoint as a folder for timm and the Hugging Face Hub: CKPT FOLDER", "share:run", ("train",)),
    "models": Command("list the presets with their parameters and MACs", "models:run"),
    "tables": Command("the papers' numbers, ours beside them, and how each was obtained: [N]", "tables:run"),
    "bench": Command("compare the speed of timm models side by side: MODEL...", "bench:run"),
    "convert": Command("translate a published checkpoint: IN.pth OUT.safetensors", "convert:run"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="debiformer",
        description="Vision backbones with bi-level routing attention.",
        usage="debiformer COMMAND ...",
        epilog="commands:\n" + "\n".join(f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"debiformer {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below; COMMAND --help tells more")
    name = parser.parse_args(arguments[:1]).command
    if name not in COMMANDS:
        parser.error(f"no command {name!r}: {did_you_mean(name, COMMANDS)}")
    command = COMMANDS[name]
    missing = lacking(name, command.extras)
    if missing:
        parser.error(missing)
    module, function = command.function.split(":")
    try:
        return getattr(import_module(f".{module}", __name__), function)(arguments[1:])
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain of what is left to write
        return 1
    except Exception as error:
        ours = written_by_us(error)
        if ours is None:
            raise
        print(f"debiformer {name}: error: {ours}", file=sys.stderr)
        return 2


def lacking(name: str, extras: tuple[str, ...]) -> str:
    """What to install before a command can run; nothing if all is there."""
    missing = [module for extra in extras for module in EXTRAS[extra] if find_spec(module) is None]
    return f'debiformer {name} needs {", ".join(missing)}: pip install "debiformer[{",".join(extras)}]"' if missing else ""


def written_by_us(error: BaseException | None) -> BaseException | None:
    """The error itself, or what caused it, if this package raised it for the user to read: a traceback would bury it."""
    while error is not None:
        head, _, said = str(error).rpartition(f"\n{type(error).__name__}: ")
        if "in DataLoader worker process" in head and str(PACKAGE) in head.rpartition("  File ")[2]:  # which hands on its traceback as text
            return type(error)(said.strip())
        frames = traceback.extract_tb(error.__traceback__)  # none of a cause that was never raised itself
        ours = bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)
        if ours and isinstance(error, ValueError | OSError | RuntimeError | ImportError | FloatingPointError):
            return error
        error = error.__cause__
    return None
