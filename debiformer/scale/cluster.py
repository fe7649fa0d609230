"""Parts spread over the workers of a Ray cluster by Ray Data, in which a row is a part: it is done as a whole or not at all."""

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any, NamedTuple

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read on import: nothing is told to anyone
import ray
import ray.data

from .sources import Part
from .workers import Report, Setting, Worker

STORE = 2**30  # bytes of the object store of a cluster of our own, which holds the model and lists of files, but no images
PATIENCE = 10  # seconds for a cluster to answer
ATTEMPTS = 3  # at a part whose worker died: it may be the part that kills it


class Workers(NamedTuple):
    """How many workers there are, and what each may use."""

    number: int
    cpus: int
    gpu: bool
    memory: int  # bytes, of a share of its machine's


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Join a cluster, or begin one on this machine and end it.

    Raises:
        ConnectionError: If there is no cluster at the address.
    """
    quiet: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.ERROR)
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, object_store_memory=STORE, **quiet)
        else:
            if address != "auto":  # Ray itself would wait for minutes, and then end the process
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), PATIENCE).close()
            ray.init(address=address, **quiet)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        where = f"--address {address}: no cluster answers there" if address else "Ray does not begin on this machine"
        raise ConnectionError(f"{where} ({reason})") from error
    try:
        yield
    finally:
        ray.shutdown()


def arrange(nodes: Sequence[dict[str, float]], device: str, number: int | None) -> Workers:
    """Workers for the machines of a cluster, with as many CPUs each as leave room for all.

    Args:
        nodes: What each machine has, as Ray counts it: CPU, GPU and memory.
        device: auto, cpu or cuda.
        number: Of workers; None for one on each GPU, or on each CPU where there are none.

    Raises:
        ValueError: If there is no GPU, or no room for so many.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: the cluster has no GPU")
    gpu = device == "cuda" or (device == "auto" and gpus > 0)

    def on(node: dict[str, float], cpus: int) -> int:
        return int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpu else inf))

    room = sum(on(node, 1) for node in nodes)
    if not room:
        raise ValueError("the cluster has no CPU for a worker: give its machines some, with `ray start --num-cpus`")
    number = number or room
    if number > room:
        raise ValueError(f"--actors {number}: the cluster has room for {room}")
    cpus = max(cpus for cpus in range(1, int(max(node.get("CPU", 0) for node in nodes)) + 1) if sum(on(n, cpus) for n in nodes) >= number)
    memory = min(node["memory"] / on(node, cpus) for node in nodes if on(node, cpus))
    return Workers(number, cpus, gpu, int(memory))


def machines() -> list[dict[str, float]]:
    """What each machine of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def predict_parts(parts: Sequence[Part], setting: Setting, workers: Workers) -> Iterator[Report]:
    """Have parts predicted, and report each as it is done.

    Raises:
        OSError: If something could not be read or written, in several attempts.
        RuntimeError: If workers die.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would tell is told here
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = ray.data.from_items([part._asdict() for part in parts], override_num_blocks=len(parts))
    pool = ray.data.ActorPoolStrategy(size=workers.number, max_tasks_in_flight_per_actor=1)
    work: Any = Worker
    uses: Any = dict(compute=pool, num_cpus=workers.cpus, num_gpus=int(workers.gpu), max_task_retries=ATTEMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # until Ray 2.64, which has to offer another limit to attempts
        done = rows.map(work, fn_constructor_args=(setting,), **uses)
    try:
        for row in done.iter_rows():
            report = Report(**row)
            if report.problem is not None:
                raise OSError(report.problem)
            yield report
    except ray.exceptions.RayActorError as error:
        told = f"a worker died at its start, or {ATTEMPTS + 1} times over one part; fewer --actors have more memory each"
        raise RuntimeError(f"{told}: {str(error).strip().splitlines()[-1]}") from error
