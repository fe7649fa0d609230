"""Pictures one after the other, however many there are: found, read, shown on a progress bar, and written under their names."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL.Image import Image
from rich.console import Console
from rich.progress import track

from ..data.images import UnreadableImage, find_images, read_image, shown
from .labelling import device


def parser_for(task: str) -> argparse.ArgumentParser:
    """The options that dense tasks have in common."""
    parser = argparse.ArgumentParser(
        prog="debiformer predict", description=f"With a checkpoint of {task}.", epilog="On a Ray cluster: --engine ray --help."
    )
    parser.add_argument("images", nargs="+", help="image files, or folders that are searched")
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.ckpt or last.ckpt of a run")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--draw", action="store_true", help="also write pictures that show it")
    parser.add_argument("--device", type=device, default="auto", help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    return parser


def find(given: list[str]) -> dict[Path, Path]:
    """The images among files and folders, each with the name of its output: its path below the folder that was given, without its ending.

    Raises:
        FileNotFoundError: If a path does not exist, or nothing is found.
        ValueError: If two images would have the same name.
    """
    names: dict[Path, Path] = {}
    for path in map(Path, given):
        for file in find_images([path]):
            names[file] = (file.relative_to(path) if path.is_dir() else Path(file.name)).with_suffix("")
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        files = [str(file) for file, name in names.items() if name == twice[0]]
        raise ValueError(f"{' and '.join(files)} would have the same output, {twice[0]}: predict them apart")
    return names


def each(names: dict[Path, Path]) -> Iterator[tuple[Path, Path, Image]]:
    """Every file that can be read, with the name of its output and its image; the others are named on the screen as they come, and counted
    at the end.
    """
    console, failed = Console(file=sys.stderr), 0
    for file, name in track(names.items(), description="images", console=console, disable=not console.is_terminal):
        try:
            image = read_image(file)
        except UnreadableImage as error:
            failed += 1
            console.print(f"passed over {shown(file)}: {str(error).removeprefix(f'{file}: ')}", markup=False, highlight=False)
            continue
        yield file, name, image
    if failed:
        console.print(f"{failed} of {len(names)} files could not be read")


def write(picture: Image, folder: Path, name: Path, suffix: str) -> None:
    """Write a picture into a folder under a name without its ending, which may hold dots."""
    file = folder / name.with_name(name.name + suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)
