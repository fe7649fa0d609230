"""predict --engine ray on a cluster of two CPUs: as the local engine finds it, whatever the source, and whoever is killed."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from tasks_on_disk import random_task, save

from debiformer.cli import main
from debiformer.data.images import eval_transform, read_image
from debiformer.tasks.detection import DetectionTask
from debiformer.tasks.prediction import PREPROCESSING, load_classifier
from debiformer.tasks.segmentation import SegmentationTask

Cluster = pytest.importorskip("ray.cluster_utils").Cluster
DETECTOR_ARGS = dict(rpn_post_nms_top_n_test=20, box_detections_per_img=5)


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False, object_store_memory=2**28))
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Photographs of noise, a checkpoint of each task, and a broken file."""
    work = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    save(random_task(input_size=(3, 64, 64)), work / "labels.ckpt")
    names, palette = ["a", "b", "c"], [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    heads = dict(head_args={"channels": 16, "pyramid_channels": 16}, short_side=64)
    save(SegmentationTask("test_convnext", names, palette, **heads), work / "masks.ckpt")
    sizes = dict(pyramid_channels=16, short_side=64, long_side=96, milestones=[8])
    save(DetectionTask("test_convnext", names, detector="mask_rcnn", detector_args=DETECTOR_ARGS, **sizes), work / "boxes.ckpt")
    noise = np.random.default_rng(0)
    (work / "photos/nested").mkdir(parents=True)
    for number in range(11):
        pixels = noise.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        file = work / "photos" / ("nested" if number % 2 else "") / f"{number}.png"
        Image.fromarray(pixels).resize((90 + number, 70)).save(file)
    (work / "photos/nested/broken.jpg").write_bytes(b"\xff\xd8 no more")
    return work


@pytest.fixture
def inside(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


def line(cluster, *arguments):
    return ["predict", "--engine", "ray", "--address", cluster.address, *map(str, arguments)]


def rows_of(folder):
    """All rows, as any reader of Parquet folders finds them."""
    return pq.read_table(folder).to_pylist()


def test_labels_from_every_source(cluster, inside, tmp_path, capsys):
    """A folder, a pattern, a tar shard, and Parquet files with bytes and with what the Hub has; by path and by URL."""
    files = sorted(file for file in Path("photos").rglob("*.*"))
    (tmp_path / "flat").mkdir()
    for file in files:
        (tmp_path / "flat" / file.name).write_bytes(file.read_bytes())
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for file in files:
            shard.add(file, file.name)
    contents = [file.read_bytes() for file in files]
    pq.write_table(pa.table({"image": contents}), tmp_path / "bytes.parquet", row_group_size=5)
    structs = [{"bytes": content, "path": file.name} for file, content in zip(files, contents, strict=True)]
    pq.write_table(pa.table({"image": structs}), tmp_path / "structs.parquet")

    assert main(["predict", "--checkpoint", "labels.ckpt", "photos", "--output", str(tmp_path / "labels.jsonl")]) == 0
    local = {Path(row["file"]).name: row for row in map(json.loads, (tmp_path / "labels.jsonl").read_text().splitlines())}
    sources = [
        "photos",
        f"file://{tmp_path}/flat/*.*",
        f"local://{tmp_path}/shard.tar",
        tmp_path / "bytes.parquet",
        tmp_path / "structs.parquet",
    ]
    options = ["--checkpoint", "labels.ckpt", "--output", tmp_path / "out", "--part-size", 7, "--embeddings", "--actors", 1]
    assert main(line(cluster, *sources, *options)) == 0
    assert "60 images, 5 with errors, written to" in capsys.readouterr().err
    found = rows_of(tmp_path / "out")
    position = {f"{tmp_path}/{name}.parquet#{row}": file for name in ("bytes", "structs") for row, file in enumerate(files)}
    name_of = {row["path"]: Path(position.get(row["path"], row["path"].replace("#", "/"))).name for row in found}
    assert Counter(name_of[row["path"]] for row in found) == {file.name: 5 for file in files}
    assert len({row["path"] for row in found}) == 60

    task = load_classifier("labels.ckpt")
    transform = eval_transform(**{name: task.hparams[name] for name in PREPROCESSING})
    for row in found:
        name = name_of[row["path"]]
        expected = local[name]
        assert row["error"] == expected["error"]
        if row["error"] is None:
            assert row["labels"] == [guess["label"] for guess in expected["predictions"]]
            assert row["probabilities"] == pytest.approx([guess["probability"] for guess in expected["predictions"]], abs=1e-6)
            assert (row["label"], row["probability"]) == (row["labels"][0], row["probabilities"][0])
            (file,) = (file for file in files if file.name == name)
            features = task.model.forward_features(transform(read_image(file))[None])
            embedding = task.model.forward_head(features, pre_logits=True)[0]
            torch.testing.assert_close(torch.tensor(row["embedding"]), embedding, rtol=1e-4, atol=1e-5)
    schema = pq.read_schema(tmp_path / "out/part-00000000.parquet")
    assert schema.field("embedding").type == pa.list_(pa.float32(), len(embedding))
    assert json.loads(schema.metadata[b"class_names"]) == ["a", "b", "c"]


def test_masks(cluster, inside, tmp_path):
    assert main(["predict", "--checkpoint", "masks.ckpt", "photos", "--output", str(tmp_path / "local"), "--flip"]) == 0
    assert main(line(cluster, "photos", "--checkpoint", "masks.ckpt", "--output", "masks", "--flip", "--actors", 1)) == 0
    found = rows_of("masks")
    assert sorted(Path(row["path"]).name for row in found if row["error"]) == ["broken.jpg"]
    for row in (row for row in found if row["error"] is None):
        name = Path(row["path"]).relative_to(inside / "photos").with_suffix(".png")
        mask, expected = Image.open(io.BytesIO(row["mask"])), Image.open(tmp_path / "local/masks" / name)
        assert np.array_equal(np.asarray(mask), np.asarray(expected))
        assert mask.getpalette() == expected.getpalette()


def test_boxes(cluster, inside, tmp_path):
    Image.new("RGB", (398, 2)).save(tmp_path / "sliver.png")  # which no detector can take
    options = ["--checkpoint", "boxes.ckpt", "--min-score", "0.01"]
    assert main(["predict", *options, "photos", "--output", str(tmp_path / "local")]) == 0
    assert main(line(cluster, "photos", tmp_path / "sliver.png", *options, "--output", tmp_path / "out", "--actors", 1)) == 0
    local = json.loads((tmp_path / "local/detections.json").read_text())
    names = {category["id"]: category["name"] for category in local["categories"]}
    found = {row["path"]: row for row in rows_of(tmp_path / "out")}
    assert "output (H: 0" in found.pop(str(tmp_path / "sliver.png"))["error"]
    assert found.pop(str(inside / "photos/nested/broken.jpg"))["boxes"] is None
    assert len(found) == len(local["images"]) == 11
    for image in local["images"]:
        row = found[str(inside / image["file_name"])]
        expected = [one for one in local["annotations"] if one["image_id"] == image["id"]]
        assert (row["width"], row["height"], row["error"]) == (image["width"], image["height"], None)
        assert len(expected) > 0
        np.testing.assert_allclose(row["boxes"], [one["bbox"] for one in expected], atol=0.011)
        np.testing.assert_allclose(row["scores"], [one["score"] for one in expected], atol=1e-4)
        assert row["labels"] == [names[one["category_id"]] for one in expected]
        for mask, one in zip(row["masks"], expected, strict=True):
            assert np.array_equal(coco.decode(mask), coco.decode(one["segmentation"]))


@pytest.fixture(scope="module")
def many(work):
    """Files of one photograph, large enough to take a while; one is broken."""
    folder = work / "many"
    folder.mkdir()
    first = folder / "0000.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)).save(first)
    for number in range(1, 600):
        os.link(first, folder / f"{number:04}.png")
    (folder / "0300.png").unlink()
    (folder / "0300.png").write_bytes(b"nothing")
    return folder


def begin(cluster, many, output):
    """A run of the many files, in 30 parts, in a process of its own that has finished three of them."""
    command = line(cluster, many, "--checkpoint", many.parent / "labels.ckpt", "--output", output, "--part-size", 20)
    process = subprocess.Popen([sys.executable, "-m", "debiformer", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    before = len(finished(output))
    while len(finished(output)) < before + 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    return process


def finished(output):
    """Files of finished parts, with the time of each."""
    return {file: file.stat().st_mtime_ns for file in Path(output).glob("part-*.parquet")}


def check_all_are_there_once(many, output):
    found = rows_of(output)
    assert sorted(row["path"] for row in found) == sorted(map(str, many.iterdir()))
    assert [Path(row["path"]).name for row in found if row["error"]] == ["0300.png"]
    assert len({row["probability"] for row in found if row["error"] is None}) == 1
    assert len(finished(output)) == 30
    assert not list(Path(output).glob("*.unfinished"))


def test_a_killed_worker_loses_and_doubles_nothing(cluster, many, tmp_path):
    process = begin(cluster, many, tmp_path / "out")
    raylet = cluster.head_node.all_processes["raylet"][0].process.pid
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    workers = [int(pid) for pid in children if "MapWorker" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert len(finished(tmp_path / "out")) < 30, "it was killed at work"
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "600 images, 1 with errors" in out
    check_all_are_there_once(many, tmp_path / "out")


def test_a_run_that_is_stopped_or_killed_goes_on(cluster, many, tmp_path):
    output = tmp_path / "out"
    process = begin(cluster, many, output)
    process.terminate()
    out, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "the same command goes on" in out
    stopped = finished(output)

    process = begin(cluster, many, output)
    process.kill()
    process.communicate()
    killed = finished(output)
    assert len(stopped) < len(killed) < 30, "it was killed at work"
    (output / "_part-00000029-0.unfinished").write_bytes(b"what a worker left that was killed")

    process = begin(cluster, many, output)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    done = finished(output)
    assert stopped.items() <= killed.items() <= done.items(), "what was finished is left as it is"
    check_all_are_there_once(many, output)


def test_mistakes_that_the_cluster_tells(cluster, inside, tmp_path, capsys):
    options = ["photos", "--checkpoint", "labels.ckpt", "--output", tmp_path / "out"]
    assert main(line(cluster, *options, "--device", "cuda")) == 2
    assert "--device cuda: the cluster has no GPU" in capsys.readouterr().err
    assert main(line(cluster, *options, "--actors", 3)) == 2
    assert "--actors 3: the cluster has room for 2" in capsys.readouterr().err
