"""Run an exported model on an image: python THIS MODEL_FILE IMAGE

Needs numpy, Pillow and what runs the file: onnxruntime for .onnx, openvino for .xml, torch for .pt2 (and torchvision for detectors), a Mac
and coremltools for .mlpackage. The file says itself how it wants its images, and what its outputs mean.
"""

import json
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

KEY = "debiformer"  # under which files keep their description
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
LEAST = 64  # pixels of a side that models of any size take
SURE = 0.3  # the score from which on a detection is told


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
        description = json.loads(model.get_rt_info([KEY]).astype(str))
        # Left to itself it takes bfloat16 on CPUs that have it; with snippets, release 2026.4 gives wrong numbers at some sizes.
        hint = "bf16" if description["precision"] == "bfloat16" else "f32"
        compiled = {}

        def run_openvino(images):
            shape = None if description["any_size"] else images.shape
            if shape not in compiled:
                if shape is not None:
                    model.reshape(list(shape))  # 1.2 to 2 times as fast as a model that takes any number of images
                compiled[shape] = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "SNIPPETS_MODE": "DISABLE"})
            return [*compiled[shape](images).values()]

        return description, run_openvino
    if file.suffix == ".mlpackage":
        import coremltools

        package = coremltools.models.MLModel(str(file))
        description = json.loads(package.user_defined_metadata[KEY])
        return description, lambda images: [package.predict({"images": images})[name] for name in description["outputs"]]
    import torch

    if find_spec("torchvision"):
        import torchvision  # noqa: F401  # which knows the operations of detectors
    with zipfile.ZipFile(file) as parts:
        machine_code = any("/aotinductor/" in name for name in parts.namelist())
    if machine_code:
        run = torch._inductor.aoti_load_package(str(file))
        description = json.loads(run.get_metadata()[KEY])
    else:
        extra = {f"{KEY}.json": ""}
        run = torch.export.load(file, extra_files=extra).module()  # type: ignore[assignment]
        description = json.loads(extra[f"{KEY}.json"])
    return description, lambda images: [out.numpy() for out in run(torch.from_numpy(images))]


def read(picture):
    """An image in 8-bit RGB, upright; transparency is laid on white, deep grey scaled."""
    image = ImageOps.exif_transpose(Image.open(picture))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return image.convert("F").point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare(image, description):
    """An image as the model wants it, (1, 3, H, W); where it sees windows, the whole of it."""
    filter = RESAMPLING[description["interpolation"]]
    if description["task"] == "detection":
        values = normalized(image, description)
        fitting = fit(values.shape[1:], description)
        values = stretched(values, *fitting)
        height, width = description["size"] or (max(side, LEAST) for side in fitting)
        return np.pad(values, ((0, 0), (0, height - fitting[0]), (0, width - fitting[1])))[None]
    if description["task"] == "segmentation":
        height, width = fit((image.height, image.width), description)
        image = image.resize((width, height), filter)
    else:
        image = cropped(image, description["size"], description["crop_pct"], filter)
    return np.ascontiguousarray(normalized(image, description)[None])


def cropped(image, size, share, filter):
    """The centre of an image that is resized first: the crop keeps this share of its shorter side."""
    height, width = size
    down, across = (int(side / share) for side in (height, width))
    if height == width:
        short = min(image.size)
        image = image.resize(tuple(down if side == short else int(down * side / short) for side in image.size), filter)
    else:
        ratio = min(image.height / down, image.width / across)
        image = image.resize((round(image.width / ratio), round(image.height / ratio)), filter)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def normalized(image, description):
    """(3, H, W) in float32."""
    values = (np.asarray(image, dtype=np.float32) / 255 - np.float32(description["mean"])) / np.float32(description["std"])
    return values.transpose(2, 0, 1)


def fit(size, description):
    """Height and width within the limits of the description, of the same proportions."""
    short, long = description["short_side"], description["long_side"]
    limits = [pixels / side for pixels, side in ((short, min(size)), (long, max(size))) if pixels]
    if description["task"] == "detection":
        if description["size"] is not None:
            limits = [limit / side for limit, side in zip(description["size"], size, strict=True)]
        by = min(limits)
        whole = int if description["size"] is None else round  # torchvision's way, or up to the size of the file
        return tuple(max(whole(side * by), 1) for side in size)
    by = min(limits, default=1.0)
    return tuple(max(round(side * by), LEAST if description["size"] is None else 1) for side in size)


