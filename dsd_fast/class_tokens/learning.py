"""The loop that learns: classes side by side, each by its own updates, and a queue behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsd_fast.class_tokens.config import TokenConfig
from dsd_fast.class_tokens.optimiser import clipped, shortened, stepped
from dsd_fast.class_tokens.progress import Callback, ClassHistory, TokenUpdate
from dsd_fast.training import Loop

CHECKPOINT = "training.checkpoint"
"""Safetensors as others, under a name that nobody who reads a folder of tokens takes for one."""

# Of a norm that was shortened, how far rounding may leave it from the clamp.
_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class Losses:
    """What C classes lose, on the CPU.

    Attributes:
        losses: (C,).
        accuracies, probabilities: (C,), see :class:`~dsd_fast.class_tokens.progress.TokenUpdate`, or None.
        gradients: of each class's loss to its vectors, (C, v, E) for each text encoder.
    """

    losses: Tensor
    accuracies: Tensor | None
    probabilities: Tensor | None
    gradients: list[Tensor]

    def finite(self) -> list[bool]:
        """Tell of each class whether its loss and its gradient are finite."""
        told = [self.losses.isfinite(), *(each.flatten(1).isfinite().all(dim=1) for each in self.gradients)]
        return [bool(each) for each in torch.stack(told).all(dim=0)]

    def of(self, place: int) -> tuple[float, float | None, float | None]:
        """Loss, accuracy and probability of one of the classes."""
        accuracy, probability = (None if x is None else float(x[place]) for x in (self.accuracies, self.probabilities))
        return float(self.losses[place]), accuracy, probability


Compare = Callable[[Sequence[Tensor], int], Tensor]
"""Called with the vectors of all N classes, (N, v, E) for each text encoder, and how many classes may be computed
together; gives what each class loses by them, (N,) on the CPU, to be compared with what it loses by others."""
Differentiate = Callable[[Sequence[Tensor], Sequence[int], Sequence[int]], Losses]
"""Called with the vectors of all N classes, (N, v, E) for each text encoder, the numbers of the C classes that take
part, and how many updates each of these has had."""


class Learning(Loop):
    """N classes being learned.

    What becomes of a class depends on its own updates alone, whichever others run beside it.

    Args:
        names: of the classes.
        vectors: that they may begin with, (S, N, v, E) for each text encoder, on the CPU.
        norms: the vocabulary's mean norm, for each text encoder.
        differentiate: see :data:`Differentiate`.
        together: classes learned side by side where neither the settings nor the checkpoint say how many.
        config, callback: see :class:`~dsd_fast.class_tokens.ClassTokenLearner`.
        folder, fingerprint: see :class:`~dsd_fast.training.Loop`.
        compare: see :data:`Compare`; None where S is 1.

    Attributes:
        histories: of the classes.
    """

    def __init__(
        self,
        names: Sequence[str],
        vectors: Sequence[Tensor],
        norms: Sequence[float],
        differentiate: Differentiate,
        config: TokenConfig,
        together: int,
        callback: Callback | None,
        folder: Path | None,
        fingerprint: Mapping[str, Any],
        compare: Compare | None = None,
    ) -> None:
        super().__init__(folder, fingerprint, config.save_every, CHECKPOINT)
        self._names, self._norms, self._config = names, norms, config
        self._compare, self._differentiate, self._callback = compare, differentiate, callback
        self._together = config.together or together
        self._vectors = vectors
        # (4, N, v, E) for each text encoder: the vectors, AdamW's two running means, and the vectors that are kept.
        self._states: list[Tensor] = []
        # What each class, (N,), loses by each of what it may begin as.
        self._compared: list[Tensor] = []
        # (S, N), the order in which each class begins as what it may begin as.
        self._ranking = torch.zeros(1, len(names), dtype=torch.int64, device="cpu")
        self.histories = [ClassHistory() for _ in names]
        # Classes that have not ended; the first of them run.
        self._queue = list(range(len(names)))

    @property
    def done(self) -> bool:
        """Whether all classes have ended."""
        return not self._queue

    def step(self) -> None:
        """Make one update of the classes that run, or, before the first, compare what they may begin with."""
        done = len(self._compared)
        if self._compare is not None and not self._states and done < len(self._vectors[0]):
            losses = self._compare([each[done] for each in self._vectors], self._together)
            with self.changing():
                self._compared.append(losses)
            return
        if not self._states:
            self._begin()
        self._update()

    def _begin(self) -> None:
        ranking = self._ranking
        if self._compared:
            ranking = torch.stack(self._compared).nan_to_num(nan=torch.inf).argsort(dim=0, stable=True)
        with self.changing():
            self._ranking = ranking
            self._states = [torch.zeros(4, *each.shape[1:], dtype=each.dtype, device="cpu") for each in self._vectors]
            for number in range(len(self._names)):
                self._start(number)
                for state in self._states:
                    state[3, number] = state[0, number]

    def _start(self, number: int) -> None:
        """Let a class begin as the next in its order, its optimiser anew."""
        history = self.histories[number]
        place = int(self._ranking[len(history.begun), number])
        history.begun.append([history.updates, place])
        for state, own in zip(self._states, self._vectors, strict=True):
            state[0, number], state[1:3, number] = own[place, number], 0.0

    def _update(self) -> None:
        running, config = self._queue[: self._together], self._config
        index = torch.tensor(running, dtype=torch.int64, device="cpu")
        made = [self.histories[number].updates for number in running]
        answer = self._differentiate([state[0] for state in self._states], running, made)
        finite = answer.finite()
        begun = [len(self.histories[number].since) for number in running]
        steps = torch.tensor(begun, dtype=torch.float64, device="cpu") + 1
        gradients = clipped(answer.gradients, config.clip_norm)
        before = [state[:, index] for state in self._states]
        after = [stepped(own[:3], gradient, steps, config) for own, gradient in zip(before, gradients, strict=True)]
        if config.norm_clamp is not None:
            for own, norm in zip(after, self._norms, strict=True):
                own[0] = shortened(own[0], config.norm_clamp * norm)
        events, good, best = [], [], []
        with self.changing():
            for place, number in enumerate(running):
                history, told = self.histories[number], answer.of(place)
                if finite[place]:
                    good.append(place)
                    if history.add(*told):
                        best.append(place)
                    history.ended = history.why_ended(config)
                else:
                    history.ended = "not-finite"
                about = self.about([own[0, place] for own in after])
                events.append(TokenUpdate(self._names[number], made[place] + 1, *told, *about, history.ended))
            chosen = good if config.keep == "last" else best
            for state, old, new in zip(self._states, before, after, strict=True):
                state[:3, index] = new
                state[3, index[chosen]] = (old if config.keep == "best" else new)[0, chosen]
            self._queue = [number for number in self._queue if self.histories[number].ended is None]
            for number in self._queue[: len(running)]:
                history = self.histories[number]
                if history.overlooked(config) and len(history.begun) < len(self._ranking):
                    self._start(number)
        if self._callback is not None:
            for event in events:
                self._callback(event)

    def kept(self, number: int) -> list[Tensor]:
        """The vectors that are kept of a class, (v, E) for each text encoder."""
        return [state[3, number] for state in self._states]

    def about(self, vectors: Sequence[Tensor]) -> tuple[float, float]:
        """Of a class's vectors the longest norm, in the vocabulary's, and the share of them at the clamp."""
        ratios = torch.cat([own.norm(dim=-1) / norm for own, norm in zip(vectors, self._norms, strict=True)])
        most = self._config.norm_clamp
        at_clamp = 0.0 if most is None else float(((ratios / most - 1).abs() <= _ROUNDING).double().mean())
        return float(ratios.max()), at_clamp

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See :class:`~dsd_fast.training.Loop`."""
        tensors = {f"encoder_{number}": state for number, state in enumerate(self._states)}
        tensors |= {f"compared_{number}": losses for number, losses in enumerate(self._compared)}
        tensors["ranking"] = self._ranking
        histories = [asdict(each) for each in self.histories]
        return tensors, {"queue": self._queue, "together": self._together, "histories": histories}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """See :class:`~dsd_fast.training.Loop`."""
        self._states, self._compared = (
            [tensors[name] for number in range(len(tensors)) if (name := f"{kind}_{number}") in tensors]
            for kind in ("encoder", "compared")
        )
        self._ranking = tensors["ranking"]
        self._queue = values["queue"]
        # Of the memory that was free when it began: with another number the same learning would round otherwise.
        self._together = self._config.together or values["together"]
        self.histories = [ClassHistory(**each) for each in values["histories"]]
