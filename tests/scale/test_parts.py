"""Parts, reading, memory and writing, one by one and without a cluster."""

import errno
import io
import re
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from tasks_on_disk import random_task, save

pytest.importorskip("ray")

from debiformer.cli import main, scaling
from debiformer.data.images import UnreadableImage
from debiformer.scale import reading, workers
from debiformer.scale.cluster import Workers, arrange
from debiformer.scale.findings import Labels, schema_of
from debiformer.scale.memory import batch_size, fitting, peak
from debiformer.scale.reading import Item, ahead, load, read
from debiformer.scale.sources import find_parts, runs_of
from debiformer.scale.storage import Output, PartFile, Unreachable
from debiformer.scale.workers import Setting, Worker


def png(colour="red", size=(40, 40)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def make_shard(path, count):
    with tarfile.open(path, "w") as shard:
        for number in range(count):
            for suffix, content in (("png", png()), ("cls", b"0")):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


class TestParts:
    def test_a_folder_in_parts_of_a_size(self, tmp_path):
        for name in ("b/2.png", "a.jpg", "b/1.png", "c.jpeg", "notes.txt", ".hidden.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        parts = find_parts([str(tmp_path), f"{tmp_path}/a.jpg"], 3, "image")
        assert [part.number for part in parts] == [0, 1]
        assert [part.images for part in parts] == [3, 1]
        found = [file for part in parts for file in part.files]
        assert found == [str(tmp_path / name) for name in ("a.jpg", "b/1.png", "b/2.png", "c.jpeg")], "each once"

    @pytest.mark.parametrize(
        ("rows", "size", "expected"),
        [
            ([4, 4, 4], 5, [([0, 1], 0, 8), ([2], 8, 4)]),
            ([9, 1, 1, 1], 3, [([0], 0, 9), ([1, 2, 3], 9, 3)]),
            ([2], 100, [([0], 0, 2)]),
            ([], 100, []),
        ],
    )
    def test_row_groups_make_parts_of_at_least_a_size(self, rows, size, expected):
        assert list(runs_of(rows, size)) == expected

    def test_a_store_that_does_not_answer(self, tmp_path, monkeypatch):
        """With an error of its driver's own, that nobody else knows."""

        class EndpointConnectionError(Exception):
            pass

        def unplugged(*_):
            raise EndpointConnectionError("no route to host")

        monkeypatch.setattr(LocalFileSystem, "isdir", unplugged)
        with pytest.raises(Unreachable, match="photos cannot be reached: no route to host"):
            find_parts(["photos"], 9, "image")

    def test_brackets_in_a_name_are_no_pattern(self, tmp_path):
        (tmp_path / "a [red].png").touch()
        (part,) = find_parts([f"{tmp_path}/a [red].png"], 9, "image")
        assert part.files == [f"{tmp_path}/a [red].png"]


class TestReading:
    def test_a_shard_gives_its_images(self, tmp_path):
        (part,) = find_parts([str(make_shard(tmp_path / "a.tar", 3))], 2, "image")
        items = list(read(part, "image"))
        assert [item.name for item in items] == [f"{tmp_path}/a.tar#{number}.png" for number in range(3)]
        assert load(items[0]).getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("damage", ["in an image", "in a header", "between members", "garbage in a header", "no tar"])
    def test_what_comes_before_a_tear_is_kept(self, tmp_path, damage):
        """Each member takes two blocks of 512 bytes, so that image n begins at block 4 n."""
        file = make_shard(tmp_path / "a.tar", 5)
        content = file.read_bytes()
        ends = {"in an image": 8 * 512 + 520, "in a header": 8 * 512 + 100, "between members": 8 * 512}
        if damage in ends:
            file.write_bytes(content[: ends[damage]])
        else:
            at = 8 * 512 if damage == "garbage in a header" else 0
            file.write_bytes(content[:at] + b"\xaa" * 512 + content[at + 512 :])
        *whole, last = read(find_parts([str(file)], 9, "image")[0], "image")
        assert [item.name for item in whole] == [f"{file}#{number}.png" for number in range(0 if damage == "no tar" else 2)]
        assert all(item.error is None for item in whole)
        assert last.name == str(file)
        assert last.error.startswith("the shard is torn, or no tar, and what follows is not read: ")

    def test_rows_of_a_damaged_row_group_are_all_told(self, tmp_path):
        file = tmp_path / "a.parquet"
        noise = torch.randint(0, 256, (6, 3000), dtype=torch.uint8)
        images = [bytes(row.tolist()) for row in noise]
        pq.write_table(pa.table({"image": [*images[:5], None]}), file, row_group_size=2, compression="zstd", use_dictionary=False)
        content = bytearray(file.read_bytes())
        at = content.find(images[2][100:200])
        content[at - 200 : at] = bytes(200)
        file.write_bytes(content)
        parts = find_parts([str(file)], 2, "image")
        found = [item for part in parts for item in read(part, "image")]
        assert [item.name for item in found] == [f"{file}#{row}" for row in range(6)]
        assert [item.error is None for item in found] == [True, True, False, False, True, False]
        assert found[0].content == images[0]
        assert found[5].error == "the row holds no bytes"

    @pytest.mark.parametrize("error", [FSTimeoutError(), OSError(errno.ESTALE, "stale file handle")])
    def test_a_store_that_stops_answering_is_no_damage(self, tmp_path, monkeypatch, error):
        pq.write_table(pa.table({"image": [png()] * 3}), tmp_path / "a.parquet")
        (part,) = find_parts([str(tmp_path / "a.parquet")], 9, "image")

        def stops(*_):
            raise error
            yield

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", stops)
        with pytest.raises(Unreachable, match=r"a\.parquet cannot be read"):
            list(read(part, "image"))
        (tmp_path / "a.png").write_bytes(png())
        monkeypatch.setattr(LocalFileSystem, "cat_file", lambda *_: next(stops()))
        with pytest.raises(Unreachable, match=r"a\.png cannot be read"):
            load(Item(str(tmp_path / "a.png")))

    def test_files_that_cannot_be_images(self, tmp_path):
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(UnreadableImage, match="Is a directory"):
            load(Item(str(tmp_path / "folder.png")))
        with pytest.raises(UnreadableImage, match="no such file"):
            load(Item(str(tmp_path / "absent.png")))
        with pytest.raises(UnreadableImage, match=r"a\.jpg: not an image, or in a format that Pillow cannot read"):
            load(Item("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"))  # no program is started for it
        with pytest.raises(UnreadableImage, match=r"thin\.png: of 8001x40 pixels, one side over 200 times the other"):
            load(Item("thin.png", png(size=(8001, 40))))

    def test_no_more_is_begun_than_asked_for(self):
        drawn = []
        with ThreadPoolExecutor(2) as pool:
            made = ahead(pool, lambda n: n * n, (drawn.append(n) or n for n in range(100)), most=5)
            assert [next(made) for _ in range(10)] == [n * n for n in range(10)]
            assert len(drawn) == 15
            assert list(made) == [n * n for n in range(10, 100)]


class TestMemory:
    def test_the_peak_of_a_layer(self):
        """10 images of 3x8x8 through a layer of 3 to 50 channels make 10 maps of 50x8x8 floats, and one of booleans."""
        layer = torch.nn.Conv2d(3, 50, 1)
        with torch.inference_mode():
            found = peak(lambda images: layer(images) > 0, torch.randn(10, 3, 8, 8))
        assert found == pytest.approx(10 * 50 * 64 * (4 + 1), rel=1e-3)  # and a number or two

    @pytest.mark.parametrize(("memory", "images"), [(1000, 8), (875, 4), (249, 1), (10**9, 256)])
    def test_the_largest_batch_by_hand(self, memory, images):
        """Of 1000 bytes 800 are taken: 100 for one image and 100 for each other make 8. Of 875, 700, which hold 4 but not 8."""
        assert fitting(100, 100, memory, 256).images == images

    def test_memory_for_not_even_one(self):
        with pytest.raises(MemoryError, match="one image takes 900 MB, and 800 MB are free"):
            fitting(900_000_000, 1, 10**9, 8)

    def test_it_is_measured(self):
        layer = torch.nn.Conv2d(3, 1000, 1).requires_grad_(False)
        image = torch.randn(3, 8, 8)  # whose map takes 256 kB
        assert batch_size(layer, image, 2_000_000).images == 4
        assert batch_size(layer, image, 10**9).images == 8, "more are no faster"

    def test_workers_on_machines_of_several_sizes(self):
        small, large = dict(CPU=4.0, memory=8e9), dict(CPU=16.0, GPU=2.0, memory=64e9)
        assert arrange([small, large], "cpu", None) == Workers(20, 1, False, 2_000_000_000)
        assert arrange([small, large], "auto", None) == Workers(2, 8, True, 32_000_000_000)
        assert arrange([small, large], "cpu", 5) == Workers(5, 4, False, 8_000_000_000)
        assert arrange([small, small], "auto", 1) == Workers(1, 4, False, 8_000_000_000)


@pytest.fixture
def setting(tmp_path):
    """What a worker gets that predicts on this machine."""
    finder = Labels(random_task(input_size=(3, 32, 32)), 2, False)
    output = Output(str(tmp_path / "out"))
    output.begin({})
    return Setting(finder, schema_of(finder, {}), str(tmp_path / "out"), "image", "cpu", 1, 10**9, None)


class TestWorker:
    def test_too_large_a_batch_is_halved_from_then_on(self, setting, tmp_path, monkeypatch):
        sizes = []

        def short_of_memory(prepared, find=setting.finder.find):
            sizes.append(len(prepared))
            if len(prepared) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return find(prepared)

        for number in range(20):
            (tmp_path / f"{number:02}.png").write_bytes(png(size=(40, 40 + number)))
        (part,) = find_parts([f"{tmp_path}/*.png"], 99, "image")
        worker = Worker(setting)
        assert worker.images == 8
        worker(part._asdict())
        expected = pq.read_table(tmp_path / "out").to_pylist()
        monkeypatch.setattr(setting.finder, "find", short_of_memory)
        assert worker(part._asdict())["images"] == 20
        assert sizes == [8, 4, 2, 2, 4, 2, 2, 2, 2, 2, 2, 2, 2]
        found = pq.read_table(tmp_path / "out").to_pylist()
        assert [row["path"] for row in found] == part.files
        assert [row["probability"] for row in found] == pytest.approx([row["probability"] for row in expected], abs=1e-6)

    def test_a_model_that_fails_for_any_image_ends_the_run(self, setting, tmp_path):
        """Rather than call every image bad; an image that it alone cannot take is a row with the reason."""
        (tmp_path / "a.png").write_bytes(png(size=(40, 40)))
        (tmp_path / "b.png").write_bytes(png(size=(41, 41)))
        (part,) = find_parts([f"{tmp_path}/?.png"], 9, "image")

        class Sized:
            """One image at a time, as it is."""

            task, columns, together = setting.finder.task, setting.finder.columns, False
            fails = 41

            def prepare(self, image):
                return image

            def find(self, prepared):
                if self.fails in (prepared[0].width, "all"):
                    raise RuntimeError("the map is too small")
                return [{"label": "x"}]

        worker = Worker(setting._replace(finder=Sized()))
        assert worker(part._asdict())["errors"] == 1
        assert [row["error"] for row in pq.read_table(tmp_path / "out").to_pylist()] == [None, "the map is too small"]
        worker.finder.fails = "all"
        with pytest.raises(RuntimeError, match="the map is too small"):
            worker(part._asdict())

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory can be set back on Linux only")
    def test_memory_stays_flat(self, tmp_path):
        """Ten times the images, of a quarter of a megabyte each as the model takes them, take no more memory."""
        finder = Labels(random_task(input_size=(3, 144, 144)), 2, True)
        output = Output(str(tmp_path / "out"))
        output.begin({})
        worker = Worker(Setting(finder, schema_of(finder, {}), output.address, "image", "cpu", 1, 10**9, None))
        parts = find_parts([str(make_shard(tmp_path / f"{count}.tar", count)) for count in (60, 600)], 9, "image")
        peaks = []
        for part in (parts[0], *parts):
            Path("/proc/self/clear_refs").write_text("5")
            assert worker(part._asdict())["problem"] is None
            peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000)
        assert peaks[2] < peaks[1] + 30

    def test_a_store_that_answers_later(self, setting, tmp_path, monkeypatch):
        """Every attempt begins the part again, and the last one leaves one file."""
        monkeypatch.setattr(workers, "PAUSES", (0, 0, 0))
        (tmp_path / "a.png").write_bytes(png())
        (tmp_path / "b.png").write_bytes(png())
        (part,) = find_parts([f"{tmp_path}/?.png"], 9, "image")
        left = 2
        fetch, lock = reading.fetch, threading.Lock()

        def moody(name):
            nonlocal left
            with lock:
                left -= name.endswith("b.png")
                if name.endswith("b.png") and left >= 0:
                    raise Unreachable("no answer")
            return fetch(name)

        monkeypatch.setattr(reading, "fetch", moody)
        report = Worker(setting)(part._asdict())
        assert (report["images"], report["errors"], report["problem"]) == (2, 0, None)
        left = 99
        assert Worker(setting)(part._asdict())["problem"] == "no answer (3 attempts)"
        assert [file.name for file in (tmp_path / "out").iterdir() if file.name != "_run.json"] == ["part-00000000.parquet"]

    def test_a_part_that_fails_leaves_what_was_there(self, setting):
        output = Output(setting.output)
        with PartFile(output, 7, setting.schema) as file:
            file.write([{"path": "whole"}])
        file = PartFile(output, 7, setting.schema).__enter__()
        file.write([{"path": "half"}])
        file.__exit__(RuntimeError)
        assert output.finished() == {7}
        assert pq.read_table(setting.output)["path"].to_pylist() == ["whole"]

    def test_a_file_system_that_only_renames_at_once(self, setting, monkeypatch):
        """As SFTP does: the file comes under another name, and then gets its own."""
        moves = []

        class Remote(LocalFileSystem):
            protocol = "remote"

            def mv(self, source, target, **options):
                moves.append((source, target))
                super().mv(source, target, **options)

        output = Output(setting.output)
        output.fs = Remote()
        monkeypatch.setattr("debiformer.scale.storage.is_local", lambda fs: False)
        with PartFile(output, 3, setting.schema) as file:
            file.write([{"path": "a"}])
        ((beside, place),) = moves
        assert place.endswith("out/part-00000003.parquet")
        assert "/out/_part-00000003-" in beside
        assert output.finished() == {3}


class TestMistakes:
    @pytest.fixture(scope="class")
    def work(self, tmp_path_factory):
        work = tmp_path_factory.mktemp("work")
        save(random_task(input_size=(3, 32, 32)), work / "a.ckpt")
        (work / "photos").mkdir()
        (work / "photos/a.png").write_bytes(png())
        (work / "empty").mkdir()
        (work / "mixed").mkdir()
        (work / "mixed/a.png").write_bytes(png())
        make_shard(work / "mixed/a.tar", 1)
        pq.write_table(pa.table({"imag": [b""], "number": [1]}), work / "a.parquet")
        (work / "torn.parquet").write_bytes((work / "a.parquet").read_bytes()[:-10])
        (work / "thesis").mkdir()
        (work / "thesis/chapter.tex").touch()
        return work

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["absent"], "no such file or folder, and nothing of that pattern: absent"),
            (["photos/*.gif"], "nothing of that pattern: photos/*.gif"),
            (["empty"], "no images in empty: looked for files named *.bmp"),
            (["mixed"], "mixed holds 1 images and 1 tar shards: say which, with a pattern such as mixed/**/*.jpg"),
            (["a.parquet"], "a.parquet has no column 'image': did you mean imag?; --column names the one with the images"),
            (["a.parquet", "--column", "number"], "the column 'number' holds int64, not the bytes of images"),
            (["torn.parquet"], "torn.parquet is no Parquet file, or cut short"),
            (["s3://bucket/folder"], "s3://bucket/folder: Install s3fs"),
            (["nowhere://folder"], "nowhere://folder: Protocol not known: nowhere"),
            (["photos", "--output", "thesis"], "/thesis holds something else, it has no _run.json: name another folder"),
            (["photos", "--output", "/proc/out"], "--output /proc/out cannot be written"),
            (["photos", "--address", "localhost:1"], "--address localhost:1: no cluster answers there"),
            (["photos", "--checkpoint", "absent.ckpt"], "checkpoint absent.ckpt: no such file"),
        ],
    )
    def test_they_are_named_before_any_work(self, work, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(work)
        monkeypatch.setitem(sys.modules, "s3fs", None)
        line = ["predict", "--engine", "ray", "--checkpoint", "a.ckpt", "--output", str(tmp_path / "out"), *arguments]
        assert main(line) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.rglob("*.parquet"))

    def test_a_file_is_no_folder(self, capsys):
        with pytest.raises(SystemExit):
            scaling.parse("classification", ["--checkpoint", "a.ckpt", "photos", "--output", "labels.csv"])
        assert "--output labels.csv: a folder of Parquet files is written, name one" in capsys.readouterr().err

    def test_a_run_goes_on_with_what_it_began_with(self, work, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(work)
        output = Output(str(tmp_path / "out"))
        output.begin({"topk": 3, "parts": 1})
        output.begin({"topk": 3, "parts": 1})
        (tmp_path / "cut").mkdir()
        (tmp_path / "cut/_run.json.unfinished").write_text('{"topk"')  # of one that ended as it began
        Output(str(tmp_path / "cut")).begin({"topk": 3})
        assert [file.name for file in (tmp_path / "cut").iterdir()] == ["_run.json"]
        with pytest.raises(
            ValueError, match=r"holds a run with other settings: topk was 3 and is 1\. Go on with what it was, or name another"
        ):
            output.begin({"topk": 1, "parts": 1})
        line = ["predict", "--engine", "ray", "--checkpoint", "a.ckpt", "--output", str(tmp_path / "out"), "photos"]
        assert main(line) == 2
        assert "holds a run with other settings: task was None and is classification" in capsys.readouterr().err

    def test_a_missing_engine_is_named(self, work, monkeypatch, capsys):
        monkeypatch.chdir(work)
        monkeypatch.setattr("debiformer.cli.find_spec", lambda module: None if module == "ray" else object())
        assert main(["predict", "--engine", "ray", "--checkpoint", "a.ckpt", "photos", "--output", "out"]) == 2
        assert 'debiformer predict --engine ray needs ray: pip install "debiformer[train,scale]"' in capsys.readouterr().err
