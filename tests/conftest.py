"""What holds for every test: no network, no unwritten memory, one thread, no test beside one that runs alone, and a
count of what a machine without a GPU left out."""

from __future__ import annotations

import fcntl
import functools
import gc
import ipaddress
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

# Before anything imports huggingface_hub, which reads it once; processes started by tests inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
# Small tensors gain nothing from a second thread, and threads that wait for a busy core cost much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:
    pass
else:
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("repeatable")

NO_GPU = "no CUDA device"
# Stands in a report: under pytest-xdist the process that sums up sees no test, only what workers report.
GPU_TEST = ("needs", "gpu")


class NetworkBlockedError(RuntimeError):
    """A test reached for the network. Not an OSError, which libraries take for a failed connection and hide."""


def pytest_configure(config: pytest.Config) -> None:
    block_network()
    poison_empty_tensors()
    # A shell starts background jobs with Ctrl-C ignored, and processes inherit that; some tests interrupt themselves.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # These must run under an interpreter that lacks what the other tests and their conftests import.
    marker = config.option.markexpr.partition(" ")[0]
    if marker not in ("gpu", "newest") or not collection_path.is_relative_to(config.rootpath):
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return not any(file.match("test_*.py") and f"mark.{marker}" in file.read_text() for file in files) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.user_properties.append(GPU_TEST)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=NO_GPU))
    if hasattr(config, "workerinput"):
        # One after another: each time that the other workers wait they also wait for the longest of what they began.
        items.sort(key=lambda item: item.get_closest_marker("alone") is None)


def pytest_collection_finish() -> None:
    # What was imported and collected stays, and need not be looked through whenever garbage is collected.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    # Bindings that count what they gave away report at exit what was not collected.
    gc.unfreeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    # Outside of pytest-timeout's clock.
    if not hasattr(item.config, "workerinput"):
        return (yield)
    with turn(Path(item.config.option.basetemp).parent, alone=item.get_closest_marker("alone") is not None):
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A green run on a CPU must not be taken for a proof about GPUs."""
    reports = terminalreporter.stats.get("skipped", [])
    skipped = Counter(_reason(report) for report in reports if GPU_TEST in getattr(report, "user_properties", ()))
    for reason, count in skipped.items():
        terminalreporter.write_line(f"{count} GPU tests skipped: {reason}", yellow=True)
    if not skipped:
        terminalreporter.write_line("0 GPU tests skipped")
    for report in reports:
        # A module that skips itself as a whole, of which only the name is known.
        if isinstance(report, pytest.CollectReport) and "mark.gpu" in (config.rootpath / report.nodeid).read_text():
            terminalreporter.write_line(f"all GPU tests of {report.nodeid} skipped: {_reason(report)}", yellow=True)


@contextmanager
def turn(folder: Path, *, alone: bool) -> Generator[None]:
    """Lets a worker's test run beside those of the others, or alone; ``folder`` is one that the workers share.

    All come in through a gate. Who wants to be alone stays in it until the others have gone, so that none overtakes.
    """
    with open(folder / "gate", "w") as gate, open(folder / "room", "w") as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Closing would not do: processes that the test forked may hold the file open.
            fcntl.flock(room, fcntl.LOCK_UN)


def block_network() -> None:
    """Lets Python's sockets reach this machine alone; an audit hook stays whatever else patches `socket`."""

    def refuse_other_machines(event: str, args: tuple) -> None:
        if event in ("socket.connect", "socket.sendto") and args[0].family in (socket.AF_INET, socket.AF_INET6):
            host = args[1][0]
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host = args[0]
        else:
            return
        if host is not None and not _is_loopback(host):
            raise NetworkBlockedError(f"{event} of {host!r}: tests do not use the network")

    sys.addaudithook(refuse_other_machines)


def poison_empty_tensors() -> None:
    """Fills what the package allocates without writing: NaN, or the largest integer.

    An operator that leaves part of its output unwritten then fails at once, instead of when fresh memory happens
    not to hold the zeros or the previous result.
    """

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(allocate)
        def allocate_and_fill(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if torch.compiler.is_compiling():
                return tensor
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith(("dsd_fast.", "kernels.")) or tensor.dtype == torch.bool:
                return tensor
            floating = tensor.is_floating_point() or tensor.is_complex()
            with torch.no_grad():
                return tensor.fill_(float("nan") if floating else torch.iinfo(tensor.dtype).max)

        return allocate_and_fill

    # A device's context tells what to place on it by the functions that there are when it is first used.
    with torch.device("meta"):
        torch.empty(0)
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            setattr(owner, name, poisoned(getattr(owner, name)))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return report.longrepr[2].removeprefix("Skipped: ")


def _is_loopback(host: str | bytes) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
