"""A trained model as others can take it: a folder in timm's format with a model card, on disk and on the Hugging Face Hub."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from timm.models import save_for_hf

from .. import __version__
from ..models import PRESETS
from .addresses import FOLDER, HUB
from .checkpointing import versions
from .classification import ClassificationTask
from .evaluation import SPLITS, evaluation_folder
from .prediction import PREPROCESSING

TEMPLATE = Path(__file__).with_name("model_card.md")
ABSOLUTE_PATH = re.compile(r"(?:(?<=^)|(?<=[\s'\",=])|(?<=local-dir:)|(?<=file://))/(?:[^/\s'\",]*/)*(?=[^/])")
SCORES = {"top1": "acc", "top5": "acc_top5", "balanced_accuracy": "balanced_acc", "ece": "ece", "loss": "loss"}  # as training logs them
LATER_LABELS = {"real": "ReaL", "v2": "ImageNet-V2"}
PAPERS = {
    "biformer": """@inproceedings{zhu2023biformer,
  title = {{BiFormer}: Vision Transformer with Bi-Level Routing Attention},
  author = {Zhu, Lei and Wang, Xinjiang and Ke, Zhanghan and Zhang, Wayne and Lau, Rynson},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2023}
}""",
    "debiformer": """@inproceedings{long2024debiformer,
  title = {{DeBiFormer}: Vision Transformer with Deformable Agent Bi-level Routing Attention},
  author = {Long, Nguyen Huu Bao and Zhang, Chenyu and Shi, Yuzhi and Hirakawa, Tsubasa and Yamashita, Takayoshi
    and Matsui, Tohgoroh and Fujiyoshi, Hironobu},
  booktitle = {Asian Conference on Computer Vision (ACCV)},
  year = {2024}
}""",
}


class Metric(NamedTuple):
    """A number, such as val/acc, and what it was measured on."""

    name: str
    value: float
    measured: str


@dataclass(frozen=True)
class Facts:
    """What the card of a model says beside what the model itself tells.

    Args:
        run: Content of the checkpoint, as `read_run` gives it.
        recipe: Config of the run, without the paths of this machine.
        parameters: How many the model has.
        macs: Multiply-adds for one image of the model's input size.
        metrics: What was measured on this checkpoint.
        license: Identifier of the licence as the Hub knows it, such as apache-2.0 or cc-by-nc-4.0.
        notes: What else there is to say, in Markdown.
        repository: OWNER/NAME on the Hub, if the folder is to go there.
    """

    run: Mapping[str, Any]
    recipe: Mapping[str, Any]
    parameters: int
    macs: float
    metrics: Sequence[Metric] = ()
    license: str | None = None
    notes: str | None = None
    repository: str | None = None


def portable(config: Any) -> Any:
    """A config whose absolute paths are cut to their last part: they mean nothing elsewhere, and may tell what is nobody's business."""
    if isinstance(config, Mapping):
        return {name: portable(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [portable(value) for value in config]
    return ABSOLUTE_PATH.sub("", config) if isinstance(config, str) else config


def known_metrics(checkpoint: Path, run: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[list[Metric], list[Path]]:
    """What has been measured on a checkpoint, and the evaluations that are left out, being older than the file.

    That is the score for which the trainer kept it, and what `debiformer validate` and `test` wrote beside it.

    Args:
        checkpoint: The file.
        run: Its content.
        data: What the run was trained on: `class_path` and `init_args`.

    Raises:
        ValueError: If a metrics.json is none that those commands wrote.
    """
    found: dict[str, Metric] = {}
    outdated = []
    for kept in run.get("callbacks", {}).values():
        for path, score in (kept.get("best_k_models") or {}).items() if isinstance(kept, Mapping) else ():
            if Path(path).name == checkpoint.name:
                found[kept["monitor"]] = Metric(kept["monitor"], float(score), "during training")
    for file in sorted(evaluation_folder(checkpoint).glob("*/metrics.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if Path(record["checkpoint"]).name != checkpoint.name:
                continue
            if file.stat().st_mtime < checkpoint.stat().st_mtime:
                outdated.append(file)
                continue
            metrics = list(_evaluated(record, data))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not from debiformer validate or test ({type(error).__name__} {error}): remove it") from error
        found |= {metric.name: metric for metric in metrics}
    return sorted(found.values()), outdated


def _evaluated(record: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[Metric]:
    """The metrics in what `debiformer validate` or `test` wrote, and what was otherwise about the data than in training."""
    split, scores = SPLITS[record["command"]], record["scores"]
    of_run = portable(data.get("init_args") or {})
    changed = {name: value for name, value in portable(record["data"].get("init_args") or {}).items() if of_run.get(name) != value}
    settings = [f"{name}={changed[name]}" for name in changed if name not in ("batch_size", "num_workers")]
    for score, name in SCORES.items():
        if scores[score] is not None:
            yield Metric(f"{split}/{name}", float(scores[score]), ", ".join([f"{scores['images']} images", *settings]))
    for key, labels in LATER_LABELS.items():
        if key in record and record[key]["top1"] is not None:
            yield Metric(f"{labels}/acc", float(record[key]["top1"]), f"{record[key]['images']} images")


def save(task: ClassificationTask, folder: Path, facts: Facts) -> None:
    """Write a folder whole: model.safetensors and config.json as timm reads them, README.md and recipe.yaml.

    Args:
        task: A task as `load_classifier` gives it.
        folder: Where to write; it must not exist, or be empty.
        facts: What the card says.

    Raises:
        FileExistsError: If there is something in the folder.
        ValueError: If timm would not build the same model from it.
        OSError: If it cannot be written.
    """
    check_free(folder)
    unfinished = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # what a command that was killed left
        unfinished.mkdir(parents=True)
        _save_model(task, unfinished, facts)
        recipe = yaml.safe_dump(dict(facts.recipe), sort_keys=False, allow_unicode=True)
        (unfinished / "recipe.yaml").write_text(recipe, encoding="utf-8")
        model_card(task, folder.name, recipe, facts).save(unfinished / "README.md")
        unfinished.replace(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Raise a FileExistsError unless a folder can be made here."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and not empty: name another folder")


def _save_model(task: ClassificationTask, folder: Path, facts: Facts) -> None:
    hparams = task.hparams
    task.model.to(memory_format=torch.contiguous_format)  # safetensors knows no other
    rate = hparams["drop_path_rate"]
    save_for_hf(
        task.model,
        str(folder),
        # what timm records of the architecture says where it comes from, not where these weights do
        model_config=dict(label_names=list(hparams["class_names"]), pretrained_cfg=dict(tag=None, license=facts.license)),
        model_args=(hparams["model_args"] or {}) | ({} if rate is None else {"drop_path_rate": rate}),
        data_config={name: hparams[name] for name in PREPROCESSING} | {"crop_mode": "center"},
        safe_serialization=True,
    )
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # safetensors keeps it from other users
    here = task.model.state_dict()
    try:
        there = timm.create_model(f"{FOLDER}{folder}", pretrained=True).state_dict()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"timm does not build {hparams['model']} again from what it saved: {error}") from error
    differing = [name for name in {**here, **there} if name not in here or name not in there or not torch.equal(here[name], there[name])]
    if differing:
        raise ValueError(f"timm builds another {hparams['model']} from what it saved: {', '.join(differing[:5])} differ")


def model_card(task: ClassificationTask, name: str, recipe: str, facts: Facts) -> ModelCard:
    """The card of a model, as the Hub shows it.

    Args:
        task: The trained task.
        name: Name of the folder.
        recipe: Config of the run as YAML.
        facts: The rest.
    """
    hparams, run = task.hparams, facts.run
    ours = hparams["model"] in (*PRESETS, "swin_layout")
    if facts.repository:
        name = facts.repository.split("/")[1]
    data = facts.recipe["data"]
    data_name = data["class_path"].rpartition(".")[2]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data_name,
            dataset_name=data_name,
            dataset_config=metric.measured,
            dataset_split=metric.name.partition("/")[0],
            metric_type="accuracy" if metric.name.endswith("/acc") else metric.name.rpartition("/")[2],
            metric_name=metric.name,
            metric_value=metric.value,
        )
        for metric in facts.metrics
    ]
    header = ModelCardData(
        library_name="debiformer" if ours else "timm",
        license=facts.license,
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", *(["debiformer"] if ours else [])],
        model_name=name,
        eval_results=results or None,
    )
    families = [family for family in PAPERS if family in hparams["model"]] if ours else []
    return ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        name=name,
        address=f"{HUB}{facts.repository}" if facts.repository else f"{FOLDER}{name}",
        source=f"{HUB}{facts.repository}" if facts.repository else name,
        hparams=hparams,
        preprocessing=PREPROCESSING,
        ours=ours,
        run=run,
        facts=facts,
        recipe=recipe,
        data=yaml.safe_dump(data, sort_keys=False, allow_unicode=True),
        data_name=data_name,
        trained_with=run.get("versions", {"lightning": run.get("pytorch-lightning_version")}),
        shared_with=versions(),
        date=datetime.now(UTC).date().isoformat(),
        papers=[PAPERS[family] for family in families],
    )


def check_push(repository: str) -> None:
    """See that a repository of the Hub can be pushed to, as far as that can be known beforehand.

    Raises:
        ValueError: If it is no OWNER/NAME.
        OSError: If nobody is logged in, or the Hub cannot be reached.
    """
    wanted = "give OWNER/NAME, in letters, digits, '-', '_' and '.'"
    if repository.count("/") != 1:
        raise ValueError(f"--push {repository}: {wanted}")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push {repository}: {wanted}; {_first_line(error)}") from error
    try:
        _hub().whoami()
    except Exception as error:  # the Hub's client and its transport raise a dozen kinds
        raise OSError(f"--push {repository}: {_first_line(error)}; log in with `hf auth login`, or set HF_TOKEN") from error


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a shared folder to a repository of the Hub, made if need be; returns the address of the commit.

    Raises:
        OSError: If the Hub does not take it; the folder stays as it is.
    """
    api = _hub()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"{folder.name}, by debiformer {__version__}")
    except Exception as error:  # as above
        raise OSError(
            f"{folder} is written, but {repository} did not take it: {_first_line(error)}; try again with `hf upload {repository} {folder}`"
        ) from error


def _hub() -> HfApi:
    return HfApi(library_name="debiformer", library_version=__version__)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
