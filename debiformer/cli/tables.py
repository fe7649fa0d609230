"""Command tables: the numbers of the papers' tables, ours beside them, and how each was obtained."""

import argparse
import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import cache
from statistics import mean
from string import ascii_lowercase
from textwrap import fill
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

from ..models.detector import Detector
from ..models.segmenter import Segmenter
from . import PACKAGE, papers
from .bench import cost, count, model_arguments, table, tell
from .papers import MACS, PARAMETERS, SOURCES, TOP1

NOT_AT_HAND = "not at hand"
SEGMENTED, DETECTED = (512, 2048), (800, 1280)  # the sizes for which the release's get_flops.py counts
PROPOSALS, MASKED = 1000, 100  # boxes that get a class, and those that get a mask
BENCHMARKS = {"table5": "benchmarks/cifar10.py table5", "table6": "benchmarks/table6.py"}  # what makes benchmarks/results/NAME.json
INTRODUCTION = f"""# The papers' tables

Every number of the papers' tables that is within reach, and ours beside it. `debiformer tables` prints them, from the models and from
`benchmarks/results/`; `debiformer tables 5` prints one table. The papers themselves were not within reach when this was written, only what
their releases print: *{NOT_AT_HAND}* says that no such source has the number. What they call FLOPs are multiply-adds, GMACs here.

* **exact**: counted here, and equal to every digit that is printed.
* **measured here**: counted or timed here. Where a published number differs, a note says why.
* **proxy on CIFAR-10**: small models, trained here on other images. No published number stands beside them.
* **needs** ImageNet, ADE20K or COCO: nothing was trained on them here; the [recipe](training.md) that would is named."""


class Row(NamedTuple):
    """One number: ours and how it was obtained, as it is published and where. What is not there is empty."""

    model: str
    number: str
    how: str
    published: str = ""
    source: str = ""
    ours: str = ""
    difference: str = ""

    @property
    def note(self) -> str:
        """What there is to say of it."""
        return papers.NOTES.get((self.model, self.number), "")


class Section(NamedTuple):
    """Tables that are shown together."""

    tables: tuple[int, ...]
    title: str
    about: str
    rows: Callable[[], list[Row]]


def run(arguments: list[str]) -> int:
    """Print the tables, or the page of them."""
    parser = argparse.ArgumentParser(prog="debiformer tables", description=__doc__)
    parser.add_argument("table", nargs="?", type=int, choices=range(1, 8), help="one of them (default: all)")
    parser.add_argument("--markdown", action="store_true", help="as the page docs/tables.md")
    options = parser.parse_args(arguments)
    found = [(section, section.rows()) for section in SECTIONS if options.table in (None, *section.tables)]
    tell("")
    print((page if options.markdown else text)(found))
    return 0


def text(found: list[tuple[Section, list[Row]]]) -> str:
    """The tables for a terminal."""
    parts = []
    for section, rows in found:
        shown, notes = cells(rows)
        parts.append("\n".join([section.title, fill(section.about, 120), "", table(shown), *(fill(line, 120) for line in notes)]))
    sources = [f"[{i}] {source.title}: {source.address}" for i, source in enumerate(SOURCES.values(), 1)]
    return "\n\n".join([*parts, "\n".join([*sources, f"{NOT_AT_HAND}: in none of these, and the papers were not within reach"])])


def page(found: list[tuple[Section, list[Row]]]) -> str:
    """The tables as Markdown."""
    parts = [INTRODUCTION]
    for section, rows in found:
        shown, notes = cells(rows)
        lines = [list(shown[0]), ["---", "---", "---:", "---:", "---:", "---"], *(row.values() for row in shown)]
        grid = "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("*", r"\*")
        parts += [f"## {section.title}", section.about, grid, *notes]
    sources = [f"{i}. [{source.title}]({source.address})" for i, source in enumerate(SOURCES.values(), 1)]
    return "\n\n".join([*parts, "## Sources", "\n".join(sources)])


def cells(rows: list[Row]) -> tuple[list[dict[str, str]], list[str]]:
    """The columns of a table as they are shown, and the notes below it."""
    letters = dict(zip(dict.fromkeys(row.note for row in rows if row.note), ascii_lowercase, strict=False))
    marks = {source: f" [{i}]" for i, source in enumerate(SOURCES, 1)}
    shown = [
        {"model": row.model, "number": row.number, "published": row.published + marks.get(row.source, "") if row.published else NOT_AT_HAND}
        | {"ours": row.ours, "difference": row.difference, "how": row.how + (f" ({letters[row.note]})" if row.note else "")}
        for row in rows
    ]
    return shown, [f"({letter}) {note}" for note, letter in letters.items()]


