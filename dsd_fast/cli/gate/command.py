"""``dsd-fast gate``: which techniques keep features true to the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from dsd_fast.cli.gate.options import GateRequest
from dsd_fast.cli.groups import command
from dsd_fast.cli.options import parse_bytes
from dsd_fast.cli.terminal import CommandError, counted, end, show_errors, show_line


@command
def gate(request: GateRequest) -> None:
    """Measure which techniques keep features true to the images: prompts, ControlNets, LoRAs, and all together.

    Each technique by itself and their combination are compared with the empty prompt and nothing else. The content
    shift of features says how much is lost to the noise; img2img shows whether pictures come closer to the image.

    Writes gate.json, ranking.csv, scores.parquet, scores.png, distances.parquet, contact-sheet.png and report.html into
    --out. What an earlier run has left there is replaced.

    Exit code: 0 when every image was used, 1 when some could not be, 2 when nothing could be done, 130 after Ctrl-C.
    """
    prompts = request.techniques.prompts
    if sum(given is not None for given in (prompts.prompt, prompts.prompts, prompts.captioner)) > 1:
        raise CommandError("give one of --prompt TEXT, --prompts FILE and --captioner NAME")
    measure = request.measure.values()
    settings = {name: measure[name] for name in ("layers", "timesteps", "draws", "image_size")}
    settings["memory_budget"] = parse_bytes(request.memory_budget)
    from dsd_fast.cli.gate.run import run

    summary = run(request, settings)
    _show(summary, request.out)
    end(complete=True, errors=len(summary["errors"]))


def _show(summary: dict[str, Any], out: Path) -> None:
    """Prints the ranked table, the first errors, and what to take."""
    console = Console()
    console.print(summary["result"].table())
    rows = [(reason, message) for _, reason, message in summary["errors"]]
    show_errors(console, "not used", rows)
    used, errors = summary["images"], len(summary["errors"])
    line = (
        f"{counted(used + errors, 'image')}: {used:,} used, {counted(errors, 'error')}, in {summary['seconds']:.1f} s. "
    )
    show_line(console, f"{line}{summary['verdict']} Results: {out}")
