"""Activations of a diffusion model's UNet for images (Meng et al., arXiv 2410.03558 and 2410.06719; official code
Darkbblue/generic-diffusion-feature).

At timestep t, with noise ε and clean latent z₀, a feature is what a layer computes in

    UNet(√ᾱ_t z₀ + √(1 − ᾱ_t) ε, t, text),

once, without guidance. Each timestep is a call of its own, which encodes its images again and runs the whole network.

Deviations, each from a defect of the official code: the VAE posterior's mean, not a sample without a seed; noise from a
seed; t = 0 is the clean latent at timestep 0, where the official mapping gives 1 or nothing; denoising over more than
50 timesteps, which takes every tenth step, starts where it was asked to, not at the top; inversion with each image's
own text, the VAE's own scale, v-predictions converted to ε, and its result as it is, not divided by √(1 + σ²) once
more; texts beyond the encoder's limit are refused. Averaging over draws is that of DIFT (Tang et al., arXiv
2306.03881).

Letters: N images, S timesteps, D draws, B rows of one UNet call, C channels, E text width.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, DDIMScheduler, DiffusionPipeline
from torch import Tensor

from dsd_fast.reference.features_tapping import Tapped, aggregated, as_pictures, layer_ids, tapping
from dsd_fast.reference.inputs import (
    added_conditions,
    draw_noise,
    encode_images,
    latent_shape,
    preprocess,
    resolve_timesteps,
    upcast_vae,
    widened,
)

__all__ = ["effective_timestep", "extract", "layer_ids"]

INVERSION_STEPS = 100
SHORT_DENOISING = 50

Control = tuple[ControlNetModel, Tensor]
Text = tuple[Tensor, Tensor | None]


@torch.no_grad()
def extract(
    pipe: DiffusionPipeline,
    images: Sequence[Any],
    *,
    layers: Sequence[str] | Mapping[str, bool],
    timesteps: Sequence[int] = (50,),
    prompts: str | Sequence[str] = "",
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    attention: Sequence[str] = (),
    official_timesteps: bool = False,
    draws: int = 1,
    keep_draws: bool = False,
    denoise_from: int | None = None,
    inversion: bool = False,
    controls: Sequence[Control] = (),
    feature_resize: int = 1,
    batch_size: int = 1,
    latents: Tensor | None = None,
    noise: Tensor | None = None,
) -> dict[str, Tensor]:
    """Features of every image at every timestep, `batch_size` images, one timestep and one draw in a call.

    A call of B images costs one VAE encode of B images and one UNet call of B rows; `denoise_from` and `inversion` add
    UNet calls of B rows. The text encoder is called twice for each prompt, for it and for the empty text.

    Args:
        pipe: stock StableDiffusionPipeline (SD 1.x or 2.x, ε- or v-prediction) or StableDiffusionXLPipeline.
        images: N PIL images, uint8 arrays (height, width, 3), or float tensors (3, height, width) in [0, 1], which
            are rounded to 8 bits; Pillow's bicubic resize brings them to the pipeline's size.
        layers: ids, see :mod:`dsd_fast.reference.features_tapping`, or the official files' {id: whether}.
        timesteps: S of them.
        prompts: one text for all images, or one each.
        seed: of the noise; noise d is used for draw d, the same for every image and timestep.
        seeds: one each for the images instead.
        attention: kinds of attention layers such as "up_cross", whose maps make the feature "attn": averaged over heads
            and layers of equal size, of sides from a quarter to half the latents', enlarged to these.
        official_timesteps: whether the timesteps are those that :func:`effective_timestep` gives; not of those that
            denoising ends at.
        draws: how many noises each image is seen under; the features' mean is returned.
        keep_draws: whether they are returned one by one.
        denoise_from: timestep at which the noise is added, as :func:`effective_timestep` has it; the scheduler's own
            steps, of 1000, or of 100 where the way is longer than 50, lead to each timestep.
        inversion: whether DDIM inversion makes the noised latent, in 100 steps for the whole schedule.
        controls: stock ControlNets, each with its condition pictures, (N, 3, height, width) in [0, 1]; the residuals
            are summed.
        feature_resize: adaptive average pooling makes all but "attn" that many times smaller.
        batch_size: images in a call.
        latents: scaled clean latents (N, C, h, w); given these, no image is read and nothing is encoded.
        noise: (D, C, h, w) for all images or (N, D, C, h, w) instead of the seed's.

    Returns:
        {id: (N, S, C, h, w)}, with `keep_draws` (N, S, D, C, h, w), in the network's type on its device, in the order
        of `layers`, then "attn". Maps are (N, S, H, L, T).

    Raises:
        ValueError: an argument that does not fit the pipeline, with its name, what was given and what was expected.
    """
    unet = pipe.unet
    names = [name for name, wanted in layers.items() if wanted] if isinstance(layers, Mapping) else list(layers)
    steps = resolve_timesteps(pipe, list(timesteps))
    if official_timesteps and denoise_from is None:
        steps = [effective_timestep(pipe, t) for t in steps]
    if denoise_from is not None and max(steps) > denoise_from:
        raise ValueError(f"denoise_from: got {denoise_from}, expected at least the largest timestep, {max(steps)}")
    pixels = preprocess(pipe, images) if latents is None else None
    count = len(images) if latents is None else len(latents)
    shape = latent_shape(pipe) if latents is None else tuple(latents.shape[1:])
    texts = _texts(pipe, prompts, count)
    noises = _noises(noise, count, draws, shape, [seed] * count if seeds is None else seeds).to(unet.device)

    grid = (shape[1] // 4) * (shape[2] // 4), (shape[1] // 2) * (shape[2] // 2)
    collected: dict[str, list[Tensor]] = {}
    with upcast_vae(pipe.vae), tapping(unet, names, attention, grid) as tapped:
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            call = _Call(pipe, _rows(texts, rows), [(net, pictures[rows]) for net, pictures in controls], tapped)
            found: dict[str, list[Tensor]] = {}
            for t in steps:
                for d in range(draws):
                    if pixels is not None:
                        clean = encode_images(pipe.vae, pixels[rows])
                    elif latents is not None:
                        clean = widened(latents[rows].to(unet.device))
                    eps = noises[rows, d].to(clean.dtype)
                    if denoise_from is not None and t:
                        call.denoised(clean, eps, denoise_from, t)
                    elif inversion and t:
                        call.predict(call.inverted(clean, t), t)
                    else:
                        call.predict(call.noised(clean, eps, t), t)
                    for name, value in _gathered(tapped, names, attention, shape[1:], feature_resize).items():
                        found.setdefault(name, []).append(value)
            for name, values in found.items():
                each = torch.stack(values, dim=1)
                each = each.view(len(each), len(steps), draws, *each.shape[2:])
                mean = each if keep_draws else widened(each).mean(2).to(each.dtype)
                collected.setdefault(name, []).append(mean)
    return {name: torch.cat(collected[name]) for name in [*names, *(["attn"] if attention else [])]}


def effective_timestep(pipe: DiffusionPipeline, t: int) -> int:
    """The timestep that the official code uses when `t` is asked for: the first that img2img's `get_timesteps` leaves
    of 1000 steps at strength t / 1000. 0 stays 0, the clean latent.

    Raises:
        ValueError: the scheduler's timesteps are no integers.
    """
    if t == 0:
        return 0
    first = float(_img2img_timesteps(copy.deepcopy(pipe.scheduler), t)[0])
    if not first.is_integer():
        raise ValueError(f"pipe: its scheduler maps {t} to {first}, expected an integer")
    return int(first)


def _img2img_timesteps(scheduler: Any, t: int, every: int = 1) -> Tensor:
    """What img2img's `get_timesteps` leaves of the schedule at the strength of `t`, where the scheduler then begins.

    `every` leaves out all but every so-manieth timestep of the schedule.
    """
    total = scheduler.config.num_train_timesteps
    count = total // every
    scheduler.set_timesteps(count)
    start = max(count - min(int(count * (t / total)), count), 0) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    timesteps: Tensor = scheduler.timesteps[start:]
    return timesteps


class _Call:
    """Calls of the UNet for B images.

    Args:
        pipe: stock pipeline.
        text: states (B, T, E) and, with SDXL, pooled states (B, width).
        controls: ControlNets with condition pictures (B, 3, height, width).
        tapped: what each call fills; emptied before.
    """

    def __init__(self, pipe: DiffusionPipeline, text: Text, controls: Sequence[Control], tapped: Tapped) -> None:
        self.pipe, self.controls, self.tapped = pipe, controls, tapped
        self.states, self.pooled = text
        # diffusers walks all parameters to tell the type.
        self.dtype = pipe.unet.dtype

    def predict(self, latents: Tensor, t: int | Tensor, *, controlled: bool = True) -> Tensor:
        """The model's output for noised latents, as the UNet sees them."""
        arguments = {
            "encoder_hidden_states": self.states.to(self.dtype),
            "added_cond_kwargs": added_conditions(self.pipe, self.pooled, latents),
            "return_dict": False,
        }
        sample = latents.to(self.dtype)
        down, mid = None, None
        for net, pictures in self.controls if controlled else ():
            pictures = pictures.to(sample.device, self.dtype)
            more, middle = net(sample, t, controlnet_cond=pictures, conditioning_scale=1.0, **arguments)
            down = more if down is None else [one + other for one, other in zip(down, more, strict=True)]
            mid = middle if mid is None else mid + middle
        self.tapped.clear()
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        output: Tensor = self.pipe.unet(sample, t, **arguments, **residuals)[0]
        return widened(output)

    def noised(self, clean: Tensor, noise: Tensor, t: int) -> Tensor:
        if t == 0:
            return clean
        alpha: Tensor = self.pipe.scheduler.alphas_cumprod[t].to(clean.device, clean.dtype)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def denoised(self, clean: Tensor, noise: Tensor, start: int, t: int) -> None:
        """The call at the scheduler's last step that is not below `t`, after its steps from `start`."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        timesteps = _img2img_timesteps(scheduler, start, 1 if start - t <= SHORT_DENOISING else 10).to(clean.device)
        timesteps = timesteps[timesteps >= t]
        if not len(timesteps):
            raise ValueError(f"timesteps: got {t}, above all of the scheduler's steps from {start}")
        latents = scheduler.add_noise(clean, noise, timesteps[:1])
        for step in timesteps[:-1]:
            output = self.predict(scheduler.scale_model_input(latents, step), step)
            latents = scheduler.step(output, step, latents, return_dict=False)[0]
        self.predict(scheduler.scale_model_input(latents, timesteps[-1]), timesteps[-1])

    def inverted(self, clean: Tensor, t: int) -> Tensor:
        """The latents that DDIM inversion leads to: at the first step of its grid that is not below `t`."""
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(INVERSION_STEPS)
        alphas = self.pipe.scheduler.alphas_cumprod.to(clean.device, clean.dtype)
        latents, width = clean, len(alphas) // INVERSION_STEPS
        for step in scheduler.timesteps.flip(0)[1:].tolist():
            alpha, after = alphas[max(0, step - width)], alphas[step]
            eps = self.predict(latents, step, controlled=False)
            if scheduler.config.prediction_type == "v_prediction":
                eps = alpha.sqrt() * eps + (1 - alpha).sqrt() * latents
            latents = (latents - (1 - alpha).sqrt() * eps) * (after / alpha).sqrt() + (1 - after).sqrt() * eps
            if step >= t:
                break
        return latents


def _texts(pipe: DiffusionPipeline, prompts: str | Sequence[str], count: int) -> Text:
    """States (N, T, E) and pooled states (N, width) or None, prompt by prompt."""
    each = [prompts] if isinstance(prompts, str) else list(prompts)
    if not isinstance(prompts, str) and len(each) != count:
        raise ValueError(f"prompts: got {len(each)}, expected one or {count}")
    states, pooled = [], []
    for prompt in each:
        for tokenizer in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)):
            if tokenizer is not None:
                tokens = len(tokenizer(pipe.maybe_convert_prompt(prompt, tokenizer)).input_ids)
                if tokens > tokenizer.model_max_length:
                    raise ValueError(
                        f"prompts: {prompt!r} has {tokens} tokens, expected at most {tokenizer.model_max_length}"
                    )
        # With the empty text, which nothing here reads, as in the official code.
        encoded = pipe.encode_prompt(
            prompt=prompt,
            device=pipe.unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt="",
        )
        states.append(encoded[0])
        if len(encoded) == 4:
            pooled.append(encoded[2])
    repeats = count if isinstance(prompts, str) else 1
    together = torch.cat(pooled).repeat(repeats, 1) if pooled else None
    return torch.cat(states).repeat(repeats, 1, 1), together


def _rows(texts: Text, rows: slice) -> Text:
    states, pooled = texts
    return states[rows], None if pooled is None else pooled[rows]


def _noises(noise: Tensor | None, count: int, draws: int, shape: tuple[int, ...], seeds: Sequence[int]) -> Tensor:
    """(N, D, C, h, w)."""
    if len(seeds) != count:
        raise ValueError(f"seeds: got {len(seeds)}, expected one for each of {count} images")
    if noise is None:
        noise = torch.stack([torch.stack([draw_noise(seed, d, shape) for d in range(draws)]) for seed in seeds])
    elif tuple(noise.shape) == (draws, *shape):
        noise = noise.expand(count, *noise.shape)
    if tuple(noise.shape) != (count, draws, *shape):
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {(draws, *shape)} or with {count} before")
    return noise


def _gathered(
    tapped: Tapped, names: Sequence[str], attention: Sequence[str], size: tuple[int, ...], feature_resize: int
) -> dict[str, Tensor]:
    """What one call left behind, copied, as it is returned."""
    height, width = size
    features = as_pictures({name: tapped.features[name] for name in names}, (height, width))
    if feature_resize > 1:
        features = {
            name: torch.nn.functional.adaptive_avg_pool2d(
                value, (value.shape[-2] // feature_resize, value.shape[-1] // feature_resize)
            )
            for name, value in features.items()
        }
    if attention:
        features["attn"] = aggregated(tapped.attention, attention, (height, width))
    return features
