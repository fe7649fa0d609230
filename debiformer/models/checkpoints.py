"""Published checkpoints: their key names to ours, and what does not fit, by name."""

import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import safetensors.torch
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

# Where the published files are; `missing_weights` names them.
PUBLISHED = {
    "debiformer": (
        "the file {name} of the DeBiFormer release (https://github.com/maclong01/DeBiFormer, on Google Drive)",
        {"debiformer_tiny": "debi_tiny", "debiformer_small": "debi_small", "debiformer_base": "debi_base"},
    ),
    "biformer": (
        "the file {name} of the BiFormer release (https://github.com/rayleizhu/BiFormer, on OneDrive; its links fail since early 2026)",
        {n: f"{n}_in1k" for n in ("biformer_tiny", "biformer_small", "biformer_base", "biformer_stl", "biformer_stl_nchw")},
    ),
}


def missing_weights(name: str) -> str:
    """What to tell a user who asks for pretrained weights of a preset that has none configured."""
    for where, files in PUBLISHED.values():
        if name in files:
            meant = f"The published weights are {where.format(name=files[name])}."
            break
    else:
        meant = "It is a preset of this library that has no published weights."
    return (
        f"no pretrained weights are configured for {name}: no Hub id, URL or file. {meant} Load a local copy with"
        f" debiformer.load_published(path, model), or timm.create_model({name!r}, pretrained=True, pretrained_cfg_overlay=dict(file=path))."
    )


class Inert:
    """Stands in for every object of a checkpoint that is not part of a tensor; takes whatever it is given, and does nothing with it."""

    dump_patches = False  # torch's old format asks this of pickled modules

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return object.__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        return self

    def ignore(self, *args: Any) -> None:
        """Take and forget."""

    append = extend = add = update = __setitem__ = __setstate__ = ignore


