"""A driver of Triton for a GPU that is not there: kernels are specialised, cached and compiled as on one, but not run.

Triton's own JIT takes the tensors of a launch (on a CPU, or that only say they are elsewhere), chooses what to compile
by their types, alignment and sizes, and asks its driver for the rest. This one writes down what it is asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dsd_fast.kernels.common.resources import SHARED_LIMIT, usage

PROCESSORS = 132
"""Multiprocessors of an H200."""

GRID_LIMITS = (2**31 - 1, 65535, 65535)
THREADS = 1024

# A number of its own for each GPU: what Triton keeps for a device, it keeps for the process.
_numbers = itertools.count(1000)


@dataclass(frozen=True)
class Launched:
    """One launch: of which kernel, by name, with how many programs and warps, and bytes of shared memory."""

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    """What the JIT had to compile for a launch.

    Attributes:
        kernel: by name.
        seconds: it took, or with ``cached`` to find it in Triton's cache on disk.
        registers: of a thread.
        stack: bytes of a thread.
        shared: bytes of shared memory of a program.
    """

    kernel: str
    seconds: float
    cached: bool
    registers: int
    stack: int
    shared: int


@dataclass
class AbsentGpu:
    """What :func:`absent_gpu` gives: all launches and all compilations so far, in order."""

    launches: list[Launched] = field(default_factory=list)
    compilations: list[Compiled] = field(default_factory=list)


class _Driver:
    """What the JIT asks of a driver."""

    def __init__(self, gpu: AbsentGpu, capability: int) -> None:
        self.number = next(_numbers)
        self.target = GPUTarget("cuda", capability, 32)
        properties = {"max_shared_mem": SHARED_LIMIT[capability], "multiprocessor_count": PROCESSORS}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            # Module, function, registers, spills, and the most threads of a program.
            load_binary=lambda name, binary, shared, device: (object(), object(), 0, 0, THREADS),
        )

        def launcher(source, metadata):
            def launch(x, y, z, *_):
                assert all(0 < n <= limit for n, limit in zip((x, y, z), GRID_LIMITS, strict=True)), (x, y, z)
                gpu.launches.append(Launched(metadata.name, (x, y, z), metadata.num_warps, metadata.shared))

            return launch

        self.launcher_cls = launcher

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device=None):
        return 0


@contextmanager
def absent_gpu(capability: int = 90, cache: Path | None = None) -> Iterator[AbsentGpu]:
    """Launches of the block go to a GPU that is not there, and begin without anything compiled.

    Their results are memory that nobody wrote. A launch that no such GPU could take is an error, as on one.

    Args:
        capability: 80, 90 or 100.
        cache: folder of Triton's cache on disk instead of the usual one: an empty one makes every compilation real.
    """
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET is set: kernels are interpreted, nothing is compiled"
    gpu, before = AbsentGpu(), driver._active

    def compiled(*, src, metadata, metadata_group, times, cache_hit):
        name = metadata["name"] if isinstance(metadata, dict) else metadata.name
        registers, stack = usage(Path(metadata_group[f"{name}.cubin"]).read_bytes())
        shared = metadata["shared"] if isinstance(metadata, dict) else metadata.shared
        gpu.compilations.append(Compiled(name, times.total / 1e6, cache_hit, registers, stack, shared))

    with triton.knobs.compilation.scope(), triton.knobs.cache.scope():
        triton.knobs.compilation.listener = compiled
        if cache is not None:
            triton.knobs.cache.dir = str(cache)
        driver.set_active(_Driver(gpu, capability))
        try:
            yield gpu
        finally:
            driver._active = before
