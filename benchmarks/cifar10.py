"""Accuracy on CIFAR-10 at equal recipe: python benchmarks/cifar10.py [peers | table5] --train cifar10-train.tar --test cifar10-test.tar

peers: DeBiFormer-nano, a BiFormer and three of timm's models, cut down to its size. table5: the nine mechanisms of Table 5 in one small
layout (`mechanisms.py`), with the speed and memory of each. All train by the recipe cifar10/debiformer_nano, and are tested on all test
images as they go: no choice is made by the test images, the last accuracy counts. Short runs (--epochs below 20) leave out Mixup, CutMix,
RandAugment, erasing and stochastic depth, which pay in long ones. Each run is a process of its own in --folder and goes on where it was cut
off when the same command is given again. Prints the table, draws results/NAME.png; --plot draws it again.
"""

import argparse
import csv
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import torch
from fresh import answer, call
from matplotlib import pyplot as plt
from mechanisms import MIXERS, peak_memory, speeds
from record import RESULTS, save
from timm.models import register_model
from torch import nn

from debiformer.cli.bench import count, table
from debiformer.cli.training import run
from debiformer.models.biformer import BiFormer, create, stages

PAGES = Path(__file__).parents[1] / "docs" / "images"
SIZE = 64
LONG = 20  # epochs from which the recipe's augmentation is kept
Models = dict[str, tuple[str, dict[str, Any], str]]  # name in the figure: timm's name, arguments, colour of Okabe and Ito's palette
PEERS: Models = {
    "DeBiFormer-nano": ("debiformer_nano", {}, "#0072B2"),
    "BiFormer, small": ("biformer_for_cifar", {}, "#009E73"),
    "Swin, small": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=SIZE, window_size=4, embed_dim=24, depths=[2, 2, 6, 2], num_heads=[1, 2, 4, 8]),
        "#D55E00",
    ),
    "ConvNeXt, small": ("convnext_atto", dict(depths=[2, 2, 4, 2], dims=[32, 64, 128, 208]), "#595959"),
    "ResNet, small": ("resnet18", dict(channels=[24, 48, 96, 192]), "#CC79A7"),
}
COLOURS = ("#D55E00", "#CC79A7", "#999999", "#E69F00", "#000000", "#56B4E9", "#B8A000", "#009E73", "#0072B2")
MECHANISMS: Models = {
    mixer.replace("_", " ").replace("bi level", "bi-level"): ("layout_for_cifar", {"mixer": mixer}, colour)
    for mixer, colour in zip(MIXERS, COLOURS, strict=True)
}
SETS = {"peers": ("cifar10", PEERS), "table5": ("table5", MECHANISMS)}
MODELS = PEERS | MECHANISMS


