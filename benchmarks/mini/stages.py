"""The three trained stages of the mini model: VAE, CLIP, and UNet with its text tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.nn import functional as F

from benchmarks.mini.loop import NoiseLoss, Recipe, average, fit, generator, made_once, rows, uniform
from benchmarks.mini.networks import MAX_TOKENS, WIDTH, Components, preprocess
from dsd_fast.jobs import read_tensors, write_tensors
from dsd_fast.models.mini.digits import DIGIT_NAMES, TRAINING, caption, digit
from dsd_fast.models.mini.scenes import COLOURS, RELATIONS, SHAPES, SIZES, scene
from dsd_fast.training import CHECKPOINT

__all__ = ["Example", "example", "load", "train_clip", "train_unet", "train_vae"]

LATENT_STD = 1 / 0.18215
"""Standard deviation of the VAE's latents before Stable Diffusion's scaling factor makes it 1."""


@dataclass(frozen=True)
class Example:
    """A training picture, uint8 (64, 64, 3), with a true caption and one that is nearly true."""

    image: np.ndarray
    caption: str
    negative: str


def example(seed: int, digits: float = 0.12) -> Example:
    """The training example of a seed: a digit with the probability `digits`, else a scene."""
    rng = np.random.default_rng((seed, 3))
    if rng.random() < digits:
        drawn = digit(int(rng.integers(len(TRAINING))), seed)
        wrong = (drawn.label + int(rng.integers(1, 10))) % len(DIGIT_NAMES)
        return Example(drawn.image, drawn.caption, caption(wrong))
    picture = scene(seed)
    negatives = picture.negatives()
    if "relation" in negatives and rng.random() < 1 / 3:
        return Example(picture.image, picture.caption, negatives["relation"])
    kinds = [kind for kind in negatives if kind != "relation"]
    return Example(picture.image, picture.caption, negatives[kinds[int(rng.integers(len(kinds)))]])


def load(parts: Components, folder: Path) -> list[str]:
    """Loads what the stages have left in `folder` into the networks; returns the stages that were there."""
    found = []
    if (file := folder / "vae-final.safetensors").exists():
        parts.vae.load_state_dict(read_tensors(file)[0])
        found.append("vae")
    for name, prefixes in {"clip": {"clip.": parts.clip}, "unet": {"unet.": parts.unet, "clip.": parts.clip}}.items():
        if (folder / name / CHECKPOINT).exists():
            for prefix, module in prefixes.items():
                missing, unexpected = module.load_state_dict(average(folder, name, prefix), strict=False)
                if unexpected or (missing and name == "clip"):
                    raise ValueError(f"{folder / name} does not fit: missing {missing}, unexpected {unexpected}")
            found.append(name)
    return found


def train_vae(parts: Components, recipe: Recipe, folder: Path, *, measured: int = 2048, **options: Any) -> bool:
    """Trains the autoencoder, then folds the latents' mean and scale into its 1×1 convolutions.

    `measured` is the number of pictures that mean and scale are taken from.
    """
    vae = parts.vae.train().to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        pixels = preprocess(_images(range(step * recipe.batch, (step + 1) * recipe.batch)))
        posterior = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
        decoded = vae.decode(posterior.sample(generator(recipe.seed, step))).sample
        kl: Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        return 5 * F.mse_loss(decoded, pixels) + F.l1_loss(decoded, pixels) + 1e-4 * kl

    done = fit("vae", dict(vae.named_parameters()), loss, recipe, folder, **options)
    vae.load_state_dict(average(folder, "vae"))
    standardise(parts, measured)
    write_tensors(folder / "vae-final.safetensors", vae.state_dict())
    return done


@torch.no_grad()
def standardise(parts: Components, pictures: int = 2048) -> None:
    """Gives every latent channel mean 0 and deviation `LATENT_STD`, and leaves what is reconstructed as it is."""
    vae = parts.vae.eval()
    posteriors = [vae.encode(preprocess(_images(range(i, i + 32)))).latent_dist for i in range(0, pictures, 32)]
    latents = torch.cat([posterior.mean for posterior in posteriors])
    mean, scale = latents.mean((0, 2, 3)), LATENT_STD / latents.std((0, 2, 3))
    # A channel that the decoder does not need has a posterior as wide as the prior, whose samples would drown its mean
    # and be unlike anything the UNet is trained on; narrowing it costs the decoder nothing.
    width = torch.cat([posterior.std for posterior in posteriors]).mean((0, 2, 3)) * scale
    narrow = (0.25 * LATENT_STD / width).clamp(max=1)
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    encoder.bias[:channels].sub_(mean).mul_(scale)
    encoder.weight[:channels].mul_(scale.view(-1, 1, 1, 1))
    encoder.bias[channels:].add_(2 * (scale * narrow).log())
    decoder.bias.add_(decoder.weight[:, :, 0, 0] @ mean)
    decoder.weight.div_(scale.view(1, -1, 1, 1))


def train_clip(parts: Components, recipe: Recipe, folder: Path, **options: Any) -> bool:
    """Trains both towers: InfoNCE over the batch, each picture with one nearly true caption besides, and a description.

    A linear head, the same for pictures and captions and not kept, reads from the common embedding what the caption
    says. Without it the towers pass over what the batch seldom asks about, such as the relation of two objects.
    """
    clip = parts.clip.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = torch.nn.Linear(WIDTH, sum(FACTS))

    def loss(step: int) -> Tensor:
        batch = [example(seed, 0.2) for seed in range(step * recipe.batch, (step + 1) * recipe.batch)]
        captions = [item.caption for item in batch] + [item.negative for item in batch]
        tokens = _tokens(parts, captions)
        pixels = preprocess(torch.from_numpy(np.stack([item.image for item in batch])))
        images = F.normalize(clip.visual_projection(clip.vision_model(pixels).pooler_output), dim=-1)
        texts = clip.text_projection(clip.text_model(tokens).pooler_output)
        match = contrastive(images, texts, tokens[: len(batch)], clip.logit_scale)
        said = torch.tensor([facts(text) for text in captions], device="cpu")
        read = head(10 * torch.cat((F.normalize(texts, dim=-1), images))).split(FACTS, -1)
        wanted = torch.cat((said, said[: len(batch)])).unbind(-1)
        # Summed, since the mean over a batch in which no caption answers is no number.
        pairs = zip(read, wanted, strict=True)
        missed = torch.stack([F.cross_entropy(*pair, ignore_index=-1, reduction="sum") for pair in pairs]).sum()
        return match + 0.25 * missed / len(images)

    names = {f"clip.{key}": p for key, p in clip.named_parameters()}
    names |= {f"head.{key}": p for key, p in head.named_parameters()}
    return fit("clip", names, loss, recipe, folder, **options)


FACTS = ((len(SHAPES) + 1, len(RELATIONS) + 1, len(SIZES)) * len(COLOURS)) + (len(DIGIT_NAMES) + 1,)
"""Number of answers to each of `facts`'s questions."""


