"""The training loop of a fit: it can be killed at any moment and goes on as if it had not been.

Whatever a step draws is a function of the seed and the step's number, so a checkpoint is the parameters, the
optimiser's state, the best parameters so far, and the step.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsd_fast.jobs import read_tensors, write_tensors
from dsd_fast.kernels.common.transfer import Download
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.examples import Examples
from dsd_fast.matching.fitting.learned import Learned
from dsd_fast.matching.fitting.objective import draw, losses, scores, seed_of
from dsd_fast.matching.fitting.validation import validate

CHECKPOINT = "training.safetensors"

# Of a fit's state, what a checkpoint holds as it is.
_PLAIN = ("step", "losses", "best_step", "without_gain")
_ADVICE = "a lower learning rate may help, or, in float16, autocast and a float32 model"


@dataclass(frozen=True)
class FitRecord:
    """How training stood after some steps.

    Attributes:
        step: steps taken.
        loss: mean training loss since the last record; None before the first step.
        accuracy, validation_loss: on the held-out examples, with the matcher's own timesteps; None where there are
            none.
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
        best_step: the step whose parameters the matcher has: with held-out examples the one with the best accuracy,
            then the least loss; else the last.
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


@dataclass
class State:
    """What a checkpoint holds besides parameters and optimiser."""

    step: int = 0
    records: list[FitRecord] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best_step: int = 0
    best: dict[str, Tensor] | None = None
    without_gain: int = 0


