"""The dense path against timm's peers, side by side: python benchmarks/dense.py [--device cuda] [--rounds 5]

Backbones alone and whole models (Semantic FPN, UPerNet, RetinaNet, Mask R-CNN) at 512x512 and at 800x1344: one image, evaluation mode,
random weights. Times are medians of alternated runs in one process; memory is the peak above the loaded model, in a process for each. With
random weights all boxes have about the same score, so that a detector works on as many as it ever does.
"""

import argparse
from typing import Any

import torch
from fresh import answer, call
from memory import MB, extra_memory
from record import save
from torch import nn

from debiformer.cli import bench
from debiformer.models.backbone import Backbone
from debiformer.models.detector import Detector
from debiformer.models.segmenter import Segmenter

SIZES = {"512x512": (512, 512), "800x1344": (800, 1344)}
BACKBONES = ("debiformer_small", "biformer_small", "swin_tiny_patch4_window7_224", "convnext_tiny")
YARDSTICK = "swin_tiny_patch4_window7_224"
WHOLE = {"512x512": ("backbone", "semantic_fpn", "upernet"), "800x1344": ("backbone", "retinanet", "mask_rcnn")}


def arguments_for(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """What a backbone needs for images of a size."""
    if name.startswith("swin"):
        return dict(img_size=size, strict_img_size=False)
    if "biformer" in name:
        return dict(feature_norms=True, region_grid=8 if size == (512, 512) else 16)
    return {}


def build(name: str, part: str, size: tuple[int, int]) -> nn.Module:
    """A model in evaluation mode."""
    torch.manual_seed(0)
    options = arguments_for(name, size)
    if part == "backbone":
        return Backbone(name, **options).eval()
    if part in ("semantic_fpn", "upernet"):
        return Segmenter(name, part, 150, backbone_args=options).eval()
    sizes = dict(short_side=min(size), long_side=max(size))
    return Detector(part, name, 80, backbone_args=options, **sizes).eval()


def step(model: nn.Module, size: tuple[int, int], device: str) -> Any:
    """One call on one image."""
    image = torch.randn(3, *size, device=device)
    inputs: Any = [image] if isinstance(model, Detector) else image[None]

    @torch.inference_mode()
    def run() -> Any:
        return model(inputs)

    return run


def peak(name: str, part: str, size: str, device: str, threads: int) -> float:
    """Peak extra MB of a call, in a process of its own."""
    torch.set_num_threads(threads)
    model = build(name, part, SIZES[size]).to(device)
    run = step(model, SIZES[size], device)
    if not name.startswith("swin"):  # which takes images of one size
        step(model, (128, 160), device)()
    return extra_memory(run, device) / MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for size, parts in WHOLE.items():
        for part in parts:
            bench.tell(f"{part} at {size}")
            models = {name: build(name, part, SIZES[size]).to(options.device) for name in BACKBONES}
            seconds = bench.alternate(
                {name: step(model, SIZES[size], options.device) for name, model in models.items()}, options.rounds, warmup=1, progress=True
            )
            case = dict(part=part, size=size, device=options.device, threads=options.threads)
            memory = {name: call(__file__, case | dict(name=name)) for name in BACKBONES}
            for name, model in models.items():
                parameters = sum(p.numel() for p in model.parameters()) / 1e6
                row = {"model": part, "size": size, "backbone": name.partition("_patch")[0], "params M": round(parameters, 1)}
                row |= {"s": round(seconds[name], 3), "time": round(seconds[name] / seconds[YARDSTICK], 2)}
                rows.append(row | {"MB": round(memory[name]), "memory": round(memory[name] / memory[YARDSTICK], 2)})
    print(bench.table(rows))
    print(save("dense" if options.device == "cpu" else "dense_gpu", rows, options.device))


if __name__ == "__main__":
    answer(peak) or main()
