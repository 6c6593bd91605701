"""Values of options, Ctrl-C, and what the terminal is given."""

import signal
import time

import pytest
import typer
from rich.console import Console
from rich.progress import Progress

from dsd_fast.cli.options import parse_bytes, parse_image_size, parse_pool, parse_timesteps
from dsd_fast.cli.terminal import Interrupt, _RateColumn, _TimeLeftColumn, counted, one_sentence, printable


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("512MB", 512_000_000),
        ("512mb", 512_000_000),
        ("2GiB", 2 << 30),
        ("1.5 GiB", 3 << 29),
        ("64k", 64_000),
        ("64Ki", 64 << 10),
        ("0", 0),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1iB", "1e9", "1 000", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)


def test_other_values():
    assert parse_timesteps("10") == 10
    assert parse_timesteps("5, 700") == [5, 700]
    assert parse_timesteps("5,") == [5]
    assert parse_pool("max") == "max"
    assert parse_pool("0.5") == 0.5
    assert parse_image_size("512") == (512, 512)
    assert parse_image_size("512x768") == (512, 768)
    for parse, text in ((parse_timesteps, "5,x"), (parse_timesteps, ""), (parse_pool, ""), (parse_image_size, "5x")):
        with pytest.raises(ValueError, match=r"^--"):
            parse(text)


def test_printable():
    assert printable("a [b] é 🐻") == "a [b] é 🐻"
    assert printable("\x1b[31m\n\udce9\x07") == "\\x1b[31m\\n\\udce9\\x07"


def test_counted():
    assert [counted(n, "image") for n in (0, 1, 2, 1000)] == ["0 images", "1 image", "2 images", "1,000 images"]


def test_progress_has_a_rate_and_the_time_left():
    now = [100.0]
    display = Progress(get_time=lambda: now[0], console=Console(quiet=True))
    number = display.add_task("matching", total=10, units=0)
    task = display.tasks[0]
    rate, left = _RateColumn("pairs"), _TimeLeftColumn()
    assert rate.render(task).plain == "- pairs/s"
    assert left.render(task).plain == "-:--:-- left"
    now[0] += 20
    # Results come in batches; the rate is that of the whole time all the same.
    for done in (1, 2, 3, 4):
        display.update(number, completed=done, units=100 * done)
    assert rate.render(task).plain == "20.0 pairs/s"
    assert left.render(task).plain == "0:00:30 left"
    now[0] += 30
    display.update(number, completed=10, units=1000)
    assert left.render(task).plain == "0:00:50 taken"
    # Of which 10 s went into the units.
    display.update(number, seconds=10.0)
    assert rate.render(task).plain == "100.0 pairs/s"


def test_the_first_interruption_ends_the_iteration_only():
    seen = []
    with Interrupt() as interrupt:
        for item in interrupt.until(range(10)):
            seen.append(item)
            if item == 2:
                # While an item is worked on: the work is finished first.
                signal.raise_signal(signal.SIGINT)
                seen.append("done")
    assert seen == [0, 1, 2, "done"]
    assert interrupt.requested
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_cuts_the_wait_short():
    def items():
        yield 1
        signal.raise_signal(signal.SIGINT)
        time.sleep(1)
        yield 2

    with Interrupt() as interrupt:
        assert list(interrupt.until(items())) == [1]
    assert interrupt.requested


def test_interruptions_before_the_iteration_and_second_ones_act_at_once():
    with pytest.raises(KeyboardInterrupt), Interrupt():
        signal.raise_signal(signal.SIGINT)

    def twice():
        with Interrupt() as interrupt:
            for _ in interrupt.until(range(2)):
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("error", [RuntimeError("a bug"), AssertionError("a bug"), KeyError("a bug")])
def test_bugs_are_not_hidden(error):
    with pytest.raises(type(error), match="a bug"), one_sentence():
        raise error


def test_an_error_is_one_line(capsys):
    with pytest.raises(typer.Exit) as ended, one_sentence():
        raise ValueError("captions: got\n  [red]two\x1b lines, " + "long " * 50)
    assert ended.value.exit_code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "Error: captions: got [red]two\\x1b lines, " + " ".join(["long"] * 50) + "\n"
