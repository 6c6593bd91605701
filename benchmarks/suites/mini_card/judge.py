"""A convolutional network that says what a picture of the mini model's task shows.

It is trained apart from the model that it judges: on scenes of its own, held-out pairs included, since it must
recognise them, and half of them encoded and decoded by the model's VAE, since that is what generated pictures have
gone through.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.mini.loop import Recipe, average, fit, generator, made_once
from benchmarks.mini.networks import preprocess
from benchmarks.mini.stages import FACTS
from dsd_fast.jobs import read_tensors, write_tensors
from dsd_fast.models.mini.digits import DIGIT_NAMES, TRAINING, digit
from dsd_fast.models.mini.scenes import COLOURS, RELATIONS, SHAPES, SIZES, Scene, scene

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["Seen", "answers", "cache_folder", "folder_of", "judge", "learn", "look", "seen", "to_bytes", "train"]

FIRST_SEED = 500_000_000
"""Of the judge's scenes: neither the model's training scenes nor those for evaluation."""

_RECIPE = Recipe(steps=3000, batch=64, learning_rate=2e-3, weight_decay=0.02, ema=0.99)
_PICTURES = 16_384
_DIGITS = 0.25
_STRENGTH = 0.15

Example = tuple[np.ndarray, list[int]]
"""A picture, uint8 (64, 64, 3), and the right answers; −1 is none."""


@dataclass(frozen=True)
class Seen:
    """What a picture shows.

    Attributes:
        objects: colour → (shape, size).
        sides: colour → where the object lies relative to the other; empty unless there are two.
        digit: 0 to 9, or None.
    """

    objects: dict[str, tuple[str, str]]
    sides: dict[str, str]
    digit: int | None


class _Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 96)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, 2 if place < 3 else 1, 1)
            for place, (before, after) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.narrow = nn.Conv2d(widths[-1], 24, 1)
        self.hidden = nn.Linear(24 * 8 * 8, 256)
        self.answer = nn.Linear(256, sum(FACTS))

    def forward(self, pixels: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            pixels = F.silu(norm(convolution(pixels)))
        hidden = F.silu(self.hidden(F.dropout(self.narrow(pixels).flatten(1), 0.1, self.training)))
        return self.answer(hidden)  # type: ignore[no-any-return]


def answers(scene: Scene) -> list[int]:
    """The right answers to the questions of `facts` for a scene."""
    sides = (scene.relation, RELATIONS[scene.relation]) if scene.relation else (None,)
    said = {}
    for item, side in zip(scene.objects, sides, strict=True):
        place = list(RELATIONS).index(side) if side else len(RELATIONS)
        said[item.colour] = [SHAPES.index(item.shape), place, list(SIZES).index(item.size)]
    none = [len(SHAPES), len(RELATIONS), -1]
    return [answer for colour in COLOURS for answer in said.get(colour, none)] + [len(DIGIT_NAMES)]


def seen(given: list[int]) -> Seen:
    """Answers in words."""
    rows = {colour: given[3 * place : 3 * place + 3] for place, colour in enumerate(COLOURS)}
    rows = {colour: row for colour, row in rows.items() if row[0] < len(SHAPES)}
    return Seen(
        {colour: (SHAPES[row[0]], tuple(SIZES)[row[2]]) for colour, row in rows.items()},
        {colour: tuple(RELATIONS)[row[1]] for colour, row in rows.items() if row[1] < len(RELATIONS)},
        given[-1] if given[-1] < len(DIGIT_NAMES) else None,
    )


def cache_folder(vae: AutoencoderKL) -> Path:
    """Where the judge of this VAE's pictures is kept, see :func:`folder_of`."""
    return folder_of("judge", vae, _RECIPE, _PICTURES, _DIGITS, _STRENGTH, FIRST_SEED, _Judge())


