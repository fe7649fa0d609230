"""Weights files of any timm model."""

import sys

from torch import nn

from .checkpoints import checkpoint_filter_fn, read_checkpoint
from .pyramid import Pyramid


def load_weights(model: nn.Module, path: str) -> None:
    """Load a published checkpoint, leaving only a classifier of another width as it was initialised.

    Raises:
        FileNotFoundError: If there is no file at `path`.
        ValueError: If the file is no checkpoint, lacks weights of the model, or brings others.
    """
    weights = read_checkpoint(path)
    if all(name.startswith("model.") for name in weights):  # of a run of ours
        weights = {name.removeprefix("model."): value for name, value in weights.items()}
    from_published_names = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # where timm's models keep it
    classifier = model.pretrained_cfg["classifier"]  # type: ignore[index]  # a name, or a tuple of them
    prefixes = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    try:
        if isinstance(model, Pyramid):
            weights = checkpoint_filter_fn(weights, model)
        elif from_published_names is not None:
            weights = from_published_names(weights, model)
        for key, value in model.state_dict().items():
            if key.startswith(prefixes) and (key not in weights or weights[key].shape != value.shape):
                weights[key] = value
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as mismatch:  # timm's filters stumble over foreign names
        raise ValueError(f"pretrained={path!r} does not fit {type(model).__name__}: {mismatch}") from mismatch