@cache
def counted(name: str, **kwargs: Any) -> tuple[int, float]:
    """Parameters and multiply-adds of a classifier at 224 pixels."""
    tell(f"counting {name}")
    return count(name, (224, 224), kwargs)


def counted_dense(parts: Mapping[str, Any]) -> tuple[int, float]:
    """Parameters and multiply-adds of a backbone with its head for ADE20K or its detector for COCO."""
    backbone, size = parts["backbone"], SEGMENTED if "head" in parts else DETECTED
    tell(f"counting {backbone} with {parts.get('head') or parts.get('detector')}")
    args = model_arguments(backbone, size) | parts.get("backbone_args", {})
    if "head" in parts:
        return cost(lambda: Segmenter(backbone, parts["head"], 150, backbone_args=args), lambda model: model(torch.empty(1, 3, *size)))
    return cost(lambda: Detector(parts["detector"], backbone, 80, backbone_args=args).model, detect)


def detect(model: Any) -> None:
    """What one of torchvision's detectors multiplies for an image on which it finds as much as it may."""
    maps = list(model.backbone(torch.empty(1, 3, *DETECTED)).values())
    if not hasattr(model, "rpn"):
        model.head(maps)
        return
    heads: dict[str, nn.Module] = dict(model.roi_heads.named_children())
    channels = model.backbone.out_channels
    model.rpn.head(maps)
    heads["box_predictor"](heads["box_head"](torch.empty(PROPOSALS, channels, 7, 7)))
    heads["mask_predictor"](heads["mask_head"](torch.empty(MASKED, channels, 14, 14)))


def sizes(label: str, costs: tuple[int, float], published: Mapping[str, str] | None = None, source: str = "") -> list[Row]:
    """Rows of parameters and multiply-adds: exact where they are equal to the published ones in every digit that is printed."""
    rows = []
    for number, value in ((PARAMETERS, costs[0] / 1e6), (MACS, costs[1] / 1e9)):
        row = Row(label, number, "measured here", (published or {}).get(number, ""), source, f"{value:.3f}")
        if row.published:
            printed = Decimal(row.published)
            exact = Decimal(value).quantize(printed) == printed
            row = row._replace(difference="0", how="exact") if exact else row._replace(difference=f"{Decimal(row.ours) - printed:+}")
        rows.append(row)
    return rows


def classification() -> list[Row]:
    """Table 1; of the peers, the sizes."""
    rows = []
    for model in papers.CLASSIFIERS:
        rows += sizes(model.label, counted(model.name), model.published, model.source)
        rows += [on_imagenet(model)] if TOP1 in model.published else []
    return rows


def on_imagenet(model: papers.Classifier) -> Row:
    """The accuracy of a classifier."""
    near = f"no recipe of its own; imagenet1k/biformer_tiny with --model.model {model.name} comes near"
    how = f"needs ImageNet: {f'recipe {model.recipe}' if model.recipe else near}"
    return Row(model.label, TOP1, how, model.published.get(TOP1, ""), model.source)


def dense() -> list[Row]:
    """Tables 2 to 4."""
    rows = []
    for model in papers.DENSE:
        parts = yaml.safe_load((PACKAGE / "recipes" / f"{model.recipe}.yaml").read_text())["model"] if model.recipe else model.parts
        rows += sizes(model.label, counted_dense(parts), model.published, model.source)
        how = f"needs {'ADE20K' if 'head' in parts else 'COCO'}: recipe {model.recipe}"
        accuracies = {number: printed for number, printed in model.published.items() if number not in (PARAMETERS, MACS)}
        rows += [Row(model.label, number, how, printed, model.source) for number, printed in accuracies.items()]
    return rows


def mechanisms() -> list[Row]:
    """Table 5."""
    rows = []
    runs = results("table5")
    for model in papers.MECHANISMS:
        rows += sizes(model.label, counted(model.name), model.published, model.source)
        rows += [on_imagenet(model), proxy(model.label, [run for run in runs if run["model"] == model.label])]
    return rows