def folder_of(name: str, vae: AutoencoderKL, *made_by: object) -> Path:
    """Where a network that sees this VAE's pictures is kept, under `$XDG_CACHE_HOME` or `~/.cache`.

    The folder's name depends on the VAE's weights and on how the network is trained.
    """
    digest = hashlib.sha256(repr(made_by).encode())
    for key, value in sorted(vae.state_dict().items()):
        digest.update(key.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "dsd_fast" / f"{name}-{digest.hexdigest()[:16]}"


def judge(vae: AutoencoderKL, folder: Path | None = None) -> nn.Module:
    """The trained judge, from `folder` or else from the cache; trained first where there is none (minutes)."""
    folder = folder or cache_folder(vae)
    if not (folder / "judge-final.safetensors").exists():
        train(vae, folder)
    network = _Judge()
    network.load_state_dict(read_tensors(folder / "judge-final.safetensors")[0])
    return network.eval()


def train(vae: AutoencoderKL, folder: Path, *, recipe: Recipe = _RECIPE, pictures: int = _PICTURES) -> None:
    """Trains a judge into `folder`; killed, it goes on from its last checkpoint when called again."""
    learn("judge", _Judge, FACTS, _example, vae, folder, recipe, pictures)


def learn(
    name: str,
    make: Callable[[], nn.Module],
    questions: Sequence[int],
    example: Callable[[int], Example],
    vae: AutoencoderKL,
    folder: Path,
    recipe: Recipe,
    pictures: int,
) -> None:
    """Trains a network that answers questions about pictures, into `<folder>/<name>-final.safetensors`.

    Args:
        make: the untrained network, (n, 3, 64, 64) → (n, sum of `questions`).
        questions: how many answers each has.
        example: what gives the picture of each number.
    """
    data = made_once(folder / "pictures.safetensors", pictures, lambda numbers: _pictures(vae, numbers, example))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = make().train()
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(step: int) -> Tensor:
        draw = generator(recipe.seed, step)
        rows = torch.randint(pictures, (recipe.batch,), generator=draw)
        drawn, decoded = data["drawn"][rows], data["decoded"][rows]
        chosen = torch.where((torch.rand(recipe.batch, generator=draw) < 0.5).view(-1, 1, 1, 1), drawn, decoded)
        pixels = preprocess(chosen)
        # What a sampler leaves behind is not what the VAE leaves behind: a network must not depend on either's texture.
        strength = _STRENGTH * torch.rand(recipe.batch, 1, 1, 1, generator=draw)
        pixels = pixels + strength * torch.randn(pixels.shape, generator=draw)
        wanted = data["answers"][rows].long().unbind(-1)
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(step)
            given = network(pixels.contiguous(memory_format=torch.channels_last)).split(questions, -1)
        pairs = zip(given, wanted, strict=True)
        return torch.stack([_cross_entropy(logits.float(), right) for logits, right in pairs]).sum()

    fit(name, dict(network.named_parameters()), loss, recipe, folder)
    write_tensors(folder / f"{name}-final.safetensors", average(folder, name))
    (folder / "pictures.safetensors").unlink()
    shutil.rmtree(folder / name)


@torch.inference_mode()
def look(network: nn.Module, images: np.ndarray) -> list[Seen]:
    """What each of the images shows; `images` are uint8 (N, 64, 64, 3)."""
    given = []
    device = next(network.parameters()).device
    for start in range(0, len(images), 64):
        logits = network(preprocess(torch.from_numpy(images[start : start + 64])).to(device))
        given.append(torch.stack([part.argmax(-1) for part in logits.split(FACTS, -1)], -1))
    return [seen(row) for row in torch.cat(given).tolist()]


def _cross_entropy(logits: Tensor, right: Tensor) -> Tensor:
    # The mean over a batch without any answer is no number.
    return F.cross_entropy(logits, right, ignore_index=-1, reduction="sum") / len(right)


def _example(number: int) -> Example:
    seed = FIRST_SEED + number
    rng = np.random.default_rng((seed, 5))
    if rng.random() < _DIGITS:
        item = digit(int(rng.integers(len(TRAINING))), seed)
        return item.image, [len(SHAPES), len(RELATIONS), -1] * len(COLOURS) + [item.label]
    picture = scene(seed, held_out=None)
    return picture.image, answers(picture)


def _pictures(vae: AutoencoderKL, numbers: range, example: Callable[[int], Example]) -> dict[str, Tensor]:
    drawn, wanted = zip(*map(example, numbers), strict=True)
    images = torch.from_numpy(np.stack(drawn))
    decoded = to_bytes(vae.decode(vae.encode(preprocess(images).to(vae.device)).latent_dist.mean).sample)
    return {"drawn": images, "decoded": decoded, "answers": torch.tensor(wanted, dtype=torch.int8)}


def to_bytes(pixels: Tensor) -> Tensor:
    """(N, 3, h, w) in [-1, 1], clamped, to uint8 (N, h, w, 3) on the CPU."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
