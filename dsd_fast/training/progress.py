"""What training shows while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsd_fast.training.descent import FitRecord, Report


@contextmanager
def reporting(name: str, steps: int, callback: Report | None, shown: bool = True) -> Iterator[Report]:
    """Give what a training calls: it draws a bar with loss and held-out accuracy, and passes on to the callback."""
    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}{task.fields[accuracy]}"),
        disable=not shown,
    )
    with display:
        task = display.add_task(name, total=steps, loss="", accuracy="")

        def report(step: int, loss: float | None, record: FitRecord | None) -> None:
            if loss is not None:
                display.update(task, completed=step, loss=f"loss {loss:.4f}")
            if record is not None and record.accuracy is not None:
                display.update(task, completed=step, accuracy=f", held out {record.accuracy:.3f} right")
            if callback is not None:
                callback(step, loss, record)

        yield report
