"""Images from texts by a stock diffusers pipeline, batched by hand as a good user would.

With ``noise="diffusers"`` it is the pipeline's own call, a ``torch.Generator("cpu").manual_seed(seed)`` for each row.
With ``noise="dsd_fast"`` the same call is given latents drawn by (seed, draw 0), and its generators are set to
(seed, draw 1 + s) before the scheduler's step s; a source image gives its posterior's mean.
"""

import functools
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dsd_fast.reference.inputs import encode_images, latent_shape, tokenize, upcast_vae

PIL_BICUBIC = 3

Pair = tuple[int, int]
Image = Any


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompt: str | None = None,
    steps: int = 50,
    guidance: float = 7.5,
    guidance_rescale: float = 0.0,
    clip_skip: int | None = None,
    size: Pair | None = None,
    images: Sequence[Image] | None = None,
    strength: float = 0.8,
    controlnets: Sequence[Any] = (),
    scales: Sequence[float] = (),
    conditions: Sequence[Sequence[Image]] = (),
    scheduler: Any = None,
    eta: float = 0.0,
    noise: str = "dsd_fast",
    original_size: Pair | None = None,
    crop: Pair = (0, 0),
    target_size: Pair | None = None,
    batch_size: int | None = None,
    latents: bool = False,
) -> Any:
    """Images of N prompts; what is not listed here is as in the pipeline.

    Args:
        pipe: a StableDiffusionPipeline or StableDiffusionXLPipeline; it is left as it is.
        seeds: one for each prompt.
        size: (height, width) in pixels; the UNet's own if None.
        images: one for each prompt to start from, resized to ``size``.
        controlnets, scales, conditions: nets, the factor of each, and for each net a picture of each prompt.
        scheduler: in the place of the pipeline's.
        original_size, crop, target_size: SDXL's.
        batch_size: prompts in one call of the pipeline; all if None.
        latents: give clean latents instead of pictures.

    Returns:
        N Pillow images, or (N, C, h, w).
    """
    channels, *sides = latent_shape(pipe)
    height, width = size or tuple(side * pipe.vae_scale_factor for side in sides)
    shape = (channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    xl, own = hasattr(pipe, "text_encoder_2"), noise == "dsd_fast"
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "eta": eta}
    if xl:
        options |= {"crops_coords_top_left": crop, "original_size": original_size or (height, width)}
        options |= {"target_size": target_size or (height, width)}
    if guidance_rescale:
        options["guidance_rescale"] = guidance_rescale
    # Of several nets stock pipelines take one row's pictures.
    at_once = 1 if len(controlnets) > 1 else batch_size or len(prompts)
    factors = list(scales) or [1.0] * len(controlnets)
    if controlnets:
        options["controlnet_conditioning_scale"] = factors[0] if len(factors) == 1 else factors
    results: list[Any] = []
    for start in range(0, len(prompts), at_once):
        rows = slice(start, start + at_once)
        texts, chosen = list(prompts[rows]), list(seeds[rows])
        generators = [_generator(seed, 0) if own else torch.Generator().manual_seed(seed) for seed in chosen]
        given: dict[str, Any] = {"generator": generators, **options, **_texts(pipe, texts, negative_prompt, clip_skip)}
        pictures = [[each.resize((width, height), PIL_BICUBIC) for each in net[rows]] for net in conditions]
        if pictures:
            shown = pictures[0] if len(pictures) == 1 else [each for (each,) in pictures]
            given["control_image" if images else "image"] = shown
        if images is not None:
            started = [each.convert("RGB").resize((width, height), PIL_BICUBIC) for each in images[rows]]
            given |= {"strength": strength, "image": _clean(pipe, started) if own else started}
        else:
            given |= {"height": height, "width": width}
        if own and images is None:
            drawn = [torch.randn(shape, generator=each, dtype=torch.float32, device="cpu") for each in generators]
            given["latents"] = torch.stack(drawn).to(pipe.unet.device, pipe.unet.dtype)
        walked = (scheduler or pipe.scheduler).from_config((scheduler or pipe.scheduler).config)
        if own:
            _seed_before_each_step(walked, chosen, generators)
        call = _pipeline(pipe, xl, images is not None, controlnets, walked)
        results += [*call(**given, output_type="latent" if latents else "pil").images]
    return torch.stack(results) if latents else results


