"""The official few-shot adaptation of the DSD score (He et al., arXiv 2305.10722; dsd_train.py of eric-ai-lab/DSD).

A group is one image and K texts, or K images and one text, of which one is right. Each candidate k is scored alone, at
its own timestep t_k and with its own noise ε_k, by the score of :mod:`dsd_fast.reference.matching` at that timestep:

    s_k = 2 · attention_weight · a + noise_weight · b
    loss = max(0, margin + max over the wrong candidates of s − s_right)

As in the official code a candidate costs one VAE encode of 1 image, two text-encoder calls of 1 row (the caption, the
empty text) and one UNet call of 2 rows, kept for the gradient by its inputs alone (`torch.utils.checkpoint` around the
whole UNet, not reentrant), so that the backward pass calls the UNet K times more. It does so for every candidate,
although only the right one and the best of the wrong ones have a gradient that is not zero, and none if the margin is
kept. Each step has one group; AdamW with betas 0.9 and 0.999, ε = 1e-8, weight decay 1e-2 and a constant learning rate
(the official 500 warm-up steps do nothing with its constant schedule); gradients are really clipped to norm 1 first.

What is trained is what requires a gradient in the pipeline's UNet, which the caller prepares. The official adapter is

    LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"])

Deviations beside those of :mod:`dsd_fast.reference.matching`: timesteps, noise, posterior samples and the order of the
groups come from a seed and depend on (seed, step, candidate) alone, not on the state of one global generator; the right
candidate may have any place, not the first alone; the caption's padding is seen by the text encoder as in the official
inference, whose scores the adaptation is for (the official training hides it there, so that the padding's states, a
part of the score, are others than at inference); a caption that is too long is refused; layers that do not score keep
the pipeline's processors, where the official code writes out the attention of all layers: the reference is no slower
than the official recipe. The network keeps its type: there is no mixed precision.

Letters: K candidates, C channels, h and w the latents' height and width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsd_fast.reference.inputs import (
    added_conditions,
    encode_images,
    encode_text,
    latent_shape,
    preprocess,
    resolve_timesteps,
    seeded,
    upcast_vae,
)
from dsd_fast.reference.matching import SECTIONS, _pair_terms

__all__ = ["draws", "fit", "group_loss", "group_scores", "margin_loss", "new_optimizer", "step"]

# Third numbers of what a generator's numbers depend on, after the seed and a step or an epoch.
_ORDER, _POSTERIOR, _CANDIDATES = 0, 1, 2


def group_loss(
    pipe: DiffusionPipeline,
    images: Sequence[Any],
    texts: Sequence[str],
    *,
    label: int = 0,
    margin: float = 0.1,
    latents: Tensor | None = None,
    **scored: Any,
) -> Tensor:
    """Margin ranking loss of one group, the official way; its gradient reaches what requires one in the UNet.

    Args:
        label: the right candidate's place.
        margin: by which its score should exceed the others'; 0.1 is the official script's.
        pipe, images, texts, latents: as for :func:`group_scores`.
        scored: its other arguments: timesteps, noise, attention_weight, noise_weight, sample_posterior, generator,
            checkpointing.

    Returns:
        () float32, or float64 of such a UNet.

    Raises:
        ValueError: as :func:`group_scores` does, or the label is none of the candidates.
    """
    candidates = _candidates(images, texts, latents)
    if not 0 <= label < candidates:
        raise ValueError(f"label: got {label}, expected 0 to {candidates - 1}, the place of one of the candidates")
    return margin_loss(group_scores(pipe, images, texts, latents=latents, **scored), label, margin)


def group_scores(
    pipe: DiffusionPipeline,
    images: Sequence[Any],
    texts: Sequence[str],
    *,
    timesteps: Sequence[int],
    noise: Tensor,
    attention_weight: float = 0.5,
    noise_weight: float = 1.0,
    sample_posterior: bool = False,
    generator: torch.Generator | None = None,
    checkpointing: bool = True,
    latents: Tensor | None = None,
) -> Tensor:
    """Scores of one group's candidates, each at its own timestep with its own noise, differentiable.

    Args:
        pipe: stock StableDiffusionPipeline (SD 1.x or 2.x, ε- or v-prediction) or StableDiffusionXLPipeline.
        images: one image, or K; kinds as for :func:`dsd_fast.reference.matching.score`.
        texts: K texts, or one.
        timesteps: K of the schedule's, candidate by candidate.
        noise: (K, C, h, w).
        attention_weight: of the attention part; 0.5 is official.
        noise_weight: of the noise-prediction part; 1 is official, 0 its `--bias`, which leaves the part out.
        sample_posterior: encodes by a sample of the VAE's posterior, drawn anew for each candidate, as the official
            code does, instead of its mean.
        generator: of these samples, on the CPU; None: torch's own.
        checkpointing: computes the UNet again in the backward pass instead of keeping its activations; it changes
            memory and time alone. The official code always does.
        latents: scaled clean latents (1, C, h, w) or (K, C, h, w) instead of the images; given these, no image is read
            and nothing is encoded.

    Returns:
        (K,) float32, or float64 of such a UNet; higher is a better match.

    Raises:
        ValueError: an argument that does not fit the pipeline or the group, with its name, what was given and what
            was expected.
    """
    unet = pipe.unet
    candidates = _candidates(images, texts, latents)
    steps = resolve_timesteps(pipe, [int(t) for t in timesteps])
    if len(steps) != candidates:
        raise ValueError(f"timesteps: got {len(steps)}, expected {candidates}, one for each candidate")
    given = preprocess(pipe, images) if latents is None else latents
    shape = latent_shape(pipe) if latents is None else tuple(latents.shape[1:])
    if tuple(noise.shape) != (candidates, *shape):
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {(candidates, *shape)}")
    dtype = torch.promote_types(unet.dtype, torch.float32)
    noise = noise.to(unet.device, dtype)
    alphas = pipe.scheduler.alphas_cumprod.to(unet.device, dtype)
    velocity = pipe.scheduler.config.prediction_type == "v_prediction"

    scores = []
    for k, t in enumerate(steps):
        with torch.no_grad(), upcast_vae(pipe.vae):
            clean = given[k : k + 1] if len(given) > 1 else given
            if latents is None:
                clean = encode_images(pipe.vae, clean, sample=sample_posterior, generator=generator)
            noised = alphas[t].sqrt() * clean.to(unet.device, dtype) + (1 - alphas[t]).sqrt() * noise[k]
            caption = texts[k if len(texts) > 1 else 0]
            (empty, _), (text, _) = rows = [encode_text(pipe, caption, slice(row, row + 1)) for row in range(2)]
            pooled = [pooled for _, pooled in rows if pooled is not None]
            conditions = added_conditions(pipe, torch.cat(pooled) if pooled else None, noised)
        alpha = alphas[t] if velocity else None
        arguments = (unet, noised, t, noise[k], empty, text, SECTIONS, alpha, conditions)
        if checkpointing:
            attention, gain = checkpoint(_pair_terms, *arguments, use_reentrant=False)
        else:
            attention, gain = _pair_terms(*arguments)
        scores.append((2 * attention_weight * attention + noise_weight * gain).mean())
    return torch.stack(scores)


def margin_loss(scores: Tensor, label: int = 0, margin: float = 0.1) -> Tensor:
    """max(0, margin + the best wrong score − the right one's), () of scores (K,)."""
    wrong = torch.cat([scores[:label], scores[label + 1 :]]).max(dim=0).values
    return (margin + wrong - scores[label]).clamp(min=0)


def new_optimizer(pipe: DiffusionPipeline, learning_rate: float = 1e-4) -> torch.optim.AdamW:
    """The official optimiser of what requires a gradient in the UNet.

    Raises:
        ValueError: nothing does.
    """
    parameters = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("pipe: got a UNet without a parameter that requires a gradient, expected one with an adapter")
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)


