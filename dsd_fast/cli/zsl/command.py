"""``dsd-fast zsl``: zero-shot learning by class tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dsd_fast.cli.groups import Options, command
from dsd_fast.cli.terminal import EXIT_INTERRUPTED, end, fail, show_errors, show_line, table


class ZslRequest(Options):
    """A run."""

    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings of the run.", show_default=False)]
    out: Annotated[Path | None, typer.Option(help="Folder of all that is made; the file's if none.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the file's if none.")] = None


@command
def zsl(request: ZslRequest) -> None:
    """Learn tokens for classes without images, make images by them, and classify with these: DIG-ZSL.

    CONFIG.toml names the images, the unseen classes, the model and the settings of each stage; docs/zsl.md lists them.
    Writes results.json and report.html into the output folder, beside the tokens and the generated images, which other
    commands take.

    The same command goes on where an earlier one was stopped, even by kill -9, to the same result.

    Exit code: 0 when all was done, 1 when images of the data set could not be used, 2 when nothing could be done, 130
    after Ctrl-C.
    """
    from dsd_fast.class_tokens.zsl import ZslConfig

    chosen = {name: value for name in ("out", "device") if (value := getattr(request, name)) is not None}
    config = replace(ZslConfig.read(request.config), **chosen)
    from dsd_fast.cli.zsl.run import run

    try:
        results = run(config)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on in {config.out}", EXIT_INTERRUPTED)
    _show(results, config.out)
    end(complete=True, errors=len(results["errors"]))


def _show(results: dict[str, Any], out: Path) -> None:
    """Prints the figures with their intervals, the first errors, and what they are of."""
    console, data = Console(), results["data"]
    whole = table("Means over classes, with 95 % intervals", "method", "classifier", "T1", "U", "S", "H", "λ", names=2)
    for row in results["table"]:
        cells = (f"{row[name]:.3f} ({low:.3f} to {high:.3f})" for name, (low, high) in row["intervals"].items())
        whole.add_row(row["method"], row["classifier"], *cells, f"{row['penalty']:.2f}")
    console.print(whole)
    show_errors(console, "not used", [("unusable", error) for error in results["errors"]], len(results["errors"]))
    if data["test_images_learned_from"]:
        show_line(console, f"Test images that are training images, too: {len(data['test_images_learned_from'])}")
    chosen = ", chosen by the validation classes" if data["validation"] else ", without validation classes"
    line = f"{len(data['unseen'])} unseen of {len(data['seen']) + len(data['unseen'])} classes"
    show_line(console, f"{line}, γ = {results['choice']['gamma']:g}{chosen}. Results: {out}")
