"""The partitions of a job by Ray Data, on one machine or on a cluster's.

Ray's dataset holds numbers of partitions, and only sums come back: what a partition makes goes into the job's folder,
never into the object store. Nothing here knows what a partition makes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from dsd_fast.jobs.errors import JobError, LockedError, ManifestError

Progress = Callable[[int], None]
Task = Callable[[int, int, Progress], Mapping[str, float]]

_MAKE_BYTES = 1 << 20
_STORE_BYTES = 128 << 20
_DEATHS, _LOST = 3, "lost"
# The lock of a process that died is free at once on a local disk, and on NFS when its client's lease has ended.
_PATIENCE, _PATIENCE_AFTER_DEATH = 10.0, 150.0
_REPORT_SECONDS = 1.0

# What a user can cause comes back as a sentence; Ray would wrap it in its own stack.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (LockedError, ManifestError, JobError, ValueError, ImportError, OSError, MemoryError)
}


def run_on_ray(
    make: Callable[[], Task],
    *,
    partitions: int,
    workers: int,
    gpus_per_worker: float = 0,
    address: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Runs every partition of a job in one of several Ray actors, each of which takes one partition at a time.

    Partition p of P is ``Job(…, worker=p, workers=P)``: the rows are those that one process makes that runs the same
    partitions in turn. All nodes see the job's folder under the same path, on a file system with locks (flock) and
    atomic renaming. A partition whose actor died, in whatever way, is taken up again where it was, after its lock is
    free; the rows that the dead actor made then count among those done before.

    Args:
        make: called once in each actor, gives ``task(worker, workers, progress) → numbers``, of which sums mean
            something. It travels to the actors, so it is small: a function of a module, or a `functools.partial` of
            one with paths and settings. ``progress`` is called with the number of inputs that are dealt with.
        partitions: P, in which the job is divided.
        workers: actors at once. Each reserves one CPU.
        gpus_per_worker: GPUs that each reserves, and sees alone.
        address: of a cluster: "auto" or "host:port". None: Ray as the program has started it, else one on this machine
            that ends with the call.
        progress: called about each second with the number of inputs that all partitions have dealt with.

    Returns:
        The numbers of each partition, in their order.

    Raises:
        ValueError: an argument that does not fit; more actors than the cluster has room for, which would wait for ever;
            no cluster at the address; and what a task raises of the kind.
        JobError: what a task raises of the kind; a partition at which actors die again and again.
        OSError, ImportError, MemoryError: what a task raises of the kind; ImportError where Ray is not installed.
    """
    for name, value in (("partitions", partitions), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    if gpus_per_worker < 0:
        raise ValueError(f"gpus_per_worker: got {gpus_per_worker}, expected at least 0")
    try:
        # A private Ray, or a cluster's, reports nothing to anyone unless its owner says so.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("the engine ray needs Ray: pip install 'dsd-fast[ray]'") from error
    actors = min(workers, partitions)
    with _started(address, actors):
        _check_size(make)
        _check_room(actors, gpus_per_worker)
        tally = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Tally).remote()
        numbers = [{"partition": each} for each in range(partitions)]
        done = ray.data.from_items(numbers, override_num_blocks=partitions).map_batches(
            _Worker,
            fn_constructor_kwargs={"make": make, "partitions": partitions, "tally": tally},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=gpus_per_worker or None,
        )
        done.context.enable_progress_bars = done.context.print_on_execution_start = False
        found: dict[int, dict[str, float]] = {}
        lost: list[str] = []
        with _shown(tally, progress, actors, gpus_per_worker):
            for row in done.iter_rows():
                if row["error"] == _LOST:
                    lost.append(str(row["partition"]))
                elif row["error"]:
                    raise _KINDS[row["error"]](row["content"])
                else:
                    found[row["partition"]] = json.loads(row["content"])
    if lost:
        raise JobError(
            f"partitions {', '.join(lost)} of {partitions} are not made: {_DEATHS} actors died at each, "
            "as they do without memory; the others are made, and the same command goes on"
        )
    return [found[each] for each in range(partitions)]