class Training:
    """A fit under way.

    Args:
        learned: the parameters.
        examples: to learn from.
        fit: the settings.
        validation: held-out examples to choose the best parameters by, or None.
        fingerprint: what changes the result, by name; a checkpoint of another is refused.
        folder: of the checkpoint, behind its lock; None keeps none.
        report: see :data:`Report`.

    Raises:
        ValueError: the folder's checkpoint is one of another fit, with the names of what differs.
    """

    def __init__(
        self,
        learned: Learned,
        examples: Examples,
        fit: FitConfig,
        validation: Examples | None,
        fingerprint: Mapping[str, Any],
        folder: Path | None,
        report: Report,
    ) -> None:
        self._learned, self._examples, self._fit = learned, examples, fit
        self._validation, self._report = validation, report
        self._fingerprint = dict(fingerprint)
        self._file = None if folder is None else folder / CHECKPOINT
        groups = [
            {"params": [parameter], "method": name.split(".")[0], "weight_decay": _decay(name, fit)}
            for name, parameter in learned.parameters.items()
        ]
        device = learned.scorer.plan.program.device
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self._scaler = torch.amp.GradScaler(device.type, enabled=fit.autocast == "float16")
        self._device = device
        # On the device: 1 from the first step on whose loss or gradient is not finite, and no step changes anything.
        self._wrong = torch.zeros((), dtype=torch.float32, device=device)
        # (step, its loss and its gradient's norm), of steps taken that the host has not read.
        self._unread: deque[tuple[int, Download]] = deque()
        self._whole = True
        self.state = State()
        if self._file is not None and self._file.exists():
            self._restore(self._file)

    def run(self) -> FitHistory:
        """Trains to the end; what an exception interrupts is in the checkpoint."""
        state, fit = self.state, self._fit
        saved = time.monotonic()
        try:
            while True:
                if self._due:
                    self._record()
                if state.step >= fit.steps or self._stopped:
                    break
                self._step()
                self._read(left=int(self._device.type == "cuda"))
                if time.monotonic() - saved >= fit.save_every:
                    self._read()
                    self._save()
                    saved = time.monotonic()
        finally:
            # Half a step would be taken twice.
            if self._whole:
                try:
                    self._read(report=False)
                finally:
                    self._save()
        if self._validation is None:
            state.best_step = state.step
        elif state.best is not None:
            self._put(state.best)
        return FitHistory(tuple(state.records), state.step, state.best_step, self._stopped)

    @property
    def _due(self) -> bool:
        """Whether it is time for a record that has not been made."""
        step, records = self.state.step, self.state.records
        if records and records[-1].step == step:
            return False
        if step == 0:
            return self._validation is not None
        return step % self._fit.validate_every == 0 or step == self._fit.steps

    @property
    def _stopped(self) -> bool:
        patience = self._fit.patience
        return patience is not None and self._validation is not None and self.state.without_gain >= patience

    def _step(self) -> None:
        """One step of the optimiser."""
        fit, learned, state = self._fit, self._learned, self.state
        loss = self._gradient()
        for group in self._optimizer.param_groups:
            group["lr"] = fit.rate(group["method"], state.step)
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(list(learned.parameters.values()), fit.clip_norm, foreach=True)
        told = torch.stack([loss, norm.to(loss)])
        if not self._scaler.is_enabled():
            self._wrong = torch.maximum(self._wrong, (~told.isfinite()).any().to(self._wrong))
            # As a GradScaler asks the fused step to leave everything as it is.
            self._optimizer.found_inf = self._wrong  # type: ignore[attr-defined]
        self._whole = False
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        state.step += 1
        self._unread.append((state.step, Download({"told": told})))
        self._whole = True

    def _read(self, left: int = 0, *, report: bool = True) -> None:
        """Reads the losses of all steps taken but the last ``left``.

        Raises:
            FloatingPointError: of the first loss or gradient that is not finite; the state is that before its step.
        """
        state = self.state
        while len(self._unread) > left:
            step, download = self._unread[0]
            loss, norm = download.done()["told"].tolist()
            if not (self._scaler.is_enabled() or (math.isfinite(loss) and math.isfinite(norm))):
                self._unread.clear()
                state.step = step - 1
                what = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
                raise FloatingPointError(f"step {step}: the {what}; {_ADVICE}")
            self._whole = False
            self._unread.popleft()
            state.losses.append(loss)
            self._whole = True
            if report:
                self._report(step, loss, None)

    def _gradient(self) -> Tensor:
        """Leaves the gradient of the mean loss of the step's groups in the parameters; the loss, () float64."""
        fit, learned, examples, step = self._fit, self._learned, self._examples, self.state.step
        scorer = learned.scorer
        chosen = _groups(len(examples.queries), fit, step)
        each = fit.micro_batch or len(chosen)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        self._optimizer.zero_grad()
        learned.dropout(True)
        # Dropout draws from torch's own generators, which a step seeds and gives back as they were.
        with _seeded(fit.seed, step, self._device) if fit.lora_dropout else nullcontext():
            for start in range(0, len(chosen), each):
                numbers = chosen[start : start + each]
                batch = draw(
                    [examples.queries[number] for number in numbers],
                    [(fit.seed, step, start + place) for place in range(len(numbers))],
                    examples.latents.shape[1:],
                    fit,
                    scorer.model.schedule.num_train_timesteps,
                    scorer.needs_unconditional,
                )
                values = scores(
                    scorer,
                    learned.weights(),
                    examples,
                    batch,
                    through_network=learned.learns_network,
                    checkpoint=fit.checkpointing,
                    autocast=None if fit.autocast is None else getattr(torch, fit.autocast),
                )
                mean = losses(values, batch, fit).sum() / len(chosen)
                self._scaler.scale(mean).backward()  # type: ignore[no-untyped-call]
                total += mean.detach()
        learned.dropout(False)
        return total

    def _record(self) -> None:
        self._read()
        state = self.state
        accuracy = held_out = None
        if self._validation is not None:
            accuracy, held_out = validate(self._learned.current(), self._validation, self._fit)
        self._whole = False
        mean = sum(state.losses) / len(state.losses) if state.losses else None
        state.losses = []
        best = next((record for record in state.records if record.step == state.best_step), None)
        record = FitRecord(state.step, mean, accuracy, held_out)
        state.records.append(record)
        if self._validation is not None:
            if best is None or _quality(record) > _quality(best):
                state.best_step, state.without_gain = state.step, 0
                state.best = {name: p.detach().clone() for name, p in self._learned.parameters.items()}
            else:
                state.without_gain += 1
        self._whole = True
        self._report(state.step, None, record)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._learned.parameters.items():
                parameter.copy_(values[name])
        self._learned.current()

    def _save(self) -> None:
        if self._file is None:
            return
        state = self.state
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._learned.parameters.items():
            tensors[f"model.{name}"] = parameter
            tensors |= {f"adam.{name}/{key}": value for key, value in self._optimizer.state[parameter].items()}
        tensors |= {f"best.{name}": value for name, value in (state.best or {}).items()}
        about = {
            **{key: getattr(state, key) for key in _PLAIN},
            "fingerprint": self._fingerprint,
            "records": [vars(record) for record in state.records],
            "scaler": self._scaler.state_dict(),
        }
        write_tensors(self._file, tensors, about)

    def _restore(self, file: Path) -> None:
        tensors, about = read_tensors(file)
        found = about.get("fingerprint", {})
        other = sorted(key for key in {*found, *self._fingerprint} if found.get(key) != self._fingerprint.get(key))
        if other:
            raise ValueError(
                f"out: {file} is of another fit, which differs in {', '.join(other)}; choose another folder"
            )
        records = [FitRecord(**record) for record in about["records"]]

        def under(prefix: str) -> dict[str, Tensor]:
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            return {name: value.to(self._device) for name, value in own.items()}

        self.state = State(records=records, best=under("best.") or None, **{key: about[key] for key in _PLAIN})
        self._put(under("model."))
        for name, parameter in self._learned.parameters.items():
            if own := under(f"adam.{name}/"):
                self._optimizer.state[parameter] = own
        self._scaler.load_state_dict(about["scaler"])


def _quality(record: FitRecord) -> tuple[float, float]:
    assert record.accuracy is not None
    assert record.validation_loss is not None
    # A loss that is no number is worse than any.
    return record.accuracy, -math.inf if math.isnan(record.validation_loss) else -record.validation_loss


def _decay(name: str, fit: FitConfig) -> float:
    return fit.weight_decay if name.startswith("lora.") else 0.0


def _groups(count: int, fit: FitConfig, step: int) -> list[int]:
    """The groups of a step: all of them in an order of the epoch's, one epoch after the other."""
    places = range(step * fit.batch_size, (step + 1) * fit.batch_size)
    orders = {
        epoch: torch.randperm(
            count, generator=torch.Generator().manual_seed(seed_of(fit.seed, epoch, 0, 1)), device="cpu"
        ).tolist()
        for epoch in {place // count for place in places}
    }
    return [orders[place // count][place % count] for place in places]


_RANDOM = threading.Lock()


@contextmanager
def _seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """torch's generators, the CPU's and the device's, seeded inside the block and as they were after it.

    They are the process's: one fit at a time has them.
    """
    value = seed_of(seed, step, 0, 2)
    with _RANDOM, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed: that seeds every device.
        torch.default_generator.manual_seed(value)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(value)
        yield
