"""The official DSD score of an image and a text (He et al., arXiv 2305.10722; code of eric-ai-lab/DSD).

At timestep t, with noise ε, noised latent z_t, and UNet rows for the empty text (u) and the caption (c):

    a_t = mean over six cross-attention layers, both rows, heads and positions of logsumexp_77(Q Kᵀ / √D)
    b_t = ‖ε − ε_u‖₂ − ‖ε − ε_c‖₂
    score = mean over t of (2 · attention_weight · a_t + noise_weight · b_t)

so the default weights give the official a_t + b_t, and `noise_weight=0` its `use_bias=False`.

Deviations, each from a defect of the official code: the VAE posterior's mean, not a sample without a seed, though still
encoded once per timestep; noise from a seed, not from a file in the home directory; each pair alone, unless
`batch_mean` asks for the official mean over the batch; v-predictions converted to ε before they are compared with it;
norms and log-sum-exps in float32.

Letters: N images, M captions, T timesteps, P latents of one UNet call, H heads, L positions, E text width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from dsd_fast.reference.heatmaps import heatmap
from dsd_fast.reference.inputs import (
    added_conditions,
    draw_noise,
    encode_images,
    encode_text,
    latent_shape,
    official_timesteps,
    preprocess,
    resolve_timesteps,
    upcast_vae,
    widened,
)
from dsd_fast.reference.recording import MapProcessor, recording

__all__ = ["heatmap", "official_timesteps", "pair_terms", "row_terms", "score"]

SECTIONS = ("down", "mid", "up")


@torch.no_grad()
def score(
    pipe: DiffusionPipeline,
    images: Sequence[Any],
    captions: Sequence[str],
    *,
    timesteps: int | Sequence[int] = 10,
    attention_weight: float = 0.5,
    noise_weight: float = 1.0,
    seed: int = 0,
    latents: Tensor | None = None,
    noise: Tensor | None = None,
    batch_mean: bool = False,
) -> Tensor:
    """Scores every image with every caption, pair by pair.

    A pair costs one text-encoder call of 2 rows, T VAE encodes of 1 image and T UNet calls of 2 rows.

    Args:
        pipe: stock StableDiffusionPipeline (SD 1.x or 2.x, ε- or v-prediction) or StableDiffusionXLPipeline.
        images: N PIL images, uint8 arrays (height, width, 3), or float tensors (3, height, width) in [0, 1], which
            are rounded to 8 bits; Pillow's bicubic resize brings them to the pipeline's size.
        captions: M texts.
        timesteps: how many, on the official grid of :func:`official_timesteps`, or the timesteps themselves.
        attention_weight: of the attention part; 0.5 is official, since a_t already averages over two rows.
        noise_weight: of the noise-prediction part.
        seed: of the noise; noise k is used at the k-th timestep, the same for every image and caption.
        latents: scaled clean latents (N, C, h, w); given these, no image is read and nothing is encoded.
        noise: (T, C, h, w) instead of the seed's.
        batch_mean: all N images go with one caption through one call of 2N rows, and the attention part is their
            mean, shared by all N, as in the official evaluation, where a pair's score depends on its batch.

    Returns:
        (N, M) float32 on the CPU; higher is a better match.

    Raises:
        ValueError: an argument that does not fit the pipeline, with its name, what was given and what was expected.
    """
    unet = pipe.unet
    steps = resolve_timesteps(pipe, timesteps)
    if latents is None:
        pixels = preprocess(pipe, images)
    else:
        latents = latents.to(unet.device, torch.float32)
    shape = latent_shape(pipe) if latents is None else tuple(latents.shape[1:])
    if noise is None:
        noise = torch.stack([draw_noise(seed, k, shape) for k in range(len(steps))])
    elif tuple(noise.shape) != (len(steps), *shape):
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {(len(steps), *shape)}")
    noise = noise.to(unet.device, torch.float32)
    alphas = pipe.scheduler.alphas_cumprod.to(unet.device, torch.float32)

    count = len(pixels) if latents is None else len(latents)
    groups = [slice(0, count)] if batch_mean else [slice(n, n + 1) for n in range(count)]
    scores = torch.zeros(count, len(captions), dtype=torch.float32, device="cpu")
    with upcast_vae(pipe.vae):
        for group in groups:
            for m, caption in enumerate(captions):
                text, pooled = encode_text(pipe, caption)
                total = torch.zeros((), device=unet.device, dtype=torch.float32)
                for k, t in enumerate(steps):
                    clean = encode_images(pipe.vae, pixels[group]) if latents is None else latents[group]
                    noised = alphas[t].sqrt() * clean + (1 - alphas[t]).sqrt() * noise[k]
                    rows = None if pooled is None else pooled.repeat_interleave(len(noised), 0)
                    attention, gain = _pair_terms(
                        unet,
                        noised,
                        t,
                        noise[k],
                        text[:1],
                        text[1:],
                        alpha=alphas[t] if pipe.scheduler.config.prediction_type == "v_prediction" else None,
                        conditions=added_conditions(pipe, rows, noised),
                    )
                    if batch_mean:
                        attention = attention.mean()
                    total = total + 2 * attention_weight * attention + noise_weight * gain
                scores[group, m] = (total / len(steps)).cpu()
    return scores


@torch.no_grad()
def pair_terms(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timestep: int,
    noise: Tensor,
    uncond: Tensor,
    cond: Tensor,
    *,
    sections: Sequence[str] = SECTIONS,
) -> tuple[Tensor, Tensor]:
    """Attention and noise-prediction parts of the score of P pairs at one timestep.

    Args:
        unet: SD 1.x or 2.x UNet that predicts the noise.
        latents: (P, C, h, w), already noised.
        timestep: at which they were.
        noise: that the predictions are compared with, (P, C, h, w) or (C, h, w).
        uncond: states of the empty text, (1, 77, E) or (P, 77, E).
        cond: states of the captions, (1, 77, E) or (P, 77, E).
        sections: of the UNet whose layers count, from "down", "mid", "up".

    Returns:
        a_t and b_t, each (P,) float32.
    """
    return _pair_terms(unet, latents, timestep, noise, uncond, cond, sections)


@torch.no_grad()
def row_terms(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timestep: int,
    noise: Tensor,
    text: Tensor,
    *,
    sections: Sequence[str] = SECTIONS,
) -> tuple[Tensor, Tensor]:
    """What R rows contribute at one timestep, in one UNet call: a pair's a_t is the mean of its two rows' log-sum-exps,
    its b_t the difference of their errors.

    Args:
        unet, timestep, sections: as for :func:`pair_terms`.
        latents: (R, C, h, w), already noised.
        noise: that the predictions are compared with, (R, C, h, w) or (C, h, w).
        text: states of the rows' texts, (R, 77, E).

    Returns:
        Each (R,) float32: the log-sum-exps, meaned over layers, heads and positions, and ‖ε − ε_row‖₂.
    """
    return _row_terms(unet, latents, timestep, noise, text, sections)


def _pair_terms(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timestep: int,
    noise: Tensor,
    uncond: Tensor,
    cond: Tensor,
    sections: Sequence[str] = SECTIONS,
    alpha: Tensor | None = None,
    conditions: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`pair_terms`; differentiable. `alpha` is ᾱ_t of a v-prediction, `conditions` SDXL's for the 2P rows."""
    pairs = len(latents)
    text = torch.cat([uncond.expand(pairs, -1, -1), cond.expand(pairs, -1, -1)])
    twice, noises = latents.repeat(2, 1, 1, 1), noise.expand_as(latents).repeat(2, 1, 1, 1)
    attention, errors = _row_terms(unet, twice, timestep, noises, text, sections, alpha, conditions)
    errors = errors.view(2, pairs)
    return attention.view(2, pairs).mean(0), errors[0] - errors[1]


