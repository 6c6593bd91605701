"""Trains the mini model's ControlNet: `python -m dsd_fast.models.mini.control --out DIR`.

Its condition is Canny's edges of the picture. Kill it whenever you like; the same command goes on. The defaults made
the shipped weights.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import ControlNetModel, DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from dsd_fast.images.canny import canny
from dsd_fast.jobs import read_tensors, write_tensors
from dsd_fast.models.bundle import Model
from dsd_fast.models.load import load

from .loop import Recipe, fit, generator, noise_weights
from .networks import preprocess
from .stages import example

__all__ = ["app", "build_control", "edges", "export_control", "train_control"]

app = typer.Typer(add_completion=False)

DIGITS = 0.2
"""Share of digits among the training pictures."""


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and, at the end, of controlnet/.")] = Path(
        "runs/mini-control"
    ),
    steps: Annotated[int, typer.Option(min=1)] = 2400,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a step.")] = 32,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to train on.")] = 16_384,
    minutes: Annotated[float | None, typer.Option(help="Stop after this long; run again to go on.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default if not given.")] = None,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
    weights: Annotated[
        Path | None, typer.Option(help="Where the ControlNet goes; OUT/controlnet if not given.")
    ] = None,
    seed: int = 0,
) -> None:
    """Trains the ControlNet on the shipped mini model, whose own weights stay, and exports it in fp16."""
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    model = load("mini")
    net = build_control(model, seed)
    recipe = Recipe(steps, batch, 1e-3, seed=seed)
    if not train_control(model, net, recipe, out, pictures=pictures, minutes=minutes, save_every=save_every):
        console.print(f"stopped after {minutes} minutes; the same command goes on from here")
        raise typer.Exit(3)
    target = weights or out / "controlnet"
    console.print(f"{target}: {export_control(net, out, target) / 1e6:.2f} MB")


def build_control(model: Model, seed: int = 0) -> ControlNetModel:
    """An untrained ControlNet for the mini model's UNet, float32; its residuals are zero.

    Its encoder is the UNet's without the transformers, and starts from the UNet's weights: edges need no text, and
    without it the network is small and its residuals are the same for every prompt.
    """
    config = model.unet.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ControlNetModel(
            in_channels=config.in_channels,
            down_block_types=("DownBlock2D",) * len(config.block_out_channels),
            mid_block_type="UNetMidBlock2D",
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            cross_attention_dim=config.cross_attention_dim,
            attention_head_dim=tuple(config.attention_head_dim),
            # A halving less than there are entries: 64 × 64 pixels to the latents' 16 × 16.
            conditioning_embedding_out_channels=(16, 32, 64),
        )
    own, given = net.state_dict(), model.unet.state_dict()
    net.load_state_dict({key: value for key, value in given.items() if key in own}, strict=False)
    return net


def train_control(
    model: Model, net: ControlNetModel, recipe: Recipe, folder: Path, *, pictures: int = 16_384, **options: Any
) -> bool:
    """Trains `net` by the noise loss of the frozen UNet under its residuals (Zhang et al. 2023, equation 5).

    As there, half the captions are replaced by the empty one. Returns whether the training is complete.
    """
    data = _cache(model, folder / "control-cache.safetensors", pictures)
    unet = model.unet
    unet.set_attn_processor(AttnProcessor())
    net.train().to(memory_format=torch.channels_last)
    schedule = DDPMScheduler.from_config(model.scheduler_config)
    weights = noise_weights(schedule.alphas_cumprod)
    captions = [example(seed, DIGITS).caption for seed in range(pictures)]
    texts = {caption: number for number, caption in enumerate(dict.fromkeys(["", *captions]))}
    numbers = torch.tensor([texts[caption] for caption in captions], device="cpu")
    with torch.no_grad():
        states = model.encode_prompts(list(texts)).states
    batch = recipe.batch

    def loss(step: int) -> Tensor:
        draw = generator(recipe.seed, step)
        epoch, start = divmod(step * batch, pictures - pictures % batch)
        order = torch.randperm(pictures, generator=generator(recipe.seed + 1, epoch), device="cpu")[
            start : start + batch
        ]
        latents, condition = data["latents"][order].float(), unpacked(data["edges"][order])
        # One timestep from each of the batch's equal parts of the schedule.
        strata = torch.randperm(batch, generator=draw, device="cpu") + torch.rand(
            batch, generator=draw, dtype=torch.float32, device="cpu"
        )
        timesteps = (strata * (1000 / batch)).long().clamp(max=999)
        noise = torch.randn(latents.shape, generator=draw, dtype=torch.float32, device="cpu")
        text = states[
            torch.where(torch.rand(batch, generator=draw, dtype=torch.float32, device="cpu") < 0.5, 0, numbers[order])
        ]
        noised = schedule.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        down, mid = net(noised, timesteps, text, condition, return_dict=False)
        predicted = unet(
            noised, timesteps, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        total: Tensor = (weights[timesteps] * (predicted - noise).square().mean((1, 2, 3))).mean()
        return total

    return fit("control", dict(net.named_parameters()), loss, recipe, folder, **options)


def export_control(net: ControlNetModel, folder: Path, target: Path) -> int:
    """Writes the average that `train_control` left in `folder` as an fp16 ControlNet; returns its size in bytes."""
    net.load_state_dict(read_tensors(folder / "control.safetensors", "ema.")[0])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        net.half().save_pretrained(work, safe_serialization=True)
        for file in Path(work).iterdir():
            os.replace(file, target / file.name)
    return sum(file.stat().st_size for file in target.iterdir())


def edges(image: np.ndarray) -> np.ndarray:
    """Canny's edges of a uint8 (64, 64, 3) picture, bool (64, 64)."""
    return np.asarray(canny(Image.fromarray(image)))[..., 0] > 0


def packed(edge_maps: list[np.ndarray]) -> Tensor:
    """N maps of `edges` as uint8 (N, 64, 8), a bit a pixel."""
    return torch.from_numpy(np.packbits(np.stack(edge_maps), axis=-1))


def unpacked(bits: Tensor) -> Tensor:
    """What `packed` gave as a ControlNet's condition, float32 (N, 3, 64, 64) of 0 and 1, a view of one channel."""
    maps = torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1)).float()
    return maps[:, None].expand(-1, 3, -1, -1)


@torch.no_grad()
def _cache(model: Model, file: Path, pictures: int) -> dict[str, Tensor]:
    if file.exists():
        data, about = read_tensors(file)
        if about.get("pictures") == pictures:
            return data
    rows: dict[str, list[Tensor]] = {"latents": [], "edges": []}
    for start in track(range(0, pictures, 64), "pictures to latents and edges"):
        images = [example(seed, DIGITS).image for seed in range(start, min(start + 64, pictures))]
        rows["latents"].append(model.encode_images(preprocess(torch.from_numpy(np.stack(images)))).half())
        rows["edges"].append(packed([edges(image) for image in images]))
    data = {key: torch.cat(value) for key, value in rows.items()}
    write_tensors(file, data, {"pictures": pictures})
    return data


if __name__ == "__main__":
    app()
