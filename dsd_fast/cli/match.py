"""``dsd-fast match``: every image against every caption."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dsd_fast.cli import options
from dsd_fast.cli.captions import read_captions
from dsd_fast.cli.terminal import (
    EXIT_ERRORS,
    EXIT_INTERRUPTED,
    CommandError,
    counted,
    one_sentence,
    printable,
    storable,
)

# Images, and errors, that the terminal shows; the files have all.
_SHOWN = 20


def match(
    images: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP files.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the results.", show_default=False)],
    captions: Annotated[
        Path | None, typer.Option(help="UTF-8 text file, one caption per line; blank lines are skipped.")
    ] = None,
    caption: Annotated[list[str] | None, typer.Option(help="A caption; repeat for more.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Captions per image in the table and in results.json.")] = 5,
    heatmaps: Annotated[
        int,
        typer.Option(
            min=0, metavar="K", help="Heat maps of the words of each image's K best captions; makes the report too."
        ),
    ] = 0,
    report: Annotated[bool, typer.Option("--report", help="Write report.html, a page to look at.")] = False,
    model: options.ModelName = "mini",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    variant: options.Variant = None,
    local_files_only: options.Offline = False,
    adapter: options.Adapter = None,
    adapter_file: options.AdapterFile = None,
    timesteps: options.Timesteps = "10",
    draws: options.Draws = 1,
    seed: options.NoiseSeed = 0,
    attention_weight: options.AttentionWeight = 0.5,
    noise_weight: options.NoiseWeight = 1.0,
    layer: options.Layer = None,
    tokens: options.Tokens = "all",
    pool: options.Pool = "mean",
    official: options.Official = False,
    image_size: options.ImageSize = None,
    runtime: options.Runtime = None,
    memory_budget: options.MemoryBudget = None,
) -> None:
    """Score every image with every caption; higher is a better match.

    Writes scores.parquet (all scores) and results.json (the best captions of each image) into --out, with --report
    also report.html, a page that needs nothing else, and with --heatmaps K pictures and arrays of where each word of
    the K best captions is looked at. What an earlier run has left there is replaced. A file that cannot be used
    becomes an error row, and the run goes on.

    Exit code: 0 when every image was scored, 1 when some were not, 2 when nothing could be done, 130 after Ctrl-C,
    which keeps what has been scored.
    """
    with one_sentence():
        texts = _texts(captions, caption)
        if heatmaps > top_k:
            raise CommandError(f"--heatmaps: got {heatmaps}, expected at most --top-k, {top_k}")
        settings = options.match_settings(
            timesteps=timesteps,
            draws=draws,
            seed=seed,
            attention_weight=attention_weight,
            noise_weight=noise_weight,
            layer=layer,
            tokens=tokens,
            pool=pool,
            official=official,
            image_size=image_size,
            memory_budget=memory_budget,
        )
        from dsd_fast.cli.match_run import run
        from dsd_fast.matching import MatchConfig

        config = MatchConfig(**settings)
        load = partial(
            options.load_model,
            model,
            device=device,
            dtype=dtype,
            revision=revision,
            variant=variant,
            local_files_only=local_files_only,
            adapter=adapter,
            adapter_file=adapter_file,
        )
        summary = run(load, config, images, texts, out, top_k, {"adapter": adapter}, heatmaps, report, runtime)
    _show(summary, out)
    if not summary["complete"]:
        raise typer.Exit(EXIT_INTERRUPTED)
    raise typer.Exit(EXIT_ERRORS if summary["counts"]["errors"] else 0)


def _texts(file: Path | None, given: list[str] | None) -> list[str]:
    if (file is None) == (not given):
        raise CommandError("give either --captions FILE or --caption TEXT, one or more times")
    if file is not None:
        return read_captions(file)
    for number, text in enumerate(given or (), start=1):
        # Bytes that are no UTF-8 arrive as lone surrogates.
        if storable(text) != text:
            raise CommandError(f"--caption number {number} ({text!r}) is not UTF-8 text")
    return list(given or ())


def _show(summary: dict[str, Any], out: Path) -> None:
    """The best captions of the first images, the first errors, and the counts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    scored = [entry for entry in summary["images"] if "ranked" in entry]
    errors = [entry for entry in summary["images"] if "error" in entry]
    if scored:
        table = Table("image", "caption", "score", title=f"best of {counted(len(summary['captions']), 'caption')}")
        table.columns[2].justify = "right"
        for column in table.columns[:2]:
            column.overflow = "fold"
        for entry in scored[:_SHOWN]:
            for place, row in enumerate(entry["ranked"]):
                name = Text(printable(entry["path"])) if place == 0 else ""
                table.add_row(name, Text(printable(row["caption"])), f"{row['score']:.4f}")
            table.add_section()
        console.print(table)
    if len(scored) > _SHOWN:
        console.print(f"and {counted(len(scored) - _SHOWN, 'more image')} in results.json")
    if errors:
        table = Table("reason", "what", title="not scored")
        table.columns[1].overflow = "fold"
        for entry in errors[:_SHOWN]:
            table.add_row(entry["error"]["reason"], Text(printable(entry["error"]["message"])))
        console.print(table)
    if len(errors) > _SHOWN:
        console.print(f"and {counted(len(errors) - _SHOWN, 'more error')} in results.json")
    counts = summary["counts"]
    line = f"{counted(counts['images'], 'image')}: {counts['scored']:,} scored, {counted(counts['errors'], 'error')}"
    if not summary["complete"]:
        line += f", {counts['not_reached']:,} not reached before the interruption"
    pairs, seconds = counts["scored"] * counts["captions"], summary["seconds"]
    line += f". {counted(pairs, 'pair')} in {seconds:.1f} s ({pairs / max(seconds, 1e-9):.1f} pairs/s)"
    if summary["settings"]["heatmaps"]:
        line += f", heat maps in {summary['heatmap_seconds']:.1f} s"
    line += f". Results: {out}"
    console.print(Text(printable(line)), soft_wrap=True)
