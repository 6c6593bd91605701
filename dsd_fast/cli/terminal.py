"""What the commands print: errors in one sentence, progress with rate and time left, names made safe to show."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

EXIT_ERRORS = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_STDOUT = "stdout"

SHOWN = 20
"""Images, and errors, that the terminal shows; the files have all."""


class CommandError(Exception):
    """Ends a command: one sentence for the user, exit code 2."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the command with one sentence on stderr, instead of a traceback, for whatever the user can cause inside."""
    try:
        yield
    except (BrokenPipeError, typer.Exit):
        # The reader of stdout has left, which is no error of ours, and typer ends quietly; or the command has ended.
        raise
    except (CommandError, ValueError, FloatingPointError) as error:
        fail(str(error))
    except OSError as error:
        if error.filename == _STDOUT:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        import torch

        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        fail("out of memory; give a smaller --memory-budget, or fewer captions at a time")


@contextmanager
def checked_stdout() -> Iterator[None]:
    """Ends the process with one sentence where what is printed cannot be written, as on a disk that is full.

    Exit code 1: what a command writes into files is there by then. Without a word where the reader has left.
    """
    # None where the process was started without.
    old = sys.stdout
    if isinstance(old, io.TextIOWrapper):
        sys.stdout = _Stdout(old.buffer, old.encoding, old.errors, line_buffering=old.line_buffering)
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if error.filename != _STDOUT:
            raise
        # The interpreter tries once more at its end, and would say it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"Error: stdout cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(EXIT_ERRORS)


class _Stdout(io.TextIOWrapper):
    """Names itself in the system's errors."""

    def write(self, text: str, /) -> int:
        with _named():
            return super().write(text)

    def flush(self) -> None:
        with _named():
            super().flush()


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = _STDOUT
        raise


def fail(message: str, code: int = EXIT_USAGE) -> NoReturn:
    """Prints one line on stderr and ends the command."""
    text = Text.assemble(("Error: ", "bold red"), printable(" ".join(message.split())))
    Console(stderr=True).print(text, soft_wrap=True)
    raise typer.Exit(code)


def end(complete: bool, errors: int) -> NoReturn:
    """Ends a command whose results are written: 130 if it was interrupted, 1 if there were errors, else 0."""
    raise typer.Exit(EXIT_INTERRUPTED if not complete else EXIT_ERRORS if errors else 0)


def printable(text: str) -> str:
    """Writes control characters and undecodable bytes, which file names and captions may hold, as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(count: int, noun: str) -> str:
    """Counts things: 1 image, 1,000 images."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def table(title: str, *columns: str, names: int = 1, fold: bool = False) -> Table:
    """Makes a table of which the first columns are `names`, to the left; numbers follow, to the right.

    Args:
        fold: whether cells that are too long go on in the next line instead of being cut.
    """
    whole = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        side: JustifyMethod = "left" if place < names else "right"
        whole.add_column(column, justify=side, overflow="fold" if fold else "ellipsis")
    return whole


def show_line(console: Console, text: str) -> None:
    """Prints a text that may hold names of files, unbroken."""
    console.print(Text(printable(text)), soft_wrap=True)


def show_outcome(console: Console, summary: Mapping[str, Any], done: str, meanwhile: str, out: Path) -> None:
    """Prints what became of a job's images, how fast, and what went on meanwhile.

    Args:
        summary: with "counts", "complete" and "seconds".
        done: what was done to an image.
        meanwhile: said of a run that was not interrupted and has made some.
        out: the folder of the results.
    """
    counts = summary["counts"]
    line = f"{counted(counts['inputs'], 'image')}: {counts['ok']:,} {done} now"
    line += f", {counts['done'] - counts['done_errors']:,} before"
    line += f", {counted(counts['errors'] + counts['done_errors'], 'error')}"
    if counts["duplicates"]:
        line += f", {counted(counts['duplicates'], 'duplicate')}"
    if not summary["complete"]:
        line += f", {counts['not_reached']:,} not reached before the interruption"
    else:
        line += f". {counts['ok'] / max(summary['seconds'], 1e-9):.1f} images/s in {summary['seconds']:.1f} s"
        line += f", {meanwhile}" if counts["ok"] else ""
    if counts["elsewhere"]:
        line += f". {counted(counts['elsewhere'], 'image')} of other workers"
    show_line(console, f"{line}. Results: {out}")


def show_errors(
    console: Console,
    title: str,
    rows: Sequence[Sequence[str]],
    total: int = 0,
    where: str = "",
    header: Sequence[str] = ("reason", "what"),
) -> None:
    """Prints the first errors as a table, and how many more of the `total` stand in the file `where`."""
    if rows:
        table = Table(*header, title=title)
        table.columns[-1].overflow = "fold"
        for row in rows[:SHOWN]:
            table.add_row(*(Text(printable(cell)) for cell in row))
        console.print(table)
    if total > SHOWN:
        console.print(f"and {counted(total - SHOWN, 'more error')} in {where}")


def progress(unit: str) -> Progress:
    """Makes a progress display on stderr.

    Its rate counts the task's field `units`, which the caller keeps, over the time since the start, or over the field
    `seconds` where a task also does something else.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _RateColumn(unit),
        _TimeLeftColumn(),
        console=Console(stderr=True),
        expand=True,
    )


class _RateColumn(ProgressColumn):
    """Units per second.

    Rich's own speed looks at the intervals between steps; results arrive in batches, with none in between.
    """

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Shows the rate, once there is one."""
        units, seconds = task.fields["units"], task.fields.get("seconds", task.elapsed)
        rate = f"{units / seconds:.1f}" if units and seconds else "-"
        return Text(f"{rate} {self.unit}/s", style="progress.data.speed")


class _TimeLeftColumn(ProgressColumn):
    """Time left at the mean rate since the start; see :class:`_RateColumn`."""

    def render(self, task: Task) -> Text:
        """Shows the time left, or the time taken at the end."""
        seconds: float | None = task.elapsed
        if not task.finished and task.total and task.completed and task.elapsed:
            seconds = task.elapsed * (task.total - task.completed) / task.completed
        elif not task.finished:
            seconds = None
        text = "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
        return Text(f"{text} {'taken' if task.finished else 'left'}", style="progress.remaining")


class Interrupt:
    """Inside, Ctrl-C ends the iteration of :meth:`until`, and what is done with the items is done to the end.

    Before the iteration Ctrl-C acts as ever, and a second one always does.

    Attributes:
        requested: whether there was one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._shielded = False

    def __enter__(self) -> Interrupt:
        self._previous: Any = signal.getsignal(signal.SIGINT)
        if self._previous is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items, up to a Ctrl-C; it cuts short the wait for the next item."""
        iterator = iter(items)
        while not self.requested:
            try:
                self._shielded = False
                item = next(iterator)
            except StopIteration:
                return
            except KeyboardInterrupt:
                return
            finally:
                self._shielded = True
            yield item

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)
        if not self._shielded:
            raise KeyboardInterrupt
