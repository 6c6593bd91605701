"""Gradient descent by AdamW that can be killed at any moment, with held-out examples to choose the best by."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from dsd_fast.kernels.common.transfer import Download
from dsd_fast.training.loop import Loop

_ADVICE = "a lower learning rate may help, or, in float16, autocast and a float32 model"


@dataclass(frozen=True)
class FitRecord:
    """How training stood after some steps.

    Attributes:
        step: steps taken.
        loss: mean training loss since the last record; None before the first step.
        accuracy, validation_loss: on the held-out examples, as the method measures them; None where there are none.
    """

    step: int
    loss: float | None
    accuracy: float | None
    validation_loss: float | None


@dataclass(frozen=True)
class FitHistory:
    """What a fit did.

    Attributes:
        records: how it went; the first is before the first step where there are held-out examples.
        steps: steps taken.
        best_step: the step whose parameters were kept: with held-out examples the one with the best accuracy, then the
            least loss; else the last.
        stopped_early: whether patience ended it.
    """

    records: tuple[FitRecord, ...]
    steps: int
    best_step: int
    stopped_early: bool


Report = Callable[[int, float | None, FitRecord | None], None]
"""Called for each step as report(step, its loss, None), and with each record as report(step, None, it).

A GPU computes one step more while the host reads the loss of the last.
"""

Losses = Callable[[int, Callable[[Tensor], None]], None]
"""Called as losses(step, backward), steps counted from 0; gives backward the step's loss, or parts of which it is the
sum, () each. What it draws depends on the step, and on a seed of its own, alone."""


@dataclass
class Progress:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    records: list[FitRecord] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best_step: int = 0
    without_gain: int = 0


Group = TypeVar("Group", bound=Hashable)


class Descent(Loop):
    """Parameters that follow the gradient of a loss.

    Args:
        parameters: what is trained, by name, on one device.
        losses: of a step, see :data:`Losses`.
        group: of a parameter, by its name; the optimiser takes a group's step in one call.
        rate: the learning rate as rate(group, step).
        decay: the weight decay as decay(group).
        steps: to take.
        clip_norm: largest norm of the gradient of all parameters together.
        betas: of AdamW.
        scaled: whether the loss is scaled for float16, and steps whose gradient then overflows are left out.
        average: decay of a running average of the parameters, which checkpoints hold as ``ema.<name>`` and which
            follows faster while it is young; None makes none. Each step then waits for the device.
        validate: gives accuracy, or None, and loss of the parameters as they are on held-out examples; None has none.
        validate_every: steps between records, and so between validations.
        patience: validations without a better one after which training stops; None never does.
        folder, fingerprint, save_every: see :class:`~dsd_fast.training.loop.Loop`.
        report: see :data:`Report`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        losses: Losses,
        group: Callable[[str], Group],
        rate: Callable[[Group, int], float],
        decay: Callable[[Group], float],
        *,
        steps: int,
        clip_norm: float,
        betas: tuple[float, float] = (0.9, 0.999),
        scaled: bool = False,
        average: float | None = None,
        validate: Callable[[], tuple[float | None, float]] | None = None,
        validate_every: int,
        patience: int | None = None,
        folder: Path | None,
        fingerprint: Mapping[str, Any],
        save_every: float,
        report: Report,
    ) -> None:
        super().__init__(folder, fingerprint, save_every)
        self.parameters, self._losses, self._rate = dict(parameters), losses, rate
        self._steps, self._clip_norm, self._decay = steps, clip_norm, average
        self._validate, self._validate_every, self._patience = validate, validate_every, patience
        self._report = report
        members: dict[Group, list[Parameter]] = {}
        for name, parameter in self.parameters.items():
            members.setdefault(group(name), []).append(parameter)
        groups = [{"params": own, "group": key, "weight_decay": decay(key)} for key, own in members.items()]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)
        self._device = next(iter(self.parameters.values())).device
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=scaled)
        # On the device: 1 from the first step on whose loss or gradient is not finite, and no step changes anything.
        self._wrong = torch.zeros((), dtype=torch.float32, device=self._device)
        # (step, its loss and its gradient's norm), of steps taken that the host has not read.
        self._unread: deque[tuple[int, Download]] = deque()
        self._average = {} if average is None else self._copies()
        self._best: dict[str, Tensor] = {}
        self.progress = Progress()

    def fit(self) -> FitHistory:
        """Train to the end, see :meth:`run`; leaves the best parameters in place.

        Raises:
            FloatingPointError: a loss or a gradient that is not finite.
            ValueError: the folder's checkpoint is one of another fit, with the names of what differs.
        """
        self.run()
        progress = self.progress
        if self._validate is None:
            progress.best_step = progress.step
        elif self._best:
            self._put(self._best)
        return FitHistory(tuple(progress.records), progress.step, progress.best_step, self._stopped)

    @property
    def done(self) -> bool:
        """Whether no step and no record is left."""
        return not self._due and (self.progress.step >= self._steps or self._stopped)

    def step(self) -> None:
        """Make a record where one is due, else take a step of the optimiser."""
        if self._due:
            self._record()
        else:
            self._update()
            self._read(left=int(self._device.type == "cuda"))

    def settle(self, *, report: bool) -> None:
        """Read the losses of all steps taken."""
        self._read(report=report)

    @property
    def _due(self) -> bool:
        """Whether it is time for a record that has not been made."""
        step, records = self.progress.step, self.progress.records
        if records and records[-1].step == step:
            return False
        if step == 0:
            return self._validate is not None
        return step % self._validate_every == 0 or step == self._steps

    @property
    def _stopped(self) -> bool:
        patience = self._patience
        return patience is not None and self._validate is not None and self.progress.without_gain >= patience

    def _update(self) -> None:
        progress = self.progress
        loss = self._gradient()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(group["group"], progress.step)
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self._clip_norm, foreach=True)
        told = torch.stack([loss, norm.to(loss)])
        if not self._scaler.is_enabled():
            self._wrong = torch.maximum(self._wrong, (~told.isfinite()).any().to(self._wrong))
            # As a GradScaler asks the fused step to leave everything as it is.
            self._optimizer.found_inf = self._wrong  # type: ignore[attr-defined]
        with self.changing():
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._follow()
            progress.step += 1
            self._unread.append((progress.step, Download({"told": told})))
        self._optimizer.zero_grad()

    def _gradient(self) -> Tensor:
        """Leaves the gradient of the step's loss in the parameters; the loss, () float64."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)

        def backward(part: Tensor) -> None:
            self._scaler.scale(part).backward()  # type: ignore[no-untyped-call]
            total.add_(part.detach())

        self._optimizer.zero_grad()
        self._losses(self.progress.step, backward)
        return total

    def _follow(self) -> None:
        """Moves the average."""
        if self._decay is not None and not self._wrong:
            step = self.progress.step
            # The first parameters must not stay in it.
            weight = 1 - min(self._decay, (step + 1) / (step + 10))
            now = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self._average.values()), now, weight)

    def _read(self, left: int = 0, *, report: bool = True) -> None:
        """Reads the losses of all steps taken but the last ``left``.

        Raises:
            FloatingPointError: of the first loss or gradient that is not finite; the state is that before its step.
        """
        progress = self.progress
        while len(self._unread) > left:
            step, download = self._unread[0]
            loss, norm = download.done()["told"].tolist()
            if not (self._scaler.is_enabled() or (math.isfinite(loss) and math.isfinite(norm))):
                self._unread.clear()
                progress.step = step - 1
                what = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
                raise FloatingPointError(f"step {step}: the {what}; {_ADVICE}")
            with self.changing():
                self._unread.popleft()
                progress.losses.append(loss)
            if report:
                self._report(step, loss, None)

    def _record(self) -> None:
        self._read()
        progress = self.progress
        accuracy = held_out = None
        if self._validate is not None:
            accuracy, held_out = self._validate()
        with self.changing():
            mean = sum(progress.losses) / len(progress.losses) if progress.losses else None
            progress.losses = []
            best = next((record for record in progress.records if record.step == progress.best_step), None)
            record = FitRecord(progress.step, mean, accuracy, held_out)
            progress.records.append(record)
            if self._validate is not None:
                if best is None or _quality(record) > _quality(best):
                    progress.best_step, progress.without_gain = progress.step, 0
                    self._best = self._copies()
                else:
                    progress.without_gain += 1
        self._report(progress.step, None, record)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give parameters, moments, average, the best parameters so far, and the progress."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = parameter
            tensors |= {f"adam.{name}/{key}": value for key, value in self._optimizer.state[parameter].items()}
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        tensors |= {f"ema.{name}": value for name, value in self._average.items()}
        return tensors, {**asdict(self.progress), "scaler": self._scaler.state_dict()}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""

        def under(prefix: str) -> dict[str, Tensor]:
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            return {name: value.to(self._device) for name, value in own.items()}

        self._scaler.load_state_dict(values.pop("scaler"))
        records = [FitRecord(**record) for record in values.pop("records")]
        self.progress, self._best = Progress(records=records, **values), under("best.")
        self._put(under("model."))
        for name, value in under("ema.").items():
            self._average[name].copy_(value)
        for name, parameter in self.parameters.items():
            for key, value in under(f"adam.{name}/").items():
                # The fused step walks a parameter and its moments by address: they have one memory format.
                own = value if key == "step" else torch.empty_like(parameter).copy_(value)
                self._optimizer.state[parameter][key] = own

    def _copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])


def _quality(record: FitRecord) -> tuple[float, float]:
    assert record.validation_loss is not None
    # A loss that is no number is worse than any.
    return record.accuracy or 0.0, -math.inf if math.isnan(record.validation_loss) else -record.validation_loss
