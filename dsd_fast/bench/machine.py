"""Where and by what a record was made: device, versions, commit. Neither names of hosts nor paths."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dsd_fast import __version__
from dsd_fast.bench.checkout import ROOT
from dsd_fast.models.mini import path

_DRIVER = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]

# Records themselves are not part of what was measured.
_STATUS = ["status", "--porcelain", "--", ".", ":(exclude)benchmarks/results"]


def describe(device: str) -> dict[str, Any]:
    """Device, threads and load, the keys of a record's ``machine``."""
    place = torch.device(device)
    cuda = place.type == "cuda"
    return {
        "kind": place.type,
        "name": torch.cuda.get_device_name(place) if cuda else cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "driver": _run(_DRIVER) if cuda else None,
        "load": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str | None]:
    """Of Python, of this package, of what it computes with (None for what is not installed), and of the weights of the
    embedded model."""
    found: dict[str, str | None] = {"python": platform.python_version(), "dsd_fast": __version__}
    for name in ("torch", "triton", "diffusers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    # The distribution's metadata lacks the build (+cpu, +cu130) where an index renames it.
    found["torch"] = str(torch.__version__)
    found["mini"] = mini_digest()
    return found


@cache
def mini_digest() -> str:
    """Eight hexadecimal digits that tell one set of the embedded model's weights from another.

    The ControlNet and the LoRA beside it change none of its own figures.
    """
    digest = hashlib.sha256()
    for file in sorted(path().rglob("*.safetensors")):
        if file.relative_to(path()).parts[0] not in ("controlnet", "lora"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def environment() -> str:
    """The environment variables that change how this package computes, "NAME=value" with spaces between."""
    return " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("DSD_FAST_"))


def commit() -> tuple[str | None, bool | None]:
    """The commit of the source tree that runs and whether it has changes; (None, None) outside a repository."""
    if not (ROOT / ".git").exists():
        return None, None
    head, status = _run(["git", "-C", str(ROOT), "rev-parse", "HEAD"]), _run(["git", "-C", str(ROOT), *_STATUS])
    return (None, None) if head is None or status is None else (head, bool(status))


def now() -> str:
    """The time in UTC, to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def cpu_name() -> str:
    """The processor's model, as the system names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _run(command: list[str]) -> str | None:
    """What a command prints, or None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None
