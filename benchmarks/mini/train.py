"""Trains the mini model, its ControlNet and its LoRA from nothing: `python -m benchmarks.mini.train COMMAND --out DIR`.

Kill it whenever you like; the same command goes on. The defaults made the shipped weights.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.mini.control import build_control, export_control, train_control
from benchmarks.mini.loop import Recipe
from benchmarks.mini.lora import build_lora, export_lora, train_lora
from benchmarks.mini.networks import build, export
from benchmarks.mini.stages import load, train_clip, train_unet, train_vae
from dsd_fast.models.load import load as load_model

__all__ = ["app"]

app = typer.Typer(add_completion=False)

Batch = Annotated[int, typer.Option(min=1, help="Pictures a step.")]
Minutes = Annotated[float | None, typer.Option(help="Stop each training after this long; run again to go on.")]
Out = Annotated[Path, typer.Option(help="Folder of checkpoints and, at the end, of what is exported.")]
Pictures = Annotated[int, typer.Option(min=1, help="Pictures that the UNet, or what is added to it, is trained on.")]
SaveEvery = Annotated[float, typer.Option(help="Seconds between checkpoints.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default if not given.")]
Weights = Annotated[Path | None, typer.Option(help="Where the weights go; a folder in OUT if not given.")]


class Stage(StrEnum):
    """What to run; `all` is the four in this order."""

    vae = "vae"
    clip = "clip"
    unet = "unet"
    export = "export"
    all = "all"


@app.command()
def model(
    out: Out = Path("runs/mini"),
    stage: Annotated[Stage, typer.Option(help="The stage to run.")] = Stage.all,
    vae_steps: Steps = 2700,
    clip_steps: Steps = 1800,
    unet_steps: Steps = 9600,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a step; CLIP takes twice as many, the VAE half.")] = 32,
    pictures: Pictures = 81_920,
    bfloat16: Annotated[bool, typer.Option(help="UNet stage: half-precision products, float32 weights.")] = True,
    minutes: Minutes = None,
    threads: Threads = None,
    save_every: SaveEvery = 60.0,
    weights: Weights = None,
    seed: int = 0,
) -> None:
    """Runs one stage or all of them, going on from the checkpoints in OUT.

    The VAE and CLIP stages do not depend on each other and may run at the same time in two processes with one OUT.
    """
    _begin(threads)
    parts = build(seed)
    load(parts, out)
    limits: dict[str, Any] = {"minutes": minutes, "save_every": save_every}
    for name in list(Stage)[:-1] if stage is Stage.all else [stage]:
        if name is Stage.vae:
            done = train_vae(parts, Recipe(vae_steps, max(1, batch // 2), 2e-3, seed=seed), out, **limits)
        elif name is Stage.clip:
            done = train_clip(parts, Recipe(clip_steps, 2 * batch, 1e-3, seed=seed), out, **limits)
        elif name is Stage.unet:
            recipe = Recipe(unet_steps, batch, 1e-3, ema=0.999, seed=seed)
            done = train_unet(parts, recipe, out, pictures=pictures, bfloat16=bfloat16, **limits)
        else:
            # A stage leaves its last weights in the networks; what is exported is their average.
            missing = sorted({"vae", "clip", "unet"} - set(load(parts, out)))
            _tell(weights or out / "weights", export(parts, weights or out / "weights"))
            if missing:
                Console().print(f"untrained: {', '.join(missing)}")
            continue
        _check_done(done, name, minutes)
        load(parts, out)


@app.command()
def control(
    out: Out = Path("runs/mini-control"),
    steps: Steps = 2400,
    batch: Batch = 32,
    pictures: Pictures = 16_384,
    minutes: Minutes = None,
    threads: Threads = None,
    save_every: SaveEvery = 60.0,
    weights: Weights = None,
    seed: int = 0,
) -> None:
    """Trains the ControlNet on the shipped mini model, whose own weights stay, and exports it in fp16."""
    _begin(threads)
    base = load_model("mini")
    net, recipe = build_control(base, seed), Recipe(steps, batch, 1e-3, seed=seed)
    done = train_control(base, net, recipe, out, pictures=pictures, minutes=minutes, save_every=save_every)
    _check_done(done, "control", minutes)
    target = weights or out / "controlnet"
    _tell(target, export_control(net, out, target))


@app.command()
def lora(
    out: Out = Path("runs/mini-lora"),
    steps: Steps = 300,
    batch: Batch = 15,
    pictures: Pictures = 30,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    minutes: Minutes = None,
    threads: Threads = None,
    save_every: SaveEvery = 60.0,
    weights: Weights = None,
    seed: int = 0,
) -> None:
    """Trains the LoRA on the shipped mini model, whose own weights stay, and exports it in fp16."""
    _begin(threads)
    base = load_model("mini")
    parameters, recipe = build_lora(base, rank, seed), Recipe(steps, batch, 1e-3, warmup=10, ema=0.98, seed=seed)
    done = train_lora(base, parameters, recipe, out, pictures=pictures, minutes=minutes, save_every=save_every)
    _check_done(done, "lora", minutes)
    target = weights or out / "lora"
    _tell(target, export_lora(base, parameters, out, target))


def _begin(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _check_done(done: bool, name: str, minutes: float | None) -> None:
    if not done:
        Console().print(f"{name}: stopped after {minutes} minutes; the same command goes on from here")
        raise typer.Exit(3)


def _tell(target: Path, size: int) -> None:
    Console().print(f"{target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    # AdamW's moments of parts that hardly learn shrink to denormals, which cost a processor a hundred times as much.
    torch.set_flush_denormal(True)
    app()