def windows(values, description):
    """Top, left and part (1, 3, height, width) of the windows that see an image (1, 3, H, W), with zeros beyond its border."""
    starts = []
    for length, window in zip(values.shape[2:], description["size"], strict=True):
        starts.append([*range(0, length - window, description["stride"]), max(length - window, 0)])
    height, width = description["size"]
    values = np.pad(values, ((0, 0), (0, 0), (0, max(height - values.shape[2], 0)), (0, max(width - values.shape[3], 0))))
    for top in starts[0]:
        for left in starts[1]:
            yield top, left, np.ascontiguousarray(values[:, :, top : top + height, left : left + width])


def segment(values, run, description):
    """Logits (classes, H, W) of an image (1, 3, H, W): means over the windows that see a pixel."""
    height, width = (max(pair) for pair in zip(values.shape[2:], description["size"], strict=True))
    total = np.zeros((len(description["class_names"]) + 1, height, width), dtype=np.float32)
    for top, left, part in windows(values, description):
        seen = total[:, top : top + part.shape[2], left : left + part.shape[3]]
        seen[:-1] += run(part)[0][0]
        seen[-1] += 1
    return (total[:-1] / total[-1])[:, : values.shape[2], : values.shape[3]]


def stretched(values, height, width):
    """Maps (C, H, W) at another size, bilinearly."""
    for axis, count in ((1, height), (2, width)):
        old = values.shape[axis]
        at = np.clip((np.arange(count, dtype=np.float32) + 0.5) * np.float32(old / count) - 0.5, 0, None)
        low = np.minimum(at.astype(int), old - 1)
        share = (at - low).astype(np.float32).reshape((-1, 1) if axis == 1 else (1, -1))
        values = values.take(low, axis) * (1 - share) + values.take(np.minimum(low + 1, old - 1), axis) * share
    return values


def pasted(mask, box, height, width):
    """Which pixels (H, W) of an image belong to an object, from its mask over its box."""
    scale = (len(mask) + 2) / len(mask)
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * scale
    (x0, y0), (x1, y1) = (centre - half).astype(int), (centre + half).astype(int)
    chances = stretched(np.pad(mask, 1)[None], max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))[0]
    inside = np.zeros((height, width), dtype=bool)
    top, left = max(y0, 0), max(x0, 0)
    part = chances[top - y0 : max(height - y0, 0), left - x0 : max(width - x0, 0)] > 0.5
    inside[top : top + part.shape[0], left : left + part.shape[1]] = part
    return inside


def objects(outputs, image, description):
    """Detections: label, score, box in pixels of the image, and mask (H, W) or None, the surest first."""
    boxes, labels, scores, *masks = outputs
    height, width = fit((image.height, image.width), description)
    scale = np.array([image.width / width, image.height / height] * 2, dtype=np.float32)
    for row in np.flatnonzero(scores > 0):
        box = boxes[row] * scale
        inside = box.clip(0, [image.width, image.height] * 2)  # of the image, beside which there may be zeros
        if (inside[2:] > inside[:2]).all():
            mask = pasted(masks[0][row], box, image.height, image.width) if masks else None
            yield description["class_names"][labels[row]], scores[row], inside, mask


def main(file, picture):
    """Print what the model finds; masks and boxes are drawn into a picture beside the image."""
    description, run = load(Path(file))
    image = read(picture)
    values = prepare(image, description)
    outputs = run(values) if description["stride"] is None else [segment(values, run, description)[None]]
    names = description["class_names"]
    if description["task"] == "classification":
        chances = np.exp(outputs[0][0] - outputs[0][0].max())
        chances /= chances.sum()
        for label in np.argsort(-chances)[:5]:
            print(f"{chances[label]:.4f}  {names[label]}")
    elif description["task"] == "segmentation":
        mask = stretched(outputs[0][0], image.height, image.width).argmax(0).astype(np.uint8)
        written = Path(picture).with_suffix(".mask.png")
        Image.fromarray(mask).save(written)
        for label, pixels in zip(*np.unique(mask, return_counts=True), strict=True):
            print(f"{pixels / mask.size:.4f}  {names[label]}")
        print(f"written  {written}")
    elif description["task"] == "detection":
        drawn = image.copy()
        for name, score, box, mask in objects(outputs, image, description):
            if score >= SURE:
                print(f"{score:.4f}  {name}  {' '.join(f'{value:.1f}' for value in box)}")
                if mask is not None:
                    drawn.paste((255, 0, 0), mask=Image.fromarray(mask * np.uint8(96)))
                ImageDraw.Draw(drawn).rectangle([float(value) for value in box], outline=(255, 0, 0))
        written = Path(picture).with_suffix(".found.png")
        drawn.save(written)
        print(f"written  {written}")
    else:
        for name, values in zip(description["outputs"], outputs, strict=True):
            print(f"{name}  {values.shape}  from {values.min():.3f} to {values.max():.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
