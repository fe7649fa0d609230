"""Run an exported model on an image: python THIS MODEL_FILE IMAGE

Needs numpy, Pillow and what runs the file: onnxruntime for .onnx, openvino for .xml, torch for .pt2. The file says itself how it wants its
images, and what its outputs mean.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

KEY = "debiformer"  # under which files keep their description
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def load(file):
    """The file's description of itself, and a function from images (B, 3, H, W) to outputs."""
    if file.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # hundreds of lines tell of constants that it does not fold
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        description = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
        return description, lambda images: session.run(None, {"images": images})
    if file.suffix == ".xml":
        import openvino

        core = openvino.Core()
        model = core.read_model(file)
        # Its default precision is bfloat16 on CPUs that have it; with snippets, release 2026.4 gives wrong numbers at some sizes.
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE"})
        return json.loads(model.get_rt_info([KEY]).astype(str)), lambda images: [*compiled(images).values()]
    import torch

    extra = {f"{KEY}.json": ""}
    try:  # a package of machine code
        run = torch._inductor.aoti_load_package(str(file))
        extra = {f"{KEY}.json": run.get_metadata()[KEY]}
    except RuntimeError:
        run = torch.export.load(file, extra_files=extra).module()  # type: ignore[assignment]
    return json.loads(extra[f"{KEY}.json"]), lambda images: [out.numpy() for out in run(torch.from_numpy(images))]


def prepare(image, description):
    """An image as the model wants it, (1, 3, H, W)."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    height, width = description["size"]
    filter = RESAMPLING[description["interpolation"]]
    if description["crop_pct"] is None:
        image = image.resize((width, height), filter)
    else:
        down, across = (int(side / description["crop_pct"]) for side in (height, width))
        if height == width:
            short = min(image.size)
            image = image.resize(tuple(down if side == short else int(down * side / short) for side in image.size), filter)
        else:
            ratio = min(image.height / down, image.width / across)
            image = image.resize((round(image.width / ratio), round(image.height / ratio)), filter)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    values = (np.asarray(image, dtype=np.float32) / 255 - np.float32(description["mean"])) / np.float32(description["std"])
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def main(file, picture):
    """Print what the model finds; a mask is written beside the image."""
    description, run = load(Path(file))
    outputs = run(prepare(Image.open(picture), description))
    names = description["class_names"]
    if description["task"] == "classification":
        chances = np.exp(outputs[0][0] - outputs[0][0].max())
        chances /= chances.sum()
        for label in np.argsort(-chances)[:5]:
            print(f"{chances[label]:.4f}  {names[label]}")
    elif description["task"] == "segmentation":
        mask = outputs[0][0].argmax(0).astype(np.uint8)
        written = Path(picture).with_suffix(".mask.png")
        Image.fromarray(mask).save(written)
        for label, pixels in zip(*np.unique(mask, return_counts=True), strict=True):
            print(f"{pixels / mask.size:.4f}  {names[label]}")
        print(f"written  {written}")
    else:
        for name, values in zip(description["outputs"], outputs, strict=True):
            print(f"{name}  {values.shape}  from {values.min():.3f} to {values.max():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
