"""What the commands print: errors in one sentence, progress with rate and time left, names made safe to show."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

T = TypeVar("T")

EXIT_ERRORS = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class CommandError(Exception):
    """Ends a command: one sentence for the user, exit code 2."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """Whatever the user can cause inside ends the command with one sentence on stderr instead of a traceback."""
    try:
        yield
    except BrokenPipeError:
        # The reader of stdout has left, which is no error of ours; typer ends quietly.
        raise
    except (CommandError, ValueError) as error:
        fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        import torch

        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        fail("out of memory; give a smaller --memory-budget, or fewer captions at a time")


def fail(message: str, code: int = EXIT_USAGE) -> None:
    """Prints one line on stderr and ends the command."""
    text = Text.assemble(("Error: ", "bold red"), printable(" ".join(message.split())))
    Console(stderr=True).print(text, soft_wrap=True)
    raise typer.Exit(code)


def printable(text: str) -> str:
    """Control characters and undecodable bytes, which file names and captions may hold, as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def storable(text: str) -> str:
    """A path or argument as UTF-8 text: bytes that are none, which Linux allows, become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def counted(count: int, noun: str) -> str:
    """1 image, 1,000 images."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def progress(unit: str) -> Progress:
    """A progress display on stderr.

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
        """The rate, once there is one."""
        units, seconds = task.fields["units"], task.fields.get("seconds", task.elapsed)
        rate = f"{units / seconds:.1f}" if units and seconds else "-"
        return Text(f"{rate} {self.unit}/s", style="progress.data.speed")


class _TimeLeftColumn(ProgressColumn):
    """Time left at the mean rate since the start; see :class:`_RateColumn`."""

    def render(self, task: Task) -> Text:
        """The time left, or the time taken at the end."""
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
        """The items, up to a Ctrl-C; it cuts short the wait for the next item."""
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