@register_model
def biformer_for_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer at the size of DeBiFormer-nano."""
    return create(BiFormer, "biformer_tiny", stages((2, 2, 3, 1), width=32), pretrained, **({"region_grid": 4} | kwargs))


def run_name(name: str, seed: int, epochs: int) -> str:
    """The folder of a run."""
    return f"{name.split(',')[0].lower().replace(' ', '_')}_{epochs:g}_epochs_seed{seed}"


def train(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """One run, in this process."""
    torch.set_num_threads(arguments.threads)
    model, model_args, _ = MODELS[name]
    settings: dict[str, Any] = {
        "config": "cifar10/debiformer_nano",
        "name": run_name(name, seed, arguments.epochs),
        "seed_everything": seed,
        "data.train_root": arguments.train,
        "data.val_root": arguments.test,
        "data.batch_size": 64,
        "data.num_workers": arguments.workers,
        "model.model": model,
        "model.model_args": json.dumps(model_args),
        "model.lr_batch_size": 64,
        "trainer.max_epochs": math.ceil(arguments.epochs),
        "trainer.default_root_dir": arguments.folder,
        "trainer.accelerator": arguments.accelerator,
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": "false",
    }
    if arguments.epochs < 1:
        settings["trainer.limit_train_batches"] = arguments.epochs
    if arguments.epochs < LONG:
        plain = {"auto_augment": "null", "re_prob": 0, "color_jitter": 0}
        settings |= {f"data.{option}": value for option, value in plain.items()}
        settings |= {"model.mixup": 0, "model.cutmix": 0, "model.drop_path_rate": 0, "model.warmup_epochs": 0.1}
        settings |= {"trainer.val_check_interval": 0.25}
    run("fit", [f"--{option}={value}" for option, value in settings.items()])


def curve(folder: Path) -> list[tuple[int, float]]:
    """Updates done and accuracy at each test, from the logs of all starts of a run."""
    rows = [row for file in sorted(folder.glob("csv/version_*/metrics.csv")) for row in csv.DictReader(file.open())]
    return sorted({int(row["step"]) + 1: float(row["val/acc"]) for row in rows if row.get("val/acc")}.items())


def describe(name: str) -> dict[str, float]:
    """Parameters in millions and MACs in millions of a model."""
    model, model_args, _ = MODELS[name]
    parameters, macs = count(model, (SIZE, SIZE), model_args | {"num_classes": 10})
    return dict(params_m=round(parameters / 1e6, 2), macs_m=round(macs / 1e6, 1))


def plot(kind: str, rows: list[dict[str, Any]]) -> Path:
    """Accuracy on the test images over the epochs, a line for each seed."""
    file, models = SETS[kind]
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    ends = sorted(
        {
            name: statistics.mean(r["accuracy"] for r in rows if r["model"] == name)
            for name in models
            if any(r["model"] == name for r in rows)
        }.items(),
        key=lambda end: end[1],
    )
    for name, _ in ends:
        for row in (row for row in rows if row["model"] == name):
            steps, accuracies = zip(*row["curve"], strict=True)
            epochs = [row["epochs"] * step / steps[-1] for step in steps]
            axes.plot(epochs, [100 * a for a in accuracies], color=MODELS[name][2], marker="o", markersize=4)
    low, high = axes.get_ylim()
    gap = (high - low) / 19  # labels that do not touch: from below as low as they may, then from the top as low as they must
    heights: list[float] = []
    for _, end in ends:
        heights.append(max(100 * end, heights[-1] + gap if heights else low))
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], heights[i + 1] - gap if i + 1 < len(heights) else high)
    for (name, end), height in zip(ends, heights, strict=True):
        where = dict(xytext=(8, 0), textcoords="offset points", va="center")
        axes.annotate(f"{name} {100 * end:.1f}", (rows[0]["epochs"], height), color=MODELS[name][2], **where)
    sizes = [row["params_m"] for row in rows]
    title = f"CIFAR-10 at {SIZE} pixels, models of {min(sizes):.1f} to {max(sizes):.1f} M parameters"
    axes.set(xlabel="epochs", ylabel="accuracy on the test images, %", title=title)
    figure.savefig(RESULTS / f"{file}.png", dpi=110)
    shutil.copy(RESULTS / f"{file}.png", PAGES)
    return RESULTS / f"{file}.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=SETS, default="peers")
    parser.add_argument("--train", help="tar file or folder of class folders")
    parser.add_argument("--test", help="the same, of the test images")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="some of: " + "; ".join(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=float, default=1, help="a part of one, or whole ones")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--folder", default="runs/cifar10")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    file, models = SETS[arguments.kind]
    if unknown := [name for name in arguments.models or () if name not in models]:
        parser.error(f"no model {unknown[0]!r} among {', '.join(models)}")
    if arguments.epochs <= 0 or (arguments.epochs > 1 and arguments.epochs % 1):
        parser.error(f"--epochs {arguments.epochs:g} is neither a part of one nor whole ones")
    if arguments.one:
        train(arguments.one[0], int(arguments.one[1]), arguments)
        return
    if arguments.plot:
        print(plot(arguments.kind, json.loads((RESULTS / f"{file}.json").read_text())["results"]))
        return
    if not arguments.train or not arguments.test:
        parser.error("--train and --test are needed")
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for name in arguments.models or models:
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", name, str(seed)], check=True, stdout=subprocess.DEVNULL)
            tested = curve(Path(arguments.folder, run_name(name, seed, arguments.epochs)))
            found = dict(seed=seed, epochs=arguments.epochs, accuracy=tested[-1][1], curve=tested)
            rows.append({"model": name, **describe(name), **found})
            save(file, rows, packages=["lightning"])  # whatever has been measured, should the rest be cut off
            print(
                f"{name:<27} seed {seed} {rows[-1]['params_m']:5.2f} M {rows[-1]['macs_m']:5.1f} MMACs {100 * rows[-1]['accuracy']:6.2f} %",
                flush=True,
            )
    if arguments.kind == "table5":
        add_costs(rows, arguments.threads)
        save(file, rows, packages=["lightning"])
        print(table(by_model(rows)))
    print(plot(arguments.kind, rows))


def by_model(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model, the best first: the mean of its seeds and the range beside what it costs."""
    found = []
    for name in dict.fromkeys(row["model"] for row in rows):
        runs = [row for row in rows if row["model"] == name]
        reached = [100 * row["accuracy"] for row in runs]
        costs = {key: runs[0][key] for key in ("params_m", "macs_m", "images/s", "training images/s", "training MB")}
        spread = {"accuracy, %": statistics.mean(reached), "from": min(reached), "to": max(reached), "seeds": len(runs)}
        found.append({"model": name, **spread, **costs})
    return sorted(found, key=lambda row: -row["accuracy, %"])


def add_costs(rows: list[dict[str, Any]], threads: int) -> None:
    """The speed of every mechanism, and the memory of its training step in a fresh process, beside each of its runs."""
    costs: dict[str, dict[str, Any]] = dict(speeds(threads))
    for row in rows:
        mixer = MODELS[row["model"]][1]["mixer"]
        if "training MB" not in costs[mixer]:
            costs[mixer]["training MB"] = round(call(__file__, dict(mixer=mixer, threads=threads)))
        row |= {"mixer": mixer, **costs[mixer]}


if __name__ == "__main__":
    answer(peak_memory) or main()
