"""Hours that the ImageNet recipes take, predicted from training speed: python benchmarks/hours.py [--images-per-second MODEL=NUMBER ...]

Without speeds it takes those that models.py --only training measured on a CPU. On a GPU, measure first and hand over what comes out:

    debiformer bench debiformer_small --train --device cuda --batch-size 128 --dtype bfloat16
    python benchmarks/hours.py --device H100 --devices 8 --images-per-second debiformer_small=1234

The model: images/s = devices x images/s of one x efficiency; hours = epochs x 1,281,167 / images/s / 3600. Each update averages the
gradients, 4 bytes for each parameter, of which a ring all-reduce over n devices sends 2 (n - 1) / n from each. Data come at images/s x 110
kB, the mean of ImageNet's training files, and take as many cores to read as data.py measured: of its machine, for its photographs.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from record import RESULTS, save

from debiformer.cli import bench
from debiformer.cli.training import known_recipes

IMAGES = 1_281_167
BYTES_PER_IMAGE = 110e3
OTHER = ("finetune_384", "linear_probe")  # where a step costs another time than in training at 224


def measured() -> dict[str, float]:
    """Images/s of a training step on the machine of the last models.py, the faster of its two allocators."""
    speeds: dict[str, float] = {}
    for row in json.loads((RESULTS / "models_training.json").read_text())["results"]:
        speeds[row["model"]] = max(speeds.get(row["model"], 0.0), 1e3 * row["batch"] / row["eager ms"])
    return speeds


def read_by_a_core() -> float:
    """Images/s that one core reads and augments from tar shards, by the last data.py."""
    rows = json.loads((RESULTS / "data.json").read_text())["results"]["rows"]
    return next(row["images_per_second"] for row in rows if row["source"] == "TarShards")


def predict(recipe: Path, speed: float, devices: int, efficiency: float) -> dict[str, Any]:
    """What one recipe takes on so many devices, each of which trains on `speed` images/s by itself."""
    settings = yaml.safe_load(recipe.read_text())
    with torch.device("meta"):
        parameters = sum(p.numel() for p in timm.create_model(settings["model"]["model"]).parameters())
    epochs, batch = settings["trainer"]["max_epochs"], settings["data"]["init_args"]["batch_size"]
    rate = devices * speed * efficiency
    return {
        "recipe": recipe.stem,
        "images/s each": round(speed, 1),
        "devices": devices,
        "efficiency": efficiency,
        "images/s": round(rate, 1),
        "updates/s": round(rate / (devices * batch), 4),
        "gradient MB": round(4e-6 * parameters, 1),
        "on the wire MB": round(4e-6 * parameters * 2 * (devices - 1) / devices, 1),
        "data MB/s": round(1e-6 * BYTES_PER_IMAGE * rate, 1),
        "cores to read": math.ceil(rate / read_by_a_core()),
        "hours": round(epochs * IMAGES / rate / 3600, 1),
    }


def model_speed(text: str) -> tuple[str, float]:
    """MODEL=NUMBER."""
    model, _, number = text.partition("=")
    if not timm.is_model(model):
        raise argparse.ArgumentTypeError(f"{text!r}: timm knows no model {model!r}")
    if not float(number or 0) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL=NUMBER with a number above 0")
    return model, float(number)


def main() -> None:
    """Predict every recipe that there is a speed for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-per-second", nargs="+", type=model_speed, metavar="MODEL=NUMBER", help="training, of one device")
    parser.add_argument("--device", help="what the speeds were measured on, for the record; left out, the CPU that models.py ran on")
    parser.add_argument("--devices", type=int, default=1, help="how many of them train together")
    parser.add_argument("--efficiency", type=float, default=1.0, help="share of their speed that is left when they do; measure it")
    options = parser.parse_args()
    if options.images_per_second and not options.device:
        parser.error("--images-per-second needs --device: say what the speeds were measured on")
    speeds = dict(options.images_per_second or measured().items())
    rows = []
    for name, recipe in known_recipes().items():
        model = yaml.safe_load(recipe.read_text())["model"]["model"]
        if name.startswith("imagenet1k/") and name.split("/")[1] not in OTHER and model in speeds:
            rows.append(predict(recipe, speeds[model], options.devices, options.efficiency))
    if not rows:
        parser.error(f"no recipe trains {' or '.join(speeds)}")
    print(bench.table(rows))
    on = options.device or json.loads((RESULTS / "models_training.json").read_text())["machine"]
    print(save("hours_gpu" if options.device else "hours", {"measured on": on, "recipes": rows}))


if __name__ == "__main__":
    main()