def step(
    pipe: DiffusionPipeline, optimizer: torch.optim.Optimizer, images: Sequence[Any], texts: Sequence[str], **group: Any
) -> float:
    """One official training step: the group's loss, its gradient clipped to norm 1, and an update.

    Args:
        optimizer: of parameters of the pipeline's UNet, which change in place.
        pipe, images, texts, group: arguments of :func:`group_loss`.

    Returns:
        The loss before the update.
    """
    loss = group_loss(pipe, images, texts, **group)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_([p for part in optimizer.param_groups for p in part["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def fit(
    pipe: DiffusionPipeline,
    examples: Sequence[tuple[Sequence[Any], Sequence[str], int]],
    *,
    steps: int,
    learning_rate: float = 1e-4,
    margin: float = 0.1,
    seed: int = 0,
    shared_noise: bool = False,
    **scored: Any,
) -> list[float]:
    """The official training loop: one group a step, all groups in a new random order in every epoch.

    Args:
        pipe: as for :func:`group_scores`; the parameters of its UNet that require a gradient change in place.
        examples: groups (images, texts, label), each with one image or one text.
        steps: updates.
        learning_rate: constant.
        seed: of the order, timesteps, noise and posterior samples, see :func:`draws`.
        shared_noise: the candidates of a group share timestep and noise, so that a difference of scores is one of
            candidates; the official code draws both for each.
        margin: as for :func:`group_loss`.
        scored: attention_weight, noise_weight, sample_posterior, checkpointing, as for :func:`group_scores`.

    Returns:
        The loss of each step before its update.

    Raises:
        ValueError: no examples, an example or an argument that does not fit, or nothing to train.
    """
    if len(examples) == 0:
        raise ValueError("examples: got none, expected at least one group")
    optimizer = new_optimizer(pipe, learning_rate)
    losses = []
    for number in range(steps):
        epoch, place = divmod(number, len(examples))
        order = torch.randperm(len(examples), generator=seeded(seed, epoch, _ORDER), device="cpu")
        images, texts, label = examples[int(order[place])]
        timesteps, noise = draws(
            seed,
            number,
            _candidates(images, texts, None),
            latent_shape(pipe),
            shared_noise=shared_noise,
            train_timesteps=pipe.scheduler.config.num_train_timesteps,
        )
        loss = step(
            pipe,
            optimizer,
            images,
            texts,
            timesteps=timesteps,
            noise=noise,
            label=label,
            margin=margin,
            generator=seeded(seed, number, _POSTERIOR),
            **scored,
        )
        losses.append(loss)
    return losses


def draws(
    seed: int,
    step: int,
    candidates: int,
    shape: Sequence[int],
    *,
    shared_noise: bool = False,
    train_timesteps: int = 1000,
) -> tuple[list[int], Tensor]:
    """What a step of :func:`fit` draws: t ~ U{0, …, train_timesteps − 1} and ε ~ N(0, 1) for each candidate.

    Those of candidate k depend on (seed, step, k) alone; shared, all candidates have the first one's.

    Args:
        step: from 0.
        candidates: K.
        shape: (C, h, w) of a latent.

    Returns:
        K timesteps, and noise (K, C, h, w) float32 on the CPU.
    """
    drawn = []
    for k in range(1 if shared_noise else candidates):
        generator = seeded(seed, step, _CANDIDATES + k)
        timestep = int(torch.randint(train_timesteps, (), generator=generator, device="cpu"))
        drawn.append((timestep, torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")))
    drawn *= candidates // len(drawn)
    return [timestep for timestep, _ in drawn], torch.stack([noise for _, noise in drawn])


def _candidates(images: Sequence[Any], texts: Sequence[str], latents: Tensor | None) -> int:
    """K of a group, whose images `latents` may stand for."""
    pictures = len(images) if latents is None else len(latents)
    if min(pictures, len(texts)) != 1 or max(pictures, len(texts)) < 2:
        name = "images" if latents is None else "latents"
        raise ValueError(
            f"{name}, texts: got {pictures} and {len(texts)}, expected one image and at least two texts, or at least "
            "two images and one text"
        )
    return max(pictures, len(texts))
