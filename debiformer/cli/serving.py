"""Command serve: a classifier behind HTTP. Uvicorn listens and drains, Starlette routes and limits, prometheus_client keeps count."""

import argparse
import asyncio
import io
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import prometheus_client as prometheus
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from ..data.images import FORMATS, UnreadableImage, decode_image, eval_transform
from ..tasks.prediction import PREPROCESSING, guess, load_classifier
from .arguments import at_least_one, port
from .labelling import device

SECONDS = prometheus.Histogram("debiformer_request_seconds", "From the head of a request to /predict to its answer", ["status"])
BATCHES = prometheus.Histogram("debiformer_batch_images", "Images that the model saw together", buckets=(1, 2, 4, 8, 16, 32, 64))


def run(arguments: list[str]) -> int:
    """Serve until SIGTERM or SIGINT; raises what `load_classifier` raises."""
    parser = argparse.ArgumentParser(prog="debiformer serve", description="Label images: POST /predict. Also: GET /health, GET /metrics.")
    parser.add_argument("checkpoint", help="best.ckpt or last.ckpt of a run, a shared folder, or hf-hub:OWNER/NAME")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default 127.0.0.1)")
    parser.add_argument("--port", default=8000, type=port, help="0 for any that is free (default 8000)")
    parser.add_argument("--topk", default=3, type=at_least_one, help="labels per image, the likeliest first (default 3)")
    parser.add_argument("--batch-size", default=8, type=at_least_one, help="most images that the model sees together (default 8)")
    parser.add_argument("--at-once", default=64, type=at_least_one, help="requests at a time; more are refused (default 64)")
    parser.add_argument("--timeout", default=30, type=at_least_one, help="seconds that a request may take (default 30)")
    parser.add_argument("--max-bytes", default=20_000_000, type=at_least_one, help="of a request's body (default 20000000)")
    parser.add_argument("--device", default="auto", type=device, help="cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    options = parser.parse_args(arguments)
    Image.MAX_IMAGE_PIXELS = 25_000_000  # a small file may unfold to any number; Pillow refuses twice as many
    metrics = Route("/metrics", lambda _: Response(prometheus.generate_latest(), media_type=prometheus.CONTENT_TYPE_LATEST))
    routes = [Route("/predict", Service(options).answer, methods=["POST"]), Route("/health", lambda _: Response("ok")), metrics]
    app = Starlette(routes=routes, max_body_size=options.max_bytes)
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=options.timeout)
    return 0


class Service:
    """A model, and the images that wait for it: those that come while it sees to a batch are the next one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.most, self.task = options, options.batch_size, load_classifier(options.checkpoint, options.device)
        self.transform = eval_transform(**{name: self.task.hparams[name] for name in PREPROCESSING})
        self.model, self.places, self.waiting = ThreadPoolExecutor(1), asyncio.Semaphore(options.at_once), asyncio.Queue[tuple]()
        self.worker: asyncio.Task | None = None

    async def answer(self, request: Request) -> Response:
        """Labels of the image that is a request's body; or a status from 400 up, and the reason."""
        begin, status, found = time.perf_counter(), 408, f"no whole body within {self.options.timeout} seconds"
        self.worker = self.worker or asyncio.create_task(self.work())
        try:
            if self.places.locked():
                raise HTTPException(503, f"{self.options.at_once} requests are being answered: try again")
            async with self.places, asyncio.timeout(self.options.timeout):
                body = await request.body()
                status, found = 504, f"no answer within {self.options.timeout} seconds"
                pixels = await asyncio.to_thread(lambda: self.transform(decode_image(io.BytesIO(body), "body", FORMATS)))
                self.waiting.put_nowait((pixels, labels := asyncio.get_running_loop().create_future()))
                status, found = await labels
        except (HTTPException, UnreadableImage, ClientDisconnect) as error:
            status, found = getattr(error, "status_code", 400), getattr(error, "detail", str(error))
        except TimeoutError:
            pass  # said above
        SECONDS.labels(status).observe(time.perf_counter() - begin)
        return JSONResponse({"predictions" if status == 200 else "error": found}, status)

    async def work(self) -> None:
        """See to all that waits, at most so many at a time."""
        while True:
            batch = [await self.waiting.get(), *(self.waiting.get_nowait() for _ in range(min(self.waiting.qsize(), self.most - 1)))]
            if not (batch := [waiting for waiting in batch if not waiting[1].done()]):  # the time of others is up
                continue
            BATCHES.observe(len(batch))
            found = await asyncio.get_running_loop().run_in_executor(self.model, self.label, [pixels for pixels, _ in batch])
            for (_, labels), result in zip(batch, found, strict=True):
                labels.done() or labels.set_result(result)

    @torch.inference_mode()
    def label(self, images: list[Tensor]) -> list[tuple[int, object]]:
        """Status 200 and labels for each image; 500 for all where the model fails, which the log then tells."""
        try:
            found = guess(self.task(torch.stack(images).to(self.task.device)), self.task.hparams["class_names"], self.options.topk)
            return [(200, [label._asdict() for label in labels]) for labels in found]
        except Exception:
            logging.getLogger("uvicorn.error").exception("the model failed")
            return [(500, "the model failed")] * len(images)