def facts(text: str) -> list[int]:
    """What a caption of the task says: for each colour its shape, its side and its size, then the digit.

    The last answer of shape, side and digit is "none"; an unnamed size is -1.
    """
    words = text.split()
    if words[:2] == ["a", "photo"]:
        return [len(SHAPES), len(RELATIONS), -1] * len(COLOURS) + [DIGIT_NAMES.index(words[-1])]
    relation = next((name for name in RELATIONS if f" {name} " in text), None)
    phrases = text.split(f" {relation} ") if relation else [text]
    said: dict[str, list[int]] = {}
    for phrase, side in zip(phrases, (relation, RELATIONS.get(relation or "")), strict=False):
        *size, colour, shape = phrase.split()[1:]
        place = list(RELATIONS).index(side) if side else len(RELATIONS)
        said[colour] = [SHAPES.index(shape), place, list(SIZES).index(size[0]) if size else -1]
    rows = [said.get(colour, [len(SHAPES), len(RELATIONS), -1]) for colour in COLOURS]
    return [answer for row in rows for answer in row] + [len(DIGIT_NAMES)]


def contrastive(images: Tensor, texts: Tensor, tokens: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE. `images` (B, E) are normalised; `texts` (2B, E) are not: captions, then negatives.

    Captions that are equal do not count as each other's negatives.
    """
    true, wrong = F.normalize(texts, dim=-1).chunk(2)
    scale = logit_scale.exp().clamp(max=100)
    logits = scale * images @ true.T
    same = (tokens[:, None] == tokens[None]).all(-1) & ~torch.eye(len(tokens), dtype=torch.bool, device="cpu")
    logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(tokens), device="cpu")
    own = scale * (images * wrong).sum(-1, keepdim=True)
    return (F.cross_entropy(torch.cat((logits, own), 1), target) + F.cross_entropy(logits.T, target)) / 2


def train_unet(
    parts: Components,
    recipe: Recipe,
    folder: Path,
    *,
    pictures: int = 81_920,
    bfloat16: bool = True,
    **options: Any,
) -> bool:
    """Trains the UNet and, by the same noise loss and the contrastive loss, the text tower of CLIP.

    `bfloat16` multiplies matrices in half precision, faster on a CPU with AVX512-BF16; weights stay float32.
    """
    data = made_once(folder / "cache.safetensors", pictures, lambda numbers: _ready(parts, numbers))
    clip, unet = parts.clip.train(), parts.unet.train()
    unet.set_attn_processor(AttnProcessor())
    unet.to(memory_format=torch.channels_last)
    noise_loss = NoiseLoss(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    empty = _tokens(parts, [""])[0]
    batch = recipe.batch

    def loss(step: int) -> Tensor:
        random, order = generator(recipe.seed, step), rows(recipe, step, pictures)
        latents, tokens = data["latents"][order].float(), data["tokens"][order].long()
        negatives, images = data["negatives"][order].long(), data["images"][order].float()
        noised, timesteps, noise = noise_loss.draw(latents, random)
        dropped = uniform(batch, random) < 0.1
        shown = torch.where(dropped[:, None], empty, tokens)

        # The contrastive loss keeps CLIP aligned; one step in four is enough and saves half the text work of the rest.
        aligned = step % 4 == 0
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            text = clip.text_model(torch.cat((shown, negatives)) if aligned else shown)
            predicted = unet(noised, timesteps, text.last_hidden_state[:batch]).sample
        total = noise_loss(predicted.float(), noise, timesteps)
        if not aligned:
            return total
        projected = clip.text_projection(text.pooler_output.float())
        kept = ~dropped
        match = contrastive(images[kept], projected[torch.cat((kept, kept))], tokens[kept], clip.logit_scale)
        return total + 0.08 * match

    text = {f"clip.{k}": p for k, p in clip.named_parameters() if not k.startswith("visual")}
    text = {k: p for k, p in text.items() if not k.startswith("clip.vision")}
    names = {f"unet.{k}": p for k, p in unet.named_parameters()} | text
    return fit("unet", names, loss, recipe, folder, rates=lambda k: 0.3 if k.startswith("clip.") else 1.0, **options)


def _ready(parts: Components, numbers: range) -> dict[str, Tensor]:
    """Pictures as the UNet's training needs them, from the networks that are trained before it."""
    parts.vae.eval()
    parts.clip.eval()
    batch = [example(seed, 0.3) for seed in numbers]
    pixels = preprocess(torch.from_numpy(np.stack([item.image for item in batch])))
    latents = parts.vae.encode(pixels).latent_dist.mean * parts.vae.config.scaling_factor
    embeds = parts.clip.visual_projection(parts.clip.vision_model(pixels).pooler_output)
    return {
        "latents": latents.half(),
        "images": F.normalize(embeds, dim=-1).half(),
        "tokens": _tokens(parts, [item.caption for item in batch]).short(),
        "negatives": _tokens(parts, [item.negative for item in batch]).short(),
    }


def _images(seeds: range) -> Tensor:
    return torch.from_numpy(np.stack([example(seed).image for seed in seeds]))


def _tokens(parts: Components, captions: list[str]) -> Tensor:
    options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
    ids: Tensor = parts.tokenizer(captions, **options).input_ids
    return ids