class _Worker:
    """An actor: takes a partition at a time, and gives its numbers, or what it raised, in words."""

    def __init__(self, make: Callable[[], Task], partitions: int, tally: Any) -> None:
        self.make, self.partitions, self.tally = make, partitions, tally
        self.task: Task | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        import ray

        partition = int(batch["partition"][0])
        deaths = ray.get(self.tally.begin.remote(partition)) - 1
        error, content = "", ""
        if deaths >= _DEATHS:
            error = _LOST
        else:
            try:
                content = json.dumps(self.run(partition, _PATIENCE_AFTER_DEATH if deaths else _PATIENCE))
            except tuple(_KINDS.values()) as raised:
                error = next(name for name, kind in _KINDS.items() if isinstance(raised, kind))
                content = str(raised)
        return {"partition": [partition], "error": [error], "content": [content]}

    def run(self, partition: int, patience: float) -> dict[str, float]:
        """Runs the task, which may wait so many seconds for the lock of one that has died."""
        if self.task is None:
            # Not in the constructor, in which an error is the end of the actor, and another one begins.
            self.task = self.make()
        told, known = -math.inf, 0

        def progress(done: int) -> None:
            nonlocal told, known
            known = done
            if time.monotonic() - told >= _REPORT_SECONDS:
                told = time.monotonic()
                self.tally.advance.remote(partition, done)

        end = time.monotonic() + patience
        while True:
            try:
                numbers = dict(self.task(partition, self.partitions, progress))
            except LockedError:
                if time.monotonic() > end:
                    raise
                time.sleep(_REPORT_SECONDS)
            else:
                self.tally.advance.remote(partition, known)
                return numbers


class _Tally:
    """What the actors have begun and done, in an actor of its own."""

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}
        self.done: dict[int, int] = {}

    def begin(self, partition: int) -> int:
        """Counts how often a partition is begun."""
        self.begun[partition] = self.begun.get(partition, 0) + 1
        return self.begun[partition]

    def advance(self, partition: int, done: int) -> None:
        """Notes how many inputs a partition has dealt with."""
        self.done[partition] = done

    def total(self) -> int:
        """Tells how many inputs all have dealt with."""
        return sum(self.done.values())


@contextmanager
def _started(address: str | None, actors: int) -> Iterator[None]:
    """Ray inside the block; what was not there before is not there after it."""
    import ray

    log = logging.getLogger("ray.data")
    level = log.level
    # Its progress and its reports would stand between those of the caller.
    log.setLevel(logging.CRITICAL)
    try:
        if ray.is_initialized():
            if address not in (None, "auto"):
                raise ValueError(f"address: got {address!r}, but Ray runs in this program, expected auto or none")
            yield
            return
        _start(address, actors)
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        log.setLevel(level)


def _start(address: str | None, actors: int) -> None:
    import ray

    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"address: no Ray cluster can be joined at {address!r}: {error}") from error
        return
    ray.init(
        address="local",
        # Logical ones: a small machine runs as many actors as it is asked for.
        num_cpus=max(actors + 1, os.cpu_count() or 1),
        # Numbers alone go through it.
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )


def _check_size(make: Callable[[], Task]) -> None:
    """Refuses what would travel to each actor again and again (ray-project/ray#53727)."""
    import ray.cloudpickle

    size = len(ray.cloudpickle.dumps(make))
    if size > _MAKE_BYTES:
        raise ValueError(
            f"make: takes {size:,} bytes to travel, expected at most {_MAKE_BYTES:,}: a function of a module that "
            "loads what it needs from paths, not a model or a list of inputs"
        )


def _check_room(actors: int, gpus: float) -> None:
    """Refuses more actors than there is room for; those that take all CPUs hang (ray-project/ray#44687)."""
    room, told = _room(gpus)
    if actors > room:
        raise ValueError(
            f"workers: got {actors}, each of 1 CPU and {gpus:g} GPUs, of which some would wait for ever; expected at "
            f"most {max(room, 0)}: {told}"
        )


def _room(gpus: float) -> tuple[int, str]:
    """How many actors the cluster can hold, and what it has, in words."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, all_gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    # An actor's GPUs are those of one node.
    fit = sum(int(min(node.get("CPU", 0), node.get("GPU", 0) / gpus if gpus else math.inf)) for node in nodes)
    told = f"Ray knows {cpus:g} CPUs, of which one stays free, and {all_gpus:g} GPUs, on {len(nodes)} nodes"
    return min(fit, int(cpus) - 1), told


@contextmanager
def _shown(tally: Any, progress: Progress | None, actors: int, gpus: float) -> Iterator[None]:
    """Inside the block, tells the caller how far all partitions are, and what they wait for where nodes were lost."""
    import ray

    ended = threading.Event()

    def watch() -> None:
        before = True
        # Ray's errors are told by what waits for the results.
        with suppress(ray.exceptions.RayError):
            while not ended.wait(_REPORT_SECONDS):
                if progress is not None:
                    progress(ray.get(tally.total.remote()))
                room, told = _room(gpus)
                if before and room < actors:
                    warnings.warn(f"{actors - room} of {actors} workers wait for room: {told}", stacklevel=2)
                before = room >= actors

    thread = threading.Thread(target=watch, name="dsd-ray-progress", daemon=True)
    thread.start()
    try:
        yield
        if progress is not None:
            ended.set()
            thread.join()
            progress(ray.get(tally.total.remote()))
    finally:
        ended.set()
        thread.join()