def _row_terms(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timestep: int,
    noise: Tensor,
    text: Tensor,
    sections: Sequence[str] = SECTIONS,
    alpha: Tensor | None = None,
    conditions: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`row_terms`; the rest as for :func:`_pair_terms`.

    The layers record inside, so that a backward pass which calls it again computes the same.
    """
    # diffusers walks all parameters to tell the type.
    dtype = unet.dtype
    with recording(_score_layers(unet, sections), _RecordingProcessor) as lse:
        predicted = unet(
            latents.to(dtype),
            timestep,
            encoder_hidden_states=text.to(dtype),
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
    predicted = widened(predicted)
    if alpha is not None:
        predicted = alpha.sqrt() * predicted + (1 - alpha).sqrt() * latents
    return torch.stack(lse).mean(0), (noise - predicted).flatten(1).norm(dim=-1)


def _score_layers(unet: UNet2DConditionModel, sections: Sequence[str]) -> list[Attention]:
    """attn2 of the last transformer block of every `attn_i` in the last block with cross-attention of each section."""
    blocks = {"down": unet.down_blocks, "mid": [unet.mid_block], "up": unet.up_blocks}
    layers = []
    for section in sections:
        with_attention = [
            transformers
            for block in blocks[section]
            if (transformers := [m for m in getattr(block, "attentions", []) if isinstance(m, Transformer2DModel)])
        ]
        layers += [transformer.transformer_blocks[-1].attn2 for transformer in (with_attention or [[]])[-1]]
    if not layers:
        raise ValueError(f"sections: got {tuple(sections)}, in which this UNet has no cross-attention")
    return layers


class _RecordingProcessor(MapProcessor):
    """Attention with its scores written out, (B · H, L, 77), as the official `get_attention_scores`.

    It records the mean log-sum-exp of each row: (B,).
    """

    def probabilities(self, attn: Attention, query: Tensor, key: Tensor) -> Tensor:
        if attn.upcast_attention:
            query, key = widened(query), widened(key)
        scores = attn.scale * (query @ key.transpose(-1, -2))
        self.record(widened(scores).logsumexp(-1).view(len(scores) // attn.heads, -1).mean(-1))
        return (widened(scores) if attn.upcast_softmax else scores).softmax(-1)
