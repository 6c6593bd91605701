"""The "cudagraph" runtime: a whole run of compiled regions recorded once a bucket, and replayed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dsd_fast.unet.adapters import version
from dsd_fast.unet.inductor import Inductor, settings
from dsd_fast.unet.output import Output
from dsd_fast.unet.request import Request
from dsd_fast.unet.weights import Weights

if TYPE_CHECKING:
    from dsd_fast.unet.plan import Plan
    from dsd_fast.unet.text import TextKV

# The first run compiles; the others let libraries choose their algorithms and allocate their workspaces.
WARM_UPS = 3


class Recorder(Protocol):
    """Records work on a device, to be done again without Python."""

    def record(self, work: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
        """What does the work again, and the tensors it writes each time."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Inside the ``with`` block this recorder's memory belongs to the current stream alone."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory.

    What lives inside a run lies at the same addresses in all of them, so no two may run at once: each turn waits for
    the one before, whatever stream it was on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self, work: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            output = work()
        current.wait_stream(side)
        return graph.replay, output

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                self._done.record()


@dataclass
class Recording:
    """A run at fixed addresses.

    Attributes:
        inputs: what it reads, of a bucket's size.
        replay: does it again.
        output: what it writes.
    """

    inputs: Request
    replay: Callable[[], None]
    output: Output
    _text: Callable[[], TextKV | None] = field(default=lambda: None, repr=False)
    _versions: list[tuple[int, int]] = field(default_factory=list, repr=False)

    def load(self, request: Request) -> None:
        """Put a request's tensors where the run reads them; its texts only if they are not there since the last."""
        for target, value in zip(self.inputs.tensors(), request.tensors(), strict=True):
            _fill(target, value)
        if request.text is None or self.inputs.text is None:
            return
        versions = [version(value) for value in request.text.tensors()]
        if self._text() is request.text and self._versions == versions:
            return
        for target, value in zip(self.inputs.text.tensors(), request.text.tensors(), strict=True):
            _fill(target, value)
        self._text, self._versions = weakref.ref(request.text), versions


class CudaGraph:
    """Replays a plan's runs, one recording for each bucket.

    Arguments are copied to where the recording reads them, the keys and values of texts only when they are others
    than before; answers are copied out. Weights are read where they lie, so that a change in place is seen; a weight
    at another address or another state of the adapters drops all recordings. Where gradients are wanted the compiled
    regions run without a recording.
    """

    def __init__(self, plan: Plan, inductor: Inductor, recorder: Recorder) -> None:
        self._weights = Weights(plan.program.unet)
        self._inductor = inductor
        self._recorder = recorder
        self._recordings: dict[Hashable, Recording] = {}
        self._state: Hashable = None

    def run(self, plan: Plan, request: Request, out: Output | None) -> Output:
        """The answer to ``request``, in ``out`` or in fresh tensors."""
        state = self._weights.signature()
        if torch.is_grad_enabled() and (self._weights.trained() or request.requires_grad):
            return self._inductor.run(plan, request, out)
        if state != self._state:
            self._recordings.clear()
            self._state = state
        # Tensors made in inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad(), self._recorder.turn():
            key = (request.key, settings())
            recording = self._recordings.get(key)
            if recording is None:
                recording = self._recordings[key] = self._record(plan, request)
            recording.load(request)
            recording.replay()
            answer = recording.output.cut(request.rows)
            return answer.clone() if out is None else answer.into(out)

    def _record(self, plan: Plan, request: Request) -> Recording:
        inputs = request.padded().cloned()
        replay, output = self._recorder.record(lambda: self._inductor.compute(plan, inputs))
        return Recording(inputs, replay, output)


def _fill(target: Tensor, value: Tensor) -> None:
    count = len(value)
    target[:count].copy_(value)
    if count < len(target):
        target[count:].copy_(value[:1].expand_as(target[count:]))
