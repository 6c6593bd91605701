"""Trains the mini model from nothing: `python -m benchmarks.mini.train --out DIR`.

Kill it whenever you like; the same command goes on. The defaults made the shipped weights. The VAE and CLIP stages do
not depend on each other and may run at the same time in two processes with one `--out`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.mini.loop import Minutes, Pictures, Recipe, SaveEvery, Steps, Threads, begin, check_done
from benchmarks.mini.networks import build, export
from benchmarks.mini.stages import load, train_clip, train_unet, train_vae

__all__ = ["app"]

app = typer.Typer(add_completion=False)


class Stage(StrEnum):
    """What to run; `all` is the four in this order."""

    vae = "vae"
    clip = "clip"
    unet = "unet"
    export = "export"
    all = "all"


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and, after export, of weights/.")] = Path(
        "runs/mini"
    ),
    stage: Annotated[Stage, typer.Option(help="The stage to run.")] = Stage.all,
    vae_steps: Steps = 2700,
    clip_steps: Steps = 1800,
    unet_steps: Steps = 9600,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a step; CLIP takes twice as many.")] = 32,
    pictures: Pictures = 81_920,
    bfloat16: Annotated[bool, typer.Option(help="UNet stage: half-precision products, float32 weights.")] = True,
    minutes: Minutes = None,
    threads: Threads = None,
    save_every: SaveEvery = 60.0,
    weights: Annotated[Path | None, typer.Option(help="Where export writes; OUT/weights if not given.")] = None,
    seed: int = 0,
) -> None:
    """Runs one stage or all of them, going on from the checkpoints in OUT."""
    begin(threads)
    parts = build(seed)
    load(parts, out)
    limits: dict[str, Any] = {"minutes": minutes, "save_every": save_every}
    wanted = list(Stage)[:-1] if stage is Stage.all else [stage]
    for name in wanted:
        if name is Stage.vae:
            recipe = Recipe(vae_steps, max(1, batch // 2), 2e-3, seed=seed)
            done = train_vae(parts, recipe, out, **limits)
        elif name is Stage.clip:
            recipe = Recipe(clip_steps, 2 * batch, 1e-3, seed=seed)
            done = train_clip(parts, recipe, out, **limits)
        elif name is Stage.unet:
            recipe = Recipe(unet_steps, batch, 1e-3, ema=0.999, seed=seed)
            done = train_unet(parts, recipe, out, pictures=pictures, bfloat16=bfloat16, **limits)
        else:
            # A stage leaves its last weights in the networks; what is exported is their average.
            found = load(parts, out)
            target = weights or out / "weights"
            size = export(parts, target)
            missing = [s for s in ("vae", "clip", "unet") if s not in found]
            Console().print(
                f"{target}: {size / 1e6:.2f} MB" + (f", untrained: {', '.join(missing)}" if missing else "")
            )
            continue
        check_done(done, name, minutes)
        load(parts, out)


if __name__ == "__main__":
    app()
