"""Trains the mini model's LoRA: `python -m dsd_fast.models.mini.lora --out DIR`.

A LoRA for features fits the model to the pictures of a task (Meng et al., arXiv 2410.06719, section 5.3): about 30 of
them, each with its caption and without, under the noise loss. The mini model knows its own scenes already, so here they
lie in the dark (`night`), as it has never seen them; captions, masks and keypoints stay true. Kill it whenever you
like; the same command goes on. The defaults made the shipped weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from peft import LoraConfig
from rich.console import Console
from torch import Tensor
from torch.nn import Parameter

from dsd_fast.jobs import read_tensors
from dsd_fast.models.bundle import Model
from dsd_fast.models.load import load
from dsd_fast.models.lora import save_lora

from .loop import Recipe, fit, generator, noise_weights
from .networks import preprocess
from .scenes import scene

__all__ = ["app", "build_lora", "export_lora", "night", "train_lora"]

app = typer.Typer(add_completion=False)

NAME = "mini"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
"""Attention and, as LoCon has it, the convolutions of the residual blocks."""

MOONLIGHT = np.array([0.6, 0.8, 1.1])
"""What is left of red, green and blue light at night, beside the exposure."""


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and, at the end, of lora/.")] = Path(
        "runs/mini-lora"
    ),
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a step.")] = 15,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to train on.")] = 30,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    minutes: Annotated[float | None, typer.Option(help="Stop after this long; run again to go on.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default if not given.")] = None,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
    weights: Annotated[Path | None, typer.Option(help="Where the LoRA goes; OUT/lora if not given.")] = None,
    seed: int = 0,
) -> None:
    """Trains the LoRA on the shipped mini model, whose own weights stay, and exports it in fp16."""
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    model = load("mini")
    parameters = build_lora(model, rank, seed)
    recipe = Recipe(steps, batch, 1e-3, warmup=10, ema=0.98, seed=seed)
    if not train_lora(model, parameters, recipe, out, pictures=pictures, minutes=minutes, save_every=save_every):
        console.print(f"stopped after {minutes} minutes; the same command goes on from here")
        raise typer.Exit(3)
    target = weights or out / "lora"
    console.print(f"{target}: {export_lora(model, parameters, out, target) / 1e6:.2f} MB")


def night(image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """A picture as a camera takes it at night: dark, bluish and noisy.

    Args:
        image: uint8 (64, 64, 3).
        seed: 0 or more, the scene's own; it draws the exposure, between 0.2 and 0.35, and the noise.

    Returns:
        uint8 (64, 64, 3).
    """
    rng = np.random.default_rng((seed, 4))
    exposure = rng.uniform(0.2, 0.35) * MOONLIGHT
    dark = exposure * image + 10 + rng.normal(0, 8, image.shape)
    return (np.clip(dark, 0, 255) + 0.5).astype(np.uint8)


def build_lora(model: Model, rank: int = 16, seed: int = 0) -> dict[str, Parameter]:
    """Adds an untrained LoRA, which changes nothing yet, to the model's UNet; returns its parameters by name.

    Its alpha is half its rank, as in the paper.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank / 2, target_modules=TARGETS), NAME)
    return {name: value for name, value in model.unet.named_parameters() if value.requires_grad}


def train_lora(
    model: Model,
    parameters: dict[str, Parameter],
    recipe: Recipe,
    folder: Path,
    *,
    pictures: int = 30,
    **options: Any,
) -> bool:
    """Trains the LoRA by the noise loss; a step has each picture's caption or none. Returns whether it is complete."""
    unet = model.unet
    unet.set_attn_processor(AttnProcessor())
    drawn = [scene(seed) for seed in range(pictures)]
    images = torch.from_numpy(np.stack([night(picture.image, picture.seed) for picture in drawn]))
    with torch.no_grad():
        clean = model.encode_images(preprocess(images))
        states = model.encode_prompts(["", *(picture.caption for picture in drawn)]).states
    schedule = DDPMScheduler.from_config(model.scheduler_config)
    weights = noise_weights(schedule.alphas_cumprod)
    batch = recipe.batch

    def loss(step: int) -> Tensor:
        draw = generator(recipe.seed, step)
        order = torch.randint(pictures, (batch,), generator=draw, device="cpu")
        strata = torch.randperm(batch, generator=draw, device="cpu") + torch.rand(
            batch, generator=draw, dtype=torch.float32, device="cpu"
        )
        timesteps = (strata * (1000 / batch)).long().clamp(max=999)
        noise = torch.randn(len(order), *clean.shape[1:], generator=draw, dtype=torch.float32, device="cpu")
        text = states[
            torch.where(torch.rand(batch, generator=draw, dtype=torch.float32, device="cpu") < 0.5, 0, order + 1)
        ]
        predicted = unet(schedule.add_noise(clean[order], noise, timesteps), timesteps, text).sample
        total: Tensor = (weights[timesteps] * (predicted - noise).square().mean((1, 2, 3))).mean()
        return total

    return fit("lora", parameters, loss, recipe, folder, **options)


@torch.no_grad()
def export_lora(model: Model, parameters: dict[str, Parameter], folder: Path, target: Path) -> int:
    """Writes the average that `train_lora` left in `folder` as an fp16 LoRA of diffusers; returns its size in bytes."""
    average, _ = read_tensors(folder / "lora.safetensors", "ema.")
    for name, value in parameters.items():
        value.data = average[name].half()
    file = target / "pytorch_lora_weights.safetensors"
    save_lora(model.unet, NAME, file)
    return file.stat().st_size


if __name__ == "__main__":
    app()
