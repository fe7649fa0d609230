"""Images per second that one core reads and augments for training, beside timm's loader: python benchmarks/data.py [--images FOLDER]

Every source holds the same JPEG files and makes the same of them: a random crop to 224 pixels, a flip, RandAugment, bytes into a batch of
32, normalised. One loading process each, whole passes run alternately, the start of the process included; medians. Without --images the
files are the bundled photographs of blood cells, at the size of ImageNet's; a folder of natural photographs tells more. --evaluation
measures the transform of evaluation instead.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
import webdataset
from PIL import Image
from record import save
from timm.data import create_dataset, create_loader

from debiformer.data.blood_cells import whole_images
from debiformer.data.classification import ImageData
from debiformer.data.folders import ImageFolders
from debiformer.data.hub import HuggingFaceImages
from debiformer.data.images import find_images
from debiformer.data.shards import TarShards

SIZE, BATCH = 224, 32
POLICY = "rand-m9-inc1"  # with mstd0.5, as in the recipes, timm's own loader fails on Pillow 13; see images.posterize
CLASSES = ("a", "b")
TYPICAL = (500, 375)  # pixels of a typical image of ImageNet


def photographs(folder: str | None, count: int) -> list[bytes]:
    """JPEG files, repeated up to `count`."""
    if folder:
        files = [path.read_bytes() for path in find_images([folder]) if path.suffix.lower() in (".jpg", ".jpeg")][:count]
    else:
        files = []
        for path, _ in whole_images():
            file = io.BytesIO()
            Image.open(path).resize(TYPICAL).save(file, "JPEG", quality=95)
            files.append(file.getvalue())
    if not files:
        raise SystemExit(f"--images {folder}: no JPEG files there")
    return [files[index % len(files)] for index in range(count)]


def lay_out(files: list[bytes], root: Path) -> None:
    """The files as folders of classes, as tar shards and as a data set of Hugging Face."""
    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for split in ("train", "val"):
        (root / "shards").mkdir(exist_ok=True)
        with webdataset.ShardWriter(str(root / "shards" / f"{split}-%d.tar"), maxcount=len(files) // 4, verbose=0) as shards:
            for index, file in enumerate(files):
                target = index % 2
                path = root / "folders" / split / CLASSES[target] / f"{index:05}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file)
                shards.write({"__key__": f"{index:05}", "jpg": file, "cls": str(target)})
                if split == "train":
                    rows["image"].append({"bytes": file, "path": None})
                    rows["label"].append(target)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=table, validation=table).save_to_disk(str(root / "hub"))


def ours(data: ImageData, training: bool) -> Callable[[], Iterable[torch.Tensor]]:
    """Batches of a data module as a model gets them."""

    def batches() -> Iterable[torch.Tensor]:
        for batch in data.train_dataloader() if training else data.val_dataloader():
            yield data.on_after_batch_transfer(batch, 0).images

    return batches


def timms(root: Path, training: bool, workers: int) -> Callable[[], Iterable[torch.Tensor]]:
    """Batches of timm's loader, normalised by its prefetcher."""

    def batches() -> Iterable[torch.Tensor]:
        dataset = create_dataset("", root=str(root / "folders" / ("train" if training else "val")))
        options = dict(is_training=True, auto_augment=POLICY) if training else dict(crop_pct=0.875)
        interpolation = dict(interpolation="bicubic")
        device = torch.device("cpu")
        loader = create_loader(dataset, (3, SIZE, SIZE), BATCH, num_workers=workers, device=device, **options, **interpolation)
        return (images for images, _ in loader)

    return batches


def images_per_second(batches: Callable[[], Iterable[torch.Tensor]]) -> float:
    """Over a whole pass, the start of its processes included."""
    started, images = time.perf_counter(), 0
    for batch in batches():
        assert batch.shape[1:] == (3, SIZE, SIZE)
        assert batch.dtype == torch.float32
        images += len(batch)
    return images / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of JPEG files")
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--evaluation", action="store_true")
    arguments = parser.parse_args()
    training, workers = not arguments.evaluation, arguments.workers
    files = photographs(arguments.images, arguments.batches * BATCH)
    sizes = [Image.open(io.BytesIO(file)).size for file in files]
    photos = dict(
        width=round(statistics.mean(size[0] for size in sizes)),
        height=round(statistics.mean(size[1] for size in sizes)),
        kilobytes=round(statistics.mean(map(len, files)) / 1e3, 1),
        different=len(set(files)),
    )
    print(f"{len(files)} images, {photos}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        lay_out(files, root)
        options: dict[str, Any] = dict(input_size=SIZE, batch_size=BATCH, num_workers=workers, auto_augment=POLICY)
        shards = {split: f"{root}/shards/{split}-{{0..3}}.tar" for split in ("train", "val")}
        counts = dict(train_images=len(files), val_images=len(files))
        sources = {
            "timm.data.create_loader": timms(root, training, workers),
            "ImageFolders": ours(ImageFolders(root / "folders", **options), training),
            "TarShards": ours(TarShards(**shards, **counts, class_names=list(CLASSES), block=256, **options), training),
            "HuggingFaceImages": ours(HuggingFaceImages(str(root / "hub"), **options), training),
        }
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(arguments.trials):
            for name, batches in sources.items():
                rates[name].append(images_per_second(batches))
    reference = rates["timm.data.create_loader"]
    rows = []
    print(f"{'':<26} {'images/s':>9} {'of timm':>8}")
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, reference, strict=True))
        rows.append(dict(source=name, images_per_second=round(statistics.median(found), 1), ratio_to_timm=round(ratio, 2)))
        print(f"{name:<26} {rows[-1]['images_per_second']:>9.1f} {ratio:>8.2f}")
    name = "data" if training else "data_evaluation"
    print(
        save(
            name,
            dict(workers=workers, batch=BATCH, size=SIZE, photographs=photos, rows=rows),
            packages=["webdataset", "datasets", "pillow"],
        )
    )


if __name__ == "__main__":
    main()
