"""Command convert: a published checkpoint, in its own names, to a file in ours."""

import argparse
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor

from ..models import ROUTED
from ..models.checkpoints import compare, list_problems, read_checkpoint, to_our_names


def run(arguments: list[str]) -> int:
    """Convert a file; the preset and the heads that it fits are found by names and shapes.

    Raises:
        FileNotFoundError: If the file or the output's folder does not exist.
        ValueError: If the file is no checkpoint, fits no preset or no head, or has classes without known names; what does not fit is
            listed.
    """
    parser = argparse.ArgumentParser(prog="debiformer convert", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a .pth, .pt or .ckpt file of the DeBiFormer or BiFormer release")
    parser.add_argument("output", type=Path, help="the .safetensors file to write, of the backbone; or a .ckpt, of all that validate needs")
    parser.add_argument(
        "--classes",
        help="for a .ckpt: a CSV file with the column name, or name,red,green,blue (default: told by their number)",
    )
    options = parser.parse_args(arguments)
    if options.output.suffix not in (".safetensors", ".ckpt"):
        raise ValueError(f"output {options.output} must end in .safetensors or .ckpt")
    if not options.output.parent.is_dir():
        raise FileNotFoundError(f"output {options.output}: there is no folder {options.output.parent}")
    if options.output.suffix == ".ckpt" and find_spec("lightning") is None:
        raise ImportError('a .ckpt is of a training run, which takes Lightning: pip install "debiformer[train]"')
    published = read_checkpoint(options.checkpoint)
    tensors = to_our_names(published)
    preset, kind = identify(tensors)
    if options.output.suffix == ".ckpt":
        from .published import whole_task, write_task

        task = whole_task(published, preset, options.classes)
        write_task(task, options.output)
        print(f"{options.output}: {task.kind} with {preset}, {len(task.hparams['class_names'])} classes")
        return 0
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(contiguous, options.output, metadata={"format": "pt", "architecture": preset})
    print(f"{options.output}: {preset}, {kind}, {len(tensors)} tensors")
    return 0


def identify(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """The preset that tensors in our names belong to, and what they are: a classifier, or a dense backbone.

    Raises:
        ValueError: If they fit no preset; the misfits with the nearest one are listed.
    """
    classes = len(tensors["head.fc.weight"]) if "head.fc.weight" in tensors else 0
    dense = any(name.startswith("feature_norms.") for name in tensors)
    misfits = {}
    for preset in ROUTED:  # the others are not published, and some fit the same tensors
        with torch.device("meta"):
            model = timm.create_model(preset, num_classes=classes, feature_norms=dense, in_chans=_channels(tensors))
        misfits[preset], _ = compare(tensors, model)
        if not any(misfits[preset].values()):
            return preset, f"a classifier of {classes} classes" if classes else "a backbone without classifier"
    nearest = min(misfits, key=lambda preset: sum(map(len, misfits[preset].values())))
    raise ValueError(
        f"these weights fit none of {', '.join(ROUTED)}; misfits with the nearest, {nearest}:{list_problems(misfits[nearest])}"
    )


def _channels(tensors: Mapping[str, Tensor]) -> int:
    return tensors["stem.0.weight"].shape[1] if "stem.0.weight" in tensors else 3