def _generator(seed: int, draw: int) -> torch.Generator:
    generator = torch.Generator()
    if seed < 2**32:
        mixed = np.random.SeedSequence([seed, draw]).generate_state(1, np.uint64)[0]
        return generator.manual_seed(int(mixed >> np.uint64(1)))
    drawn = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(draw,))).random_raw(312)
    # Of MT19937 each 32-bit word in eight bytes, behind 24 others; low halves first.
    words = torch.from_numpy(np.stack([drawn % 2**32, drawn >> np.uint64(32)], axis=1).reshape(624))
    state = generator.manual_seed(0).get_state()
    return generator.set_state(torch.cat([state[:24], words.view(torch.uint8), state[24 + 8 * 624 :]]))


def _seed_before_each_step(scheduler: Any, seeds: Sequence[int], generators: Sequence[torch.Generator]) -> None:
    step, taken = scheduler.step, iter(range(1, 1 << 32))

    @functools.wraps(step)
    def seeded(*args: Any, **kwargs: Any) -> Any:
        draw = next(taken)
        for generator, seed in zip(generators, seeds, strict=True):
            generator.set_state(_generator(seed, draw).get_state())
        return step(*args, **kwargs)

    scheduler.step = seeded


def _texts(pipe: Any, prompts: list[str], negative: str | None, clip_skip: int | None) -> dict[str, Any]:
    """Prompts as the call takes them, or their states: transformers 5 has no text_model, which clip_skip looks for."""
    if clip_skip is None or hasattr(pipe, "text_encoder_2") or hasattr(pipe.text_encoder, "text_model"):
        several = None if negative is None else [negative] * len(prompts)
        return {"prompt": prompts, "negative_prompt": several, "clip_skip": clip_skip}
    encoder, device = pipe.text_encoder, pipe.text_encoder.device
    states = []
    for prompt in prompts:
        ids = tokenize(pipe, pipe.tokenizer, prompt)[1:].to(device)
        hidden = encoder(ids, output_hidden_states=True).hidden_states
        states.append(encoder.final_layer_norm(hidden[-(clip_skip + 1)]))
    unconditional = encoder(tokenize(pipe, pipe.tokenizer, negative or "")[1:].to(device))[0]
    return {
        "prompt_embeds": torch.cat(states),
        "negative_prompt_embeds": unconditional.expand(len(prompts), -1, -1),
    }


def _clean(pipe: Any, pictures: Sequence[Image]) -> Tensor:
    """Scaled posterior means, (n, C, h, w) in the UNet's type."""
    pixels = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1).float() for each in pictures])
    with upcast_vae(pipe.vae):
        return encode_images(pipe.vae, (2 * (pixels / 255) - 1).to(pipe.vae.device)).to(pipe.unet.dtype)


def _pipeline(pipe: Any, xl: bool, started: bool, controlnets: Sequence[Any], scheduler: Any) -> Any:
    """The stock pipeline for this, on the same networks."""
    kind = f"StableDiffusion{'XL' * xl}{'ControlNet' * bool(controlnets)}{'Img2Img' * started}Pipeline"
    parts = {**pipe.components, "scheduler": scheduler}
    if controlnets:
        parts["controlnet"] = controlnets[0] if len(controlnets) == 1 else list(controlnets)
    if xl:
        forced = pipe.config.force_zeros_for_empty_prompt
        made = getattr(diffusers, kind)(**parts, force_zeros_for_empty_prompt=forced, add_watermarker=False)
    else:
        made = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made
