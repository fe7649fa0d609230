"""Real runs of the dense tasks, from scratch, in the same recipe: python benchmarks/dense_runs.py camvid --root camvid [--epochs 8]

camvid: Semantic FPN on the 367 training images of CamVid; mean IoU on its 101 validation images as training goes, and on its 233 test
images at the end. camvid_upernet: UPerNet likewise. bccd: RetinaNet on BCCD, in its own splits of 205, 87 and 72 images; average precision
likewise. DeBiFormer against timm's models in the recipes camvid/semantic_fpn_nano, camvid/upernet_nano and bloodcells/retinanet_nano, whose
backbone alone changes. Each run is a process of its own in --folder, and goes on where it was cut off when the same command is given again.
Results of models that are not run again are kept. Prints the table, draws results/NAME.png, which --plot draws again, and, where the
folders of all runs are there, results/NAME_pictures.jpg.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot as plt
from record import RESULTS, save

from debiformer.cli import bench
from debiformer.cli.training import run

NANO, OURS = "debiformer_nano", dict(feature_norms=True, region_grid=[8, 8])
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {  # name in the figure: timm's name, arguments, colour of Okabe and Ito's palette
    "DeBiFormer-nano": (NANO, OURS, "#56B4E9"),
    "DeBiFormer-T": ("debiformer_tiny", OURS, "#0072B2"),
    "ResNet-18": ("resnet18", {}, "#CC79A7"),
    "ResNet-50": ("resnet50", {}, "#009E73"),
    "Swin-T": ("swin_tiny_patch4_window7_224", dict(img_size=224, strict_img_size=False), "#D55E00"),
}


class Task(NamedTuple):
    """What is trained, and what it is judged by."""

    recipe: str
    title: str
    metric: str
    axis: str


TASKS = {
    "camvid": Task("camvid/semantic_fpn_nano", "CamVid, Semantic FPN", "miou", "mean IoU"),
    "camvid_upernet": Task("camvid/upernet_nano", "CamVid, UPerNet", "miou", "mean IoU"),
    "bccd": Task("bloodcells/retinanet_nano", "BCCD, RetinaNet", "map", "AP"),
}


def line(task: str, name: str, options: argparse.Namespace) -> list[str]:
    """The arguments of fit."""
    backbone, backbone_args, _ = MODELS[name]
    recipe = TASKS[task].recipe
    where = ["--data.root", options.root]
    if task == "bccd":  # whose bundled part has 100 images to train on
        where = ["--data", "debiformer.data.voc.VocData", *where, "--data.batch_size", 4, "--data.vflip", 0.5]
    model = ["--model.backbone", backbone, "--model.backbone_args", json.dumps(backbone_args)]
    length = ["--trainer.max_epochs", options.epochs, "--trainer.check_val_every_n_epoch", -(-options.epochs // 4)]
    place = ["--trainer.default_root_dir", options.folder, "--name", f"{task}_{name.lower()}_{options.epochs}", "--data.num_workers", 0]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", options.accelerator]
    return [str(part) for part in ["--config", recipe, *where, *model, *length, *place, *quiet]]


def train(task: str, name: str, options: argparse.Namespace) -> None:
    """Train a model to its end, and test it."""
    torch.set_num_threads(options.threads)
    run("fit", line(task, name, options))
    run("test", ["--ckpt_path", str(folder_of(task, name, options) / "checkpoints/last.ckpt")])


def folder_of(task: str, name: str, options: argparse.Namespace) -> Path:
    """The folder of a run."""
    return Path(options.folder, f"{task}_{name.lower()}_{options.epochs}")


def result(task: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a run came to."""
    folder, metric = folder_of(task, name, options), TASKS[task].metric
    rows = [row for file in sorted(folder.glob("csv/*/metrics.csv")) for row in csv.DictReader(file.open())]
    curve = {int(row["epoch"]) + 1: float(row[f"val/{metric}"]) for row in rows if row.get(f"val/{metric}")}
    scores = json.loads((folder / "evaluation/test/metrics.json").read_text())["scores"]
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    parameters = sum(value.numel() for key, value in state.items() if not re.search(r"running_|num_batches|confmat", key))
    row = {"model": name, "params M": round(parameters / 1e6, 2), "epochs": options.epochs, f"test {metric}": round(scores[metric], 4)}
    return row | {"curve": list(curve.items())}


def plot(task: str, rows: list[dict[str, Any]]) -> Path:
    """The metric on the validation images over the epochs."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for row in rows:
        epochs, values = zip(*row["curve"], strict=True)
        axes.plot(epochs, [100 * value for value in values], color=MODELS[row["model"]][2], marker="o", markersize=4, label=row["model"])
    axes.legend(frameon=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epochs", ylabel=f"{TASKS[task].axis} on the validation images, %", title=TASKS[task].title)
    figure.savefig(RESULTS / f"{task}.png", dpi=110)
    return RESULTS / f"{task}.png"


def pictures(task: str, names: list[str], options: argparse.Namespace) -> Path:
    """The same test image as each run has drawn it: what was found beside what was given."""
    figure, rows = plt.subplots(len(names), 1, figsize=(9, 2.6 * len(names)), layout="constrained", squeeze=False)
    for axes, name in zip(rows[:, 0], names, strict=True):
        axes.imshow(plt.imread(sorted((folder_of(task, name, options) / "evaluation/test/pictures").glob("0_*"))[0]))
        axes.set(xticks=[], yticks=[], ylabel=name)
    file = RESULTS / f"{task}_pictures.jpg"
    figure.savefig(file, dpi=100, pil_kwargs={"quality": 85})
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--root", help="folder of the data: CamVid's images and annotations, or BCCD in VOC's layout")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--folder", default="runs/dense")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    if options.one:
        train(options.task, options.one, options)
        return
    if not options.root and not options.plot:
        parser.error(f"{options.task} needs --root")
    file = RESULTS / f"{options.task}.json"
    found = {row["model"]: row for row in json.loads(file.read_text())["results"]} if file.exists() else {}
    for name in [] if options.plot else options.models:
        bench.tell(name)
        if not (folder_of(options.task, name, options) / "evaluation/test/metrics.json").is_file():
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", name], check=True, stdout=subprocess.DEVNULL)
        found[name] = result(options.task, name, options)
        # Whatever has been measured, should the rest be cut off.
        save(options.task, [found[name] for name in MODELS if name in found], packages=["lightning"])
    rows = [found[name] for name in MODELS if name in found]
    print(bench.table([{key: value for key, value in row.items() if key != "curve"} for row in rows]))
    print(plot(options.task, rows))
    if all(folder_of(options.task, row["model"], options).is_dir() for row in rows):
        print(pictures(options.task, [row["model"] for row in rows], options))


if __name__ == "__main__":
    main()