def proxy(label: str, runs: list[dict[str, Any]]) -> Row:
    """The mean of what a small model of a mechanism reaches on CIFAR-10 with several seeds, and the range."""
    row = Row(label, "top-1 on CIFAR-10, %", f"proxy on CIFAR-10, not run yet: {missing('table5')}", "none")
    if not runs:
        return row
    found = [100 * run["accuracy"] for run in runs]
    how = f"proxy on CIFAR-10: {runs[0]['params_m']:.2f} M parameters, {runs[0]['epochs']:g} epochs, {len(runs)} seeds"
    return row._replace(how=how, ours=f"{mean(found):.1f} ({min(found):.1f} to {max(found):.1f})")


def topk() -> list[Row]:
    """Table 6."""
    rows = []
    timed = {(tuple(row["bra_topk"]), tuple(row["dbra_topk"])): row for row in results("table6")}
    for bra, dbra in papers.TOPK:
        label = f"BRA {', '.join(map(str, bra[:3]))}; DBRA {', '.join(map(str, dbra))}"
        label += " (released)" if (bra, dbra) == papers.RELEASED_TOPK else ""
        rows += sizes(label, counted(papers.ABLATED, bra_topk=bra, dbra_topk=dbra))
        rows.append(Row(label, TOP1, f"needs ImageNet: recipe imagenet1k/{papers.ABLATED} with these --model.model_args"))
        for engine, ratio in (("ONNX Runtime", "onnxruntime_ratio"), ("OpenVINO", "openvino_ratio")):
            row = Row(label, f"latency in {engine}, released = 1", f"not measured yet: {missing('table6')}")
            if (bra, dbra) in timed:
                row = row._replace(how="measured here", ours=f"{timed[bra, dbra][ratio]:.2f}")
            rows.append(row)
    return rows


def patterns() -> list[Row]:
    """Table 7."""
    rows = []
    for pattern in papers.PATTERNS:
        label = " ".join(pattern) + (" (released)" if pattern == papers.RELEASED_PATTERN else "")
        rows += sizes(label, counted(papers.ABLATED, pattern=pattern))
        rows.append(Row(label, TOP1, f"needs ImageNet: recipe imagenet1k/{papers.ABLATED} with this --model.model_args.pattern"))
    return rows


def results(name: str) -> list[dict[str, Any]]:
    """What a benchmark left, in an installed package or in the repository; nothing where it has not run."""
    for folder in (PACKAGE / "results", PACKAGE.parent / "benchmarks" / "results"):
        if (file := folder / f"{name}.json").is_file():
            return json.loads(file.read_text(encoding="utf-8"))["results"]
    return []


def missing(name: str) -> str:
    """How to get results that are not there, or not of this row."""
    return f"python {BENCHMARKS[name]} makes {name}.json"


_OURS = f"Which model and which rows the paper has could not be read: these are of {papers.ABLATED} at 224x224."
SECTIONS = (
    Section(
        (1,),
        "Table 1: classification on ImageNet-1K",
        "GMACs at 224x224. Swin, ConvNeXt and ResNet are timm's, counted in the same way.",
        classification,
    ),
    Section(
        (2, 3, 4),
        "Tables 2 to 4: segmentation on ADE20K, detection on COCO",
        "Which of the three is which could not be read. Sizes are those of the whole network, with the head that UPerNet has for training "
        "alone; GMACs at 512x2048 for segmentation and 800x1280 for detection, as the release's get_flops.py counts, with "
        f"{PROPOSALS} proposals and {MASKED} masks in Mask R-CNN. Swin is timm's, in the same heads and detectors.",
        dense,
    ),
    Section(
        (5,),
        "Table 5: mechanisms of attention in the Swin-T layout",
        "GMACs at 224x224. The proxy trains small models that differ in the mechanism and what belongs to it, convolutions and biases "
        "among them: it ranks them on CIFAR-10, and says little of ImageNet. Its range is that of the seeds.",
        mechanisms,
    ),
    Section(
        (6,),
        "Table 6: top-k",
        f"Top-k of the BRAs and DBRAs, stage by stage. {_OURS} Latencies are those of single images on a CPU.",
        topk,
    ),
    Section((7,), "Table 7: patterns of mixers", f"A word for each stage: B is BRA, * is DBRA. {_OURS}", patterns),
)
