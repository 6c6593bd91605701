"""The steps of a training, shown while it runs, and what is kept of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dsd_fast.cli.terminal import progress

if TYPE_CHECKING:
    from dsd_fast.training import FitHistory, FitRecord, Report


@contextmanager
def showing_steps(name: str, steps: int) -> Iterator[Report]:
    """Gives what a training calls: a bar on stderr with the steps of this run, their loss and what is held out."""
    with progress("steps") as display:
        task = display.add_task(name, total=steps, units=0)
        first, shown, held = None, "", ""

        def report(step: int, loss: float | None, record: FitRecord | None) -> None:
            nonlocal first, shown, held
            if first is None:
                # Rate and time left are those of this run, which may go on with an earlier one.
                first = step if loss is None else step - 1
                display.update(task, total=steps - first)
            if loss is not None:
                shown = f", loss {loss:.4f}"
            if record is not None and record.accuracy is not None:
                held = f", held out {record.accuracy:.3f} right"
            elif record is not None and record.validation_loss is not None:
                held = f", held out {record.validation_loss:.4f}"
            begun = f" from step {first}" if first else ""
            display.update(task, completed=step - first, units=step - first, description=f"{name}{begun}{shown}{held}")

        yield report


def history_of(history: FitHistory) -> dict[str, Any]:
    """Tells how a training went, as JSON."""
    return {
        "steps": history.steps,
        "best_step": history.best_step,
        "stopped_early": history.stopped_early,
        "records": [{key: finite(value) for key, value in vars(each).items()} for each in history.records],
    }


def finite(value: float | None) -> float | None:
    """Gives a number, or None for one that is not finite, which JSON has not."""
    return value if value is not None and math.isfinite(value) else None
