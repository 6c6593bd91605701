"""``dsd-fast tokens learn``, ``show`` and ``export``."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from dsd_fast.cli.groups import command
from dsd_fast.cli.terminal import EXIT_INTERRUPTED, SHOWN, CommandError, counted, end, fail, printable, show_line, table
from dsd_fast.cli.tokens.options import ExportRequest, LearnRequest, ShowRequest

tokens = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@tokens.callback()
def about() -> None:
    """Class tokens: a word for each class, learned through the images that it makes."""


@tokens.command()
@command
def learn(request: LearnRequest) -> None:
    """Learn a word for each class, by gradient through the images that it makes.

    An update makes images of each class and judges them by --classifier; or, with --loss noise, takes the noise loss on
    given images. Any number of classes are learned side by side. Writes into --out the tokens, a .safetensors each,
    which `dsd-fast generate --tokens`, stock diffusers, AUTOMATIC1111's webui and ComfyUI read; history.json; and in
    pictures/ what each class looks like without its token (above) and with it (below).

    The same command goes on where an earlier one was stopped, even by kill -9, to the same result. One with other
    settings is refused.

    Exit code: 0 when every class has its token, 1 when some ended because their loss was no number, 2 when nothing
    could be done, 130 after Ctrl-C, which keeps the checkpoint.
    """
    config = request.config()
    request.check()
    from dsd_fast.cli.tokens.learn import run
    from dsd_fast.cli.tokens.show import COLUMNS, at_clamp, figures

    try:
        summary = run(request, config)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on from what is in {request.out}", EXIT_INTERRUPTED)
    console, rows = Console(), summary["tokens"]
    _show_table(console, [*COLUMNS], [[each["token"], each["class"], *figures(each)] for each in rows[:SHOWN]])
    if len(rows) > SHOWN:
        show_line(console, f"and {len(rows) - SHOWN:,} more: dsd-fast tokens show {request.out}")
    told = f"{counted(len(rows), 'token')}{at_clamp(rows)}, {summary['seconds']:.1f} s in this run"
    show_line(console, f"{told}. Results: {request.out}")
    end(True, sum(each["ended"] == "not-finite" for each in rows))


@tokens.command()
@command
def show(request: ShowRequest) -> None:
    """Show what is known of learned tokens: their classes, how learning ended, and the words that they are near to.

    The words are those of the vocabulary with the largest cosines to each of a token's vectors, and need --model, the
    one that the tokens were learned on. A loss, and what follows it, is of the update whose vectors were kept.
    """
    from dsd_fast.cli.tokens.show import COLUMNS, at_clamp, figures, nearest_words
    from dsd_fast.engine import LearnedTokens

    learned, near = LearnedTokens.load(request.tokens), dict[str, str]()
    if request.source.model and request.words:
        request.source.check()
        near = nearest_words(request.source.load(), learned, request.words)
    rows = [
        [token, name, *([near[token]] if near else []), *figures(learned.about[token])]
        for token, name in learned.classes.items()
    ]
    console = Console()
    _show_table(console, [*(["near to"] if near else []), *COLUMNS], rows)
    told = f"{counted(len(rows), 'token')}{at_clamp(learned.about.values())}"
    show_line(console, f"{told}, learned on {learned.settings.get('model') or 'some model'}.")


@tokens.command()
@command
def export(request: ExportRequest) -> None:
    """Write tokens as files for other programs, into a folder that may have others.

    The folder can be embeddings/ of AUTOMATIC1111's webui, whose prompts name a token by its file without the ending;
    or models/embeddings/ of ComfyUI, where it is embedding:NAME. Stock diffusers reads each by load_textual_inversion.
    A file that is there is not replaced without --overwrite.
    """
    from dsd_fast.cli.files import writing
    from dsd_fast.engine import LearnedTokens

    learned = LearnedTokens.load(request.tokens)
    try:
        chosen = learned.subset(request.names) if request.names else learned
    except KeyError as error:
        known = ", ".join([*learned.classes.values()][:SHOWN])
        raise CommandError(f"--class: got {error}, expected one of the classes, {known}") from error
    there = [file for file in chosen.files().values() if (request.out / file).exists()]
    if there and not request.overwrite:
        raise CommandError(f"--out: {request.out / there[0]} exists; give --overwrite to replace it, or another folder")
    with writing(request.out):
        files = chosen.write_files(request.out)
    whole = table("", "token", "class", "A1111", "ComfyUI", names=4, fold=True)
    for token, file in files.items():
        name = Path(file).stem
        whole.add_row(*map(_text, (token, chosen.classes[token], name, f"embedding:{name}")))
    console = Console()
    console.print(whole)
    show_line(console, f"{counted(len(files), 'file')} in {request.out}")


def _show_table(console: Console, columns: list[str], rows: list[list[str]]) -> None:
    """Shows token, class and perhaps words to the left, the figures to the right."""
    from dsd_fast.cli.tokens.show import COLUMNS

    whole = table("", "token", "class", *columns, names=2 + len(columns) - len(COLUMNS), fold=True)
    for row in rows:
        whole.add_row(*map(_text, row))
    console.print(whole)


def _text(cell: str) -> Text:
    return Text(printable(cell))
