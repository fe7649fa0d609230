"""Command app: the explorer, a page in the browser that shows where models look."""

import argparse
import os
import signal
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..app.explorer import Explorer, bundled
from ..app.seeing import Model, load_model, untrained
from ..models.swin_layout import MIXERS
from .labelling import device
from .quickstart import RUNS

UNTRAINED = "untrained: "
ADDRESS = "127.0.0.1"  # what it serves is for this machine's own users


def run(arguments: list[str]) -> int:
    """Serve the explorer until it is interrupted.

    Raises:
        FileNotFoundError: If a checkpoint is missing.
        ValueError: If a checkpoint will not do.
        OSError: If the port is taken.
    """
    options = parse(arguments)
    port = free_port(options.port)
    given = [*options.checkpoints]
    explorer = Explorer(sources(given or latest_runs(), options.device))
    if given:
        for name in [*explorer.sources][: len(given)]:
            explorer.view(name, str(bundled()[0]))  # what is wrong with it is said here, not on the page
    else:
        leave_out(explorer)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server ends, and what was uploaded goes
    with TemporaryDirectory() as uploads:
        local = "localhost,127.0.0.1"  # gradio asks itself whether it is there, which is no proxy's business
        no_proxy = ",".join(filter(None, [os.environ.get("no_proxy"), local]))
        # Read when gradio is imported.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads, "no_proxy": no_proxy, "NO_PROXY": no_proxy}
        from ..app.page import Page, launch

        page = Page(explorer)
        print(f"The explorer is at {launch(page, ADDRESS, port, inbrowser=options.browser)} until you press Ctrl-C.", flush=True)
        page.blocks.block_thread()
    return 0


def leave_out(explorer: Explorer) -> None:
    """Tell of runs that cannot be explored, the newest first, up to one that can."""
    for name in [*explorer.sources]:
        if name.startswith(UNTRAINED):
            print(f"There is no checkpoint in {RUNS}: only untrained models are shown. `debiformer quickstart` trains one in two minutes.")
            return
        try:
            explorer.view(name, str(bundled()[0]))
        except ValueError as error:
            print(f"left out {name}: {error}")
            del explorer.sources[name]
        else:
            return


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


def free_port(port: int) -> int:
    """The port, or any where it is 0; raises an OSError unless it can be served at."""
    try:
        with socket.create_server((ADDRESS, port)) as server:
            return server.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise OSError(f"--port {port} of {ADDRESS} cannot be used: {error}; give another") from error


def latest_runs() -> list[str]:
    """The best checkpoints of runs started here, the newest first."""
    found = RUNS.glob("*/checkpoints/best.ckpt")
    return [str(file) for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)]


def sources(checkpoints: list[str], where: torch.device) -> Mapping[str, partial[Model]]:
    """What loads each model, by the name that is shown: the checkpoints, then every mechanism untrained."""
    mixers = [mixer for mixer in MIXERS if mixer != "bi_level_routing_nchw"]  # which differs from another in its last stage alone
    found: dict[str, partial[Model]] = {}
    for source in checkpoints:
        name = name_of(source)
        found[source if name in found else name] = partial(load_model, source, where)
    return found | {f"{UNTRAINED}{mixer.replace('_', ' ')}": partial(untrained, mixer) for mixer in mixers}


def name_of(source: str) -> str:
    """What a checkpoint is called: its path, but for what the path of every run ends with."""
    path = Path(source)
    if path.name != "best.ckpt" or path.parent.name != "checkpoints":
        return source
    return str(path.parent.parent) if path.parent.parent.name else path.absolute().parent.parent.name
