"""Models by address, hf-hub:OWNER/NAME or local-dir:FOLDER: repositories of the Hugging Face Hub and folders in timm's format."""

from pathlib import Path
from typing import Any, NamedTuple

from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from timm.models._input import get_model_args
from torch import nn

HUB, FOLDER = "hf-hub:", "local-dir:"


class Config(NamedTuple):
    """A config.json: timm's name of the model, arguments of its constructor, and timm's record of labels and preprocessing."""

    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def is_address(name: str) -> bool:
    """Whether a model is called by address rather than by name."""
    return name.startswith((HUB, FOLDER))


def address_of(source: str | Path) -> str | None:
    """The address of a model that `source` stands for, as an address or as a folder; None for anything else."""
    if is_address(str(source)):
        return str(source)
    return f"{FOLDER}{source}" if Path(source).is_dir() else None


def read_config(address: str) -> Config:
    """The config of the model at an address.

    Raises:
        FileNotFoundError: If the folder has no config.json.
        ValueError: If its config.json is none of timm's.
        OSError: If the Hub does not give it: no such repository, no access, no network.
    """
    if address.startswith(HUB):
        try:
            cfg, architecture, model_args = load_model_config_from_hf(address.removeprefix(HUB))
        except Exception as error:  # the Hub's client and its transport raise a dozen kinds
            raise OSError(f"model {address} cannot be read: {str(error).strip().partition(chr(10))[0]}") from error
        return Config(architecture, model_args, cfg)
    file = Path(address.removeprefix(FOLDER)) / "config.json"
    if not file.is_file():
        best = file.parent / "checkpoints" / "best.ckpt"
        remedy = f"did you mean {best}?" if best.is_file() else "give a folder that `debiformer share` or timm's save_for_hf wrote"
        raise FileNotFoundError(f"model {address}: there is no {file}; {remedy}")
    try:
        cfg, architecture, model_args = load_model_config_from_path(file.parent)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, no architecture, no dictionary
        raise ValueError(f"{file} is not the config of a timm model: {type(error).__name__} {error}") from error
    return Config(architecture, model_args, cfg)


def by_name(model: nn.Module, address: str, drop_path_rate: float | None) -> dict[str, Any]:
    """The arguments `model`, `model_args` and `drop_path_rate` of a task that builds the model of an address without it.

    Args:
        model: The model as it was built.
        address: Where it was built from.
        drop_path_rate: Stochastic depth that was asked for; None for that of the address.
    """
    config = read_config(address)
    args = get_model_args(model)
    del args["num_classes"]  # the task knows
    rate = config.model_args.get("drop_path_rate") if drop_path_rate is None else drop_path_rate
    return dict(model=config.architecture, model_args=args, drop_path_rate=rate)
