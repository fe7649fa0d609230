"""Command app: the explorer, a page in the browser that shows where models look."""

import argparse
import os
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from ..app.explorer import Explorer
from ..app.seeing import Model, load_model, untrained
from ..models.swin_layout import MIXERS
from .labelling import device
from .quickstart import RUNS

ADDRESS = "127.0.0.1"  # what it serves is for this machine's own users


def run(arguments: list[str]) -> int:
    """Serve the explorer until it is interrupted.

    Raises:
        FileNotFoundError: If a checkpoint is missing.
        ValueError: If a checkpoint will not do.
        OSError: If the port is taken.
    """
    options = parse(arguments)
    check_port(options.port)
    checkpoints = options.checkpoints or latest_runs()
    explorer = Explorer(sources(checkpoints, options.device))
    for name in [*explorer.sources][: max(len(options.checkpoints), 1)]:
        explorer.model(name)  # what is wrong with it is said here, not on the page
    if not checkpoints:
        print(f"There is no checkpoint in {RUNS}: only untrained models are shown. `debiformer quickstart` trains one in two minutes.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from ..app.page import Page, launch

    page = Page(explorer)
    print(f"The explorer is at {launch(page, ADDRESS, options.port, inbrowser=options.browser)} until you press Ctrl-C.", flush=True)
    page.blocks.block_thread()
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of app."""
    parser = argparse.ArgumentParser(prog="debiformer app", description="Explore in a browser where models look in pictures.")
    parser.add_argument(
        "checkpoints",
        nargs="*",
        help=f"best.ckpt of a run, a shared folder, or hf-hub:OWNER/NAME (default: the runs in {RUNS})",
    )
    parser.add_argument("--port", type=int, default=7860, help=f"of {ADDRESS} (default 7860)")
    parser.add_argument("--browser", action="store_true", help="open the page in a browser")
    parser.add_argument("--device", type=device, default="auto", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    return parser.parse_args(arguments)


def check_port(port: int) -> None:
    """Raise an OSError unless the port can be served at."""
    try:
        with socket.create_server((ADDRESS, port)):
            pass
    except (OSError, OverflowError) as error:
        raise OSError(f"--port {port} of {ADDRESS} cannot be used: {error}; give another") from error


def latest_runs() -> list[str]:
    """The best checkpoints of runs started here, the newest first."""
    found = RUNS.glob("*/checkpoints/best.ckpt")
    return [str(file) for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)]


def sources(checkpoints: list[str], where: torch.device) -> Mapping[str, partial[Model]]:
    """What loads each model, by the name that is shown: the checkpoints, then every mechanism untrained."""
    mixers = [mixer for mixer in MIXERS if mixer != "bi_level_routing_nchw"]  # which differs from another in its last stage alone
    trained = {name_of(source): partial(load_model, source, where) for source in checkpoints}
    return trained | {f"untrained: {mixer.replace('_', ' ')}": partial(untrained, mixer) for mixer in mixers}


def name_of(source: str) -> str:
    """What a checkpoint is called: its path, but for what the path of every run ends with."""
    path = Path(source)
    return str(path.parent.parent) if path.name == "best.ckpt" and path.parent.name == "checkpoints" else source
