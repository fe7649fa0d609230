"""A real server in a process of its own, whose model can be held up or broken by a file."""

import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tasks_on_disk import random_task, save

from debiformer.cli import main

LIMIT, AT_ONCE, SECONDS = 100_000, 6, 3
HELD = """
import sys, time
from pathlib import Path
from debiformer.cli import main, serving
guess = serving.guess
def held(*arguments):
    while Path("hold").exists():
        time.sleep(0.01)
    if Path("break").exists():
        raise RuntimeError("no memory")
    return guess(*arguments)
serving.guess = held
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def picture(seed, size=(48, 40), format="PNG"):
    """A file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), format)
    return file.getvalue()


@contextmanager
def serving(folder, *options):
    """A client of a server, and its process."""
    command = [
        sys.executable,
        "-c",
        HELD,
        "a.ckpt",
        "--port",
        "0",
        "--at-once",
        AT_ONCE,
        "--timeout",
        SECONDS,
        "--max-bytes",
        LIMIT,
        *options,
    ]
    with subprocess.Popen(list(map(str, command)), cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            address = next(found[0] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            with httpx.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor() as reader:
                process.log = reader.submit(process.stderr.read)  # or it would stop when the pipe is full
                yield client, process
                process.terminate()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save(random_task(input_size=(3, 32, 32)), folder / "a.ckpt")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder) as (client, _):
        yield client


@pytest.fixture
def hold(folder):
    """Holds the model up until it is called."""
    file = folder / "hold"
    file.touch()
    yield file.unlink
    file.unlink(missing_ok=True)


def together(client, bodies):
    """Answers to requests that are sent at once, in the background."""
    pool = ThreadPoolExecutor(len(bodies))
    return [pool.submit(client.post, "/predict", content=body) for body in bodies]


def metrics(client):
    """Values by name and labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_answers_are_those_of_predict(server, folder, tmp_path, capsys):
    bodies = [picture(0), picture(1, (300, 200), "JPEG"), picture(2, (64, 64), "WEBP")]
    for index, body in enumerate(bodies):
        (tmp_path / f"{index}.png").write_bytes(body)
    assert main(["predict", "--checkpoint", str(folder / "a.ckpt"), str(tmp_path), "--output", str(tmp_path / "x.jsonl")]) == 0
    for body, line in zip(bodies, (tmp_path / "x.jsonl").read_text().splitlines(), strict=True):
        answer = server.post("/predict", content=body)
        assert answer.status_code == 200
        found, expected = answer.json()["predictions"], json.loads(line)["predictions"]
        assert [guess["label"] for guess in found] == [guess["label"] for guess in expected]
        assert [guess["probability"] for guess in found] == pytest.approx([guess["probability"] for guess in expected], rel=1e-5)


def test_what_waits_goes_through_the_model_together(server, hold):
    before = metrics(server)
    (first,) = together(server, [picture(0)])
    wait_for(lambda: metrics(server)["debiformer_batch_images_count",] > before["debiformer_batch_images_count",])
    others = together(server, [picture(seed) for seed in range(1, 5)])
    time.sleep(0.5)  # until they wait
    hold()
    answers = [future.result() for future in (first, *others)]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert len({answer.text for answer in answers}) == 5  # each its own
    after = metrics(server)
    grown = {name: after[name] - before[name] for name in (("debiformer_batch_images_count",), ("debiformer_batch_images_sum",))}
    assert [*grown.values()] == [2, 5]


def program():
    """PostScript, which Pillow has another program run."""
    Image.new("RGB", (48, 40)).save(file := io.BytesIO(), "EPS")
    return file.getvalue()


def strip():
    Image.new("L", (65_000, 1)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def bomb():
    Image.new("1", (8000, 8000)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "body: is empty"),
        (b'{"image": 1}', "body: not an image"),
        (picture(0, (200, 100), "JPEG")[:-2000], "image file is truncated"),
        (picture(0)[:-100], "broken|truncated|unrecognized"),
        (program(), "body: not an image"),
        (bomb(), "64000000 pixels. exceeds limit of 50000000"),
        (strip(), "of 65000x1 pixels, one side over 200 times the other"),
    ],
)
def test_a_bad_body_is_refused_with_a_reason(server, body, reason):
    answer = server.post("/predict", content=body)
    assert answer.status_code == 400
    assert re.search(reason, answer.json()["error"]), answer.text


@pytest.mark.parametrize("port", ["65536", "-1", "http"])
def test_a_port_that_is_none(port, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "absent.ckpt", f"--port={port}"])
    assert f"argument --port: '{port}' is not a port, from 0 to 65535" in capsys.readouterr().err


def test_a_form_is_no_image(server):
    assert server.post("/predict", files={"file": ("a.png", picture(0))}).status_code == 400


@pytest.mark.parametrize("body", [bytes(LIMIT + 1), [bytes(LIMIT), b"1"]], ids=["told", "in parts"])
def test_a_large_body_is_refused(server, body):
    answer = server.post("/predict", content=iter(body) if isinstance(body, list) else body)
    assert (answer.status_code, "Content Too Large" in answer.text) == (413, True)


def test_other_requests_are_refused(server):
    assert server.get("/predict").status_code == 405
    assert server.post("/elsewhere", content=picture(0)).status_code == 404


def test_time_is_limited(server, hold):
    begin = time.monotonic()
    answer = server.post("/predict", content=picture(0))
    assert (answer.status_code, answer.json()) == (504, {"error": f"no answer within {SECONDS} seconds"})
    assert SECONDS <= time.monotonic() - begin < SECONDS + 2
    together(server, [picture(seed) for seed in range(3)])[0].result()  # they wait behind the first, until their time is up
    time.sleep(0.5)
    before = metrics(server)
    hold()
    assert server.post("/predict", content=picture(0)).status_code == 200
    assert (
        metrics(server)["debiformer_batch_images_sum",] - before["debiformer_batch_images_sum",] == 1
    )  # what nobody waits for is not seen to


def test_a_body_that_does_not_come_is_not_waited_for(server):
    with socket.create_connection((server.base_url.host, server.base_url.port), timeout=30) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\nabc")
        said = b"".join(iter(lambda: connection.recv(1000), b""))
    assert said.startswith(b"HTTP/1.1 408 ")
    assert f"no whole body within {SECONDS} seconds".encode() in said


def test_more_requests_than_there_are_places_for_are_refused(server, hold):
    accepted = together(server, [picture(seed) for seed in range(AT_ONCE)])
    time.sleep(0.5)
    answer = server.post("/predict", content=picture(9))
    assert (answer.status_code, answer.json()) == (503, {"error": f"{AT_ONCE} requests are being answered: try again"})
    assert server.get("/health").status_code == 200
    hold()
    assert {future.result().status_code for future in accepted} == {200}


def test_a_model_that_fails_is_an_error_of_the_server(server, folder):
    (folder / "break").touch()
    answer = server.post("/predict", content=picture(0))
    (folder / "break").unlink()
    assert (answer.status_code, answer.json()) == (500, {"error": "the model failed"})
    assert server.post("/predict", content=picture(0)).status_code == 200


def test_metrics_count_requests_by_status(server):
    name = "debiformer_request_seconds_count"
    before = metrics(server)
    server.post("/predict", content=b"no image")
    server.post("/predict", content=picture(0))
    after = metrics(server)
    assert [after[name, status] - before.get((name, status), 0) for status in ("200", "400")] == [1, 1]


def test_accepted_requests_are_answered_before_the_end(folder, hold):
    with serving(folder, "--batch-size", 2) as (client, process):
        accepted = together(client, [picture(seed) for seed in range(5)])
        wait_for(lambda: metrics(client).get(("debiformer_batch_images_count",)) == 1)
        time.sleep(0.5)  # until the others wait
        process.terminate()
        time.sleep(0.5)
        with pytest.raises(httpx.ConnectError):
            httpx.post(f"{client.base_url}/predict", content=picture(0))
        hold()
        assert [future.result().status_code for future in accepted] == [200] * 5
        assert process.wait(30) == -signal.SIGTERM
        assert "Application shutdown complete" in process.log.result()


def test_what_cannot_be_served_is_told(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "absent.ckpt")]) == 2
    assert "absent.ckpt: no such file" in capsys.readouterr().err