class TensorUnpickler(pickle.Unpickler):
    """Brings tensors and ordered dictionaries to life, and nothing else: names in the file are never looked up beyond this list."""

    alive = frozenset(
        {
            "collections.OrderedDict",
            "torch.Size",
            "torch._utils._rebuild_parameter",
            "torch._utils._rebuild_tensor",
            "torch._utils._rebuild_tensor_v2",
            "torch._utils._rebuild_tensor_v3",
            "torch.storage.UntypedStorage",
            *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
            *(f"torch.{name}Storage" for name in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if f"{module}.{name}" in self.alive else Inert


_tensor_pickle: Any = ModuleType("tensor_pickle")  # what torch.load asks of a pickle module
_tensor_pickle.Unpickler = TensorUnpickler
_tensor_pickle.load = lambda file, **options: TensorUnpickler(file, **options).load()


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file by name: .safetensors, or what torch.save wrote, in its old format too.

    Published files also hold training arguments and optimizer states. Their objects become inert stand-ins, whatever they are: no code of
    the file runs, and nothing that it names is imported.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint, is damaged, or holds no tensors under "model", "state_dict" or at the top.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # there are other objects in it; torch refuses TorchScript archives with another error
            checkpoint = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_tensor_pickle)
    except Exception as error:  # the bytes of a damaged file can mean anything
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is not a readable checkpoint ({reason}); if it was downloaded, compare its size with the original"
        ) from error
    return find_tensors(checkpoint, str(path))


def find_tensors(checkpoint: Any, source: str = "the state dict") -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: under "model" or "state_dict", or at the top.

    Raises:
        ValueError: If there are none.
    """
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    tensors = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)} if isinstance(checkpoint, Mapping) else {}
    if not tensors:
        found = f"keys {sorted(map(str, checkpoint))[:8]}" if isinstance(checkpoint, Mapping) else f"a {type(checkpoint).__name__}"
        raise ValueError(f"{source} holds no tensors under 'model', 'state_dict' or at the top; found {found}")
    return tensors


_OUTSIDE = (
    (r"^downsample_layers\.0\.", r"stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^extra_norms\.(\d+)\.(?:ln\.)?", r"feature_norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
# One published DeBiFormer block is two of ours, BRA or DBRA first, then DBRA: which of the two, and what it is called there.
_PAIRED = {
    "pos_embed1": (0, "position"),
    "norm1": (0, "norm1"),
    "attn1": (0, "mixer"),
    "norm2": (0, "norm2"),
    "mlp1": (0, "mlp"),
    "pos_embed2": (1, "position"),
    "norm3": (1, "norm1"),
    "attn2": (1, "mixer"),
    "norm4": (1, "norm2"),
    "mlp2": (1, "mlp"),
}
_SINGLE = {"pos_embed": "position", "attn": "mixer"}  # BiFormer: block for block
_INSIDE = {
    "mixer": {
        "qkv.qkv": "qkv",
        "qkv_conv.qkv": "qkv",
        "qkv_linear": "qkv",
        "lepe": "local_context",
        "lepe1": "local_context",
        "wo": "proj",
        "proj_out": "proj",
        "output_linear": "proj",
        "rpe_table": "bias_table",
        "proj_q": "agent_query",
        "proj_k": "agent_key",
        "proj_v": "agent_value",
        "unifyheads1": "agent_proj",
        "norm2": "agent_norm1",
        "norm": "agent_norm2",
        "mlp.linear1.0": "agent_mlp.fc1",
        "mlp.dwc": "agent_mlp.depthwise",
        "mlp.linear2.0": "agent_mlp.fc2",
        "conv_offset_q.0": "offset_network.depthwise",
        "conv_offset_q.1.norm": "offset_network.norm",
        "conv_offset_q.3": "offset_network.project",
    },
    "mlp": {"linear1.0": "fc1", "dwc": "depthwise", "linear2.0": "fc2", "0": "fc1", "2": "fc2", "3": "fc2"},
}


# What goes by the same name in both published forms of BiFormer-STL convolves the values in the second.
_SECOND_FORM = {"lepe": "value_context"}


def our_name(key: str, paired: bool, second_form: bool = False) -> str:
    """Our name of a published parameter or buffer; names that are ours already stay.

    Args:
        key: A name as the published DeBiFormer, BiFormer or BiFormer-STL has it.
        paired: Whether the published blocks hold two mixers each, as DeBiFormer's do.
        second_form: Whether they are those of the BiFormer-STL that works on NCHW maps.
    """
    for pattern, replacement in _OUTSIDE:
        key = re.sub(pattern, replacement, key)
    if not (match := re.fullmatch(r"stages\.(\d+)\.(?:blocks\.)?(\d+)\.(\w+)\.(.+)", key)):
        return key
    stage, block, part, rest = match[1], int(match[2]), match[3], match[4]
    second, ours = _PAIRED.get(part, (0, part)) if paired else (0, _SINGLE.get(part, part))
    block = 2 * block + second if paired else block
    names = _INSIDE.get(ours, {}) | (_SECOND_FORM if second_form and stage == "3" else {})
    path, dot, leaf = rest.rpartition(".")
    return f"stages.{stage}.blocks.{block}.{ours}." + names.get(rest, names.get(path, path) + dot + leaf)


def to_our_names(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Published checkpoint, in any of its wrappings, to a state dict in our names.

    Of a segmentation or detection checkpoint only the backbone is taken, of one that this library trained only the model.
    """
    given = find_tensors(checkpoint)
    if inside := backbone_inside(given):
        _logger.info("took the backbone, and left the heads")
        return inside
    tensors = {re.sub(r"^(?:module\.|model\.|_orig_mod\.)+", "", key): value for key, value in given.items()}
    if any(key.startswith("backbone.") for key in tensors):
        others = sorted({key.split(".")[0] for key in tensors if not key.startswith("backbone.")})
        if others:
            _logger.info("took the backbone, and left %s", ", ".join(others))
        tensors = {key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")}
    paired = any(".attn2." in key for key in tensors)
    second_form = any(".attn.qkv_linear." in key for key in tensors)
    # Published 1x1 convolutions are linear layers here.
    return {our_name(key, paired, second_form): v.flatten(1) if v.ndim == 4 and v.shape[2:] == (1, 1) else v for key, v in tensors.items()}


def backbone_inside(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The timm model inside a checkpoint of this library's segmenters and detectors, by its own names; empty where there is none."""
    marker = ".maps.model."
    return {key.partition(marker)[2]: value for key, value in tensors.items() if marker in key}


@runtime_checkable
class WithHeads(Protocol):
    """A model for dense tasks, which knows how the published names of its heads map to its own."""

    backbone_prefix: str  # of the names of the timm model inside

    def from_published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that are not the backbone's, in our names; those that have none keep theirs."""
        ...


@dataclass(frozen=True)
class LoadReport:
    """What a load did beyond filling every parameter: names left in the file, and names that keep their initial values."""

    left_behind: list[str] = field(default_factory=list)
    at_start: list[str] = field(default_factory=list)


def load_published(source: str | Path | Mapping[str, Any], model: nn.Module) -> LoadReport:
    """Load a published DeBiFormer or BiFormer checkpoint, or one in our own names, into a model; with its head into a dense one.

    Args:
        source: A file (.pth, .pt, .ckpt, .safetensors), or its content: a state dict, bare or under "model" or "state_dict", with
            or without `backbone.` prefixes.
        model: A preset of this library, its `features_only` form, or a `Segmenter` or `Detector` on one.

    Returns:
        What was left out. That is nothing, but for a model without a classifier: the head of a classification checkpoint, and its final
        norm where the model has none, are left behind, and feature norms keep their initial values; so are left behind the stages, and the
        feature norms, that `features_only` with fewer `out_indices` has dropped.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or anything else is missing, unexpected or mis-shaped; every name is listed, and nothing loaded.
    """
    while (wrapped := getattr(model, "_orig_mod", getattr(model, "module", None))) is not None:  # torch.compile, distributed training
        model = wrapped
    tensors = find_tensors(source) if isinstance(source, Mapping) else read_checkpoint(source)
    origin = "the state dict" if isinstance(source, Mapping) else str(source)
    heads: dict[str, Tensor] = {}
    backbone = model.model if isinstance(model, FeatureGetterNet) else model
    if isinstance(model, WithHeads):
        prefix = model.backbone_prefix
        if backbone_inside(tensors):
            return _load_own(tensors, model, prefix, origin)
        heads, backbone = model.from_published(tensors), model.get_submodule(prefix.removesuffix("."))
        problems = differences(heads, {name: value for name, value in model.state_dict().items() if not name.startswith(prefix)})
        if any(problems.values()):
            raise ValueError(f"the heads of {origin} do not fit those of this {type(model).__name__}.{list_problems(problems)}")
    given = to_our_names(tensors)
    report = _check(given, backbone, origin)
    model.load_state_dict(heads, strict=False)
    backbone.load_state_dict({name: value for name, value in given.items() if name not in report.left_behind}, strict=False)
    return report


def _load_own(tensors: Mapping[str, Tensor], model: nn.Module, backbone_prefix: str, origin: str) -> LoadReport:
    """Load a whole segmenter or detector by its own names, or by those of the task around it."""
    plain = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): value for key, value in tensors.items()}
    around = "" if any(key.startswith(backbone_prefix) for key in plain) else "model."
    own = {key.removeprefix(around): value for key, value in plain.items()}
    problems = differences(own, model.state_dict())
    if any(problems.values()):
        raise ValueError(f"{origin} does not fit this {type(model).__name__}.{list_problems(problems)}")
    model.load_state_dict(own)
    return LoadReport()


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """What timm loads into a model: the checkpoint in our names, checked as `load_published` does but for what timm itself adapts.

    Raises:
        ValueError: If anything but the classifier or the image channels does not fit.
    """
    given = to_our_names(checkpoint)
    report = _check(given, model, "the pretrained checkpoint", adapted=("head.fc.weight", "head.fc.bias", "stem.0.weight"))
    own = model.state_dict()
    if "head.fc.weight" not in given and "head.fc.weight" in own:
        _logger.warning("the checkpoint has no classifier: that of the model is at its start")
        report.at_start.extend(("head.fc.weight", "head.fc.bias"))
    kept = {name: value for name, value in given.items() if name not in report.left_behind or name.startswith("head.")}
    return kept | {name: own[name] for name in report.at_start}


def compare(given: Mapping[str, Tensor], model: nn.Module, adapted: tuple[str, ...] = ()) -> tuple[dict[str, list[str]], LoadReport]:
    """How tensors in our names fit a model: what is missing, unexpected and mis-shaped, and what the one exception leaves out.

    Args:
        given: Tensors in our names.
        model: A backbone of this library.
        adapted: Names not to look at.
    """
    wanted = model.state_dict()
    headless = getattr(model, "num_classes", None) == 0
    left_behind: list[str] = []
    at_start: list[str] = []
    if headless:
        kept = {name.split(".")[1] for name in wanted if name.startswith("stages.")}
        dropped = {str(i) for i in range(len(getattr(model, "feature_info", ())))} - kept
        left_behind = [name for name in given if name.startswith(("stages.", "feature_norms.")) and name.split(".")[1] in dropped]
    if any(name.startswith("head.") for name in given) and not any(name.startswith("feature_norms.") for name in given):
        left_behind += [name for name in given if headless and name not in wanted and name.startswith(("head.", "norm."))]
        at_start = [name for name in wanted if (headless or adapted) and name.startswith("feature_norms.")]
    looked_at = {name: value for name, value in given.items() if name not in left_behind and name not in adapted}
    problems = differences(looked_at, {name: value for name, value in wanted.items() if name not in at_start and name not in adapted})
    return problems, LoadReport(left_behind, at_start)


def differences(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What is missing, unexpected and mis-shaped, by name."""
    return {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "mis-shaped": [
            f"{name} {tuple(given[name].shape)}, wanted {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in given and given[name].shape != value.shape
        ],
    }


def list_problems(problems: Mapping[str, list[str]]) -> str:
    """Every name, a line each, under its kind of problem."""
    return "".join(f"\n{len(names)} {kind}:\n  " + "\n  ".join(names) for kind, names in problems.items() if names)


def _check(given: Mapping[str, Tensor], model: nn.Module, origin: str, adapted: tuple[str, ...] = ()) -> LoadReport:
    """Raise unless everything fits; report what the one exception leaves out."""
    problems, report = compare(given, model, adapted)
    if any(problems.values()):
        remedy = "build the model as it was trained (preset, num_classes, feature_norms), and change it after loading (reset_classifier)"
        raise ValueError(f"{origin} does not fit this {type(model).__name__}: {remedy}.{list_problems(problems)}")
    if report.left_behind or report.at_start:
        left, start = (", ".join(names) or "nothing" for names in (report.left_behind, report.at_start))
        _logger.warning("left behind: %s; at their start: %s", left, start)
    return report
