"""The runtimes that a plan can be compiled for, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from dsd_fast.unet.cudagraph import CudaGraph, CudaRecorder
from dsd_fast.unet.output import Output
from dsd_fast.unet.request import Request

if TYPE_CHECKING:
    from dsd_fast.unet.plan import Plan
    from dsd_fast.unet.text import TextKV

RUNTIMES = ("inductor", "cudagraph")


class Runtime(Protocol):
    """Answers requests; see :meth:`Plan.compile`."""

    def run(self, plan: Plan, request: Request, out: Output | None) -> Output: ...

    def held(self, text: TextKV) -> int:
        """Bytes that runs with ``text``, of the plan's layers alone, keep beside it."""
        ...


def make_runtime(plan: Plan, name: str) -> Runtime:
    """A runtime for ``plan``.

    Raises:
        ValueError: an unknown name; a device that the runtime does not run on.
    """
    program = plan.program
    if name == "inductor":
        return program.inductor
    if name == "cudagraph":
        if program.device.type != "cuda":
            raise ValueError(f"runtime: 'cudagraph' needs a network on a CUDA device, this one is on {program.device}")
        return CudaGraph(plan, program.inductor, CudaRecorder(program.device))
    raise ValueError(f"runtime: got {name!r}, expected {' or '.join(map(repr, RUNTIMES))}")
