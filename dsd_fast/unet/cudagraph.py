"""The "cudagraph" runtime: a whole run of compiled regions recorded once a bucket, and replayed."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dsd_fast.unet.cut import Cut
from dsd_fast.unet.execution import run_compiled, run_padded
from dsd_fast.unet.inductor import settings
from dsd_fast.unet.output import Output
from dsd_fast.unet.request import Request, bucket
from dsd_fast.unet.text import TextKV

# The first run compiles; the others let libraries choose their algorithms and allocate their workspaces.
WARM_UPS = 3
# The last rows of a stream are replayed in a recording of at most so many times their bucket's, instead of compiled and
# recorded for themselves.
TAIL = 2


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

    The allocator gives a free block of a pool to the stream alone that had it first, so all are recorded on one stream,
    and warmed up there in the pool: together they take what the largest takes, if it comes first. What lives inside a
    run lies at the same addresses in all of them, so no two may run at once: each turn waits for the one before,
    whatever stream it was on.

    Attributes:
        index: of the device.
        held: bytes of the pool, which nothing but recordings gets.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._keeper: torch.cuda.CUDAGraph | None = None
        self.held = 0
        with torch.cuda.device(device):
            self.index = torch.cuda.current_device()
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        _recorders.add(self)

    def record(self, work: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            try:
                self._warm_up(work)
                graph = torch.cuda.CUDAGraph()
                with self._capturing(graph):
                    output = work()
            except RuntimeError as error:
                # Ending a capture that ran out of memory may fail in turn; callers go on with less if they know why.
                if isinstance(error.__context__, torch.OutOfMemoryError):
                    raise error.__context__ from None
                raise
            finally:
                # Else a later user of that stream would compute in a workspace inside the pool.
                torch._C._cuda_clearCublasWorkspaces()
                self.held += max(0, torch.cuda.memory_reserved() - before)
            current.wait_stream(self._stream)
        return graph.replay, output

    def _warm_up(self, work: Callable[[], Output]) -> None:
        if self._keeper is None:
            # The pool lives as long as a graph that was recorded in it, and must live to be allocated in.
            keeper = torch.cuda.CUDAGraph()
            with warnings.catch_warnings(record=True), self._capturing(keeper):
                pass
            self._keeper = keeper
        with torch.cuda.stream(self._stream):
            # As Inductor's own graphs do it.
            torch._C._cuda_beginAllocateCurrentThreadToPool(self.index, self._pool)
            try:
                for _ in range(WARM_UPS):
                    work()
            finally:
                torch._C._cuda_endAllocateToPool(self.index, self._pool)
                torch._C._cuda_releasePool(self.index, self._pool)
        # A workspace from outside the pool would be written to by replays after another had been given its memory.
        torch._C._cuda_clearCublasWorkspaces()

    def _capturing(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        # Other threads may go on with what would be refused inside a capture.
        return torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                self._done.record()


_recorders: weakref.WeakSet[CudaRecorder] = weakref.WeakSet()


def held_by_recordings(device: torch.device) -> int:
    """Count the bytes of a GPU that nothing but CUDA graphs recorded here gets."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(recorder.held for recorder in tuple(_recorders) if recorder.index == index)


class StaticText:
    """Texts at fixed addresses; recordings for as many texts read the same ones.

    Attributes:
        text: those texts.
    """

    def __init__(self, text: TextKV) -> None:
        self.text = text.copied(bucket(len(text)))
        self._loaded: Callable[[], TextKV | None] = _nothing
        self._versions: list[tuple[int, int]] | None = None

    def load(self, text: TextKV) -> None:
        """Copy ``text`` there, if it is another than the last or was written to."""
        versions = text.versions
        if versions is not None and self._loaded() is text and self._versions == versions:
            return
        # Until all are copied nothing counts as loaded: copying may be interrupted.
        self._loaded = _nothing
        for target, value in zip(self.text.tensors(), text.tensors(), strict=True):
            _fill(target, value)
        self._loaded, self._versions = weakref.ref(text), versions


@dataclass
class Recording:
    """A run at fixed addresses.

    Attributes:
        inputs: what it reads, of a bucket's size.
        text: the texts it reads, or None.
        replay: does it again.
        output: what it writes.
    """

    inputs: Request
    text: StaticText | None
    replay: Callable[[], None]
    output: Output

    def load(self, request: Request) -> None:
        """Put a request's tensors where the run reads them."""
        for target, value in zip(self.inputs.tensors(), request.tensors(), strict=True):
            _fill(target, value)
        if self.text is not None and request.text is not None:
            self.text.load(request.text)


class CudaGraph:
    """Replays a cut's runs, one recording for each bucket.

    Arguments are copied to where the recording reads them, the keys and values of texts only when they are others
    than before or were made in inference mode; answers are copied out. Weights are read where they lie, so that a
    change in place is seen; a weight at another address or another state of the adapters drops all recordings. Where
    gradients are wanted the compiled regions run without a recording. Host threads take turns.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._recordings: dict[tuple[tuple[Any, ...], Hashable], Recording] = {}
        self._texts: dict[Hashable, StaticText] = {}
        self._state: Hashable = None
        self._room = 0
        self._lock = threading.Lock()

    def run(self, cut: Cut, request: Request, out: Output | None) -> Output:
        weights = cut.network.weights
        state = weights.signature()
        if torch.is_grad_enabled() and (weights.trained() or request.requires_grad):
            return run_padded(cut, request, out)
        # Tensors made in inference mode could not be written to outside it.
        with self._lock, torch.inference_mode(False), torch.no_grad(), self._recorder.turn():
            if state != self._state:
                self._recordings.clear()
                self._texts.clear()
                self._state = state
            key = (request.key, settings())
            recording = self._recordings.get(key) or self._larger(key, request)
            if recording is None:
                recording = self._recordings[key] = self._record(cut, request)
            recording.load(request)
            recording.replay()
            answer = recording.output.cut(request.rows)
            return answer.clone() if out is None else answer.into(out)

    def held(self, text: TextKV) -> int:
        return text.nbytes * bucket(len(text)) // max(1, len(text))

    def room(self, available: int) -> int:
        # What recordings hold is there for their sizes alone: another one would be recorded beside them.
        if not self._recordings:
            self._room = available
        return self._room

    def _larger(self, key: tuple[tuple[Any, ...], Hashable], request: Request) -> Recording | None:
        """The recording that a stream's last rows are padded into rather than recorded: the smallest large enough."""
        if not request.last:
            return None
        (rows, latents, *kind), state = key
        fitting = [
            (recording.inputs.rows, recording)
            for (((known, count, *other), then), recording) in self._recordings.items()
            if (other, then) == (kind, state) and rows <= known <= TAIL * rows and latents <= count
        ]
        return min(fitting, key=lambda each: each[0])[1] if fitting else None

    def _record(self, cut: Cut, request: Request) -> Recording:
        text = None
        if request.text is not None:
            key = (request.text_key, settings())
            text = self._texts.get(key)
            if text is None:
                text = self._texts[key] = StaticText(request.text)
        own = request.with_text(None).padded().cloned()
        inputs = own.with_text(None if text is None else text.text)
        replay, output = self._recorder.record(lambda: run_compiled(cut, inputs))
        return Recording(inputs, text, replay, output)


def _nothing() -> None:
    return None


def _fill(target: Tensor, value: Tensor) -> None:
    count = len(value)
    target[:count].copy_(value)
    if count < len(target):
        target[count:].copy_(value[:1].expand_as(target[count:]))
