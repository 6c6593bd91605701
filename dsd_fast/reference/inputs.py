"""What a stock pipeline is given: images, noise, texts and timesteps, made the plain way.

Letters: N images, T timesteps, P latents of one UNet call, E text width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

PIL_BICUBIC = 3


def official_timesteps(count: int, train_timesteps: int = 1000) -> list[int]:
    """The official grid: every int(1000 / count)-th of the schedule's timesteps 989, 988, … 10, ascending.

    Not always `count` of them, as in the official code: 50 gives 49, since the ends of the schedule are left out.

    Raises:
        ValueError: `count` is not between 1 and `train_timesteps`.
    """
    if not 1 <= count <= train_timesteps:
        raise ValueError(f"timesteps: got {count}, expected a count from 1 to {train_timesteps}")
    indices = range(10, train_timesteps - 10, train_timesteps // count)
    return sorted(train_timesteps - 1 - index for index in indices)


def resolve_timesteps(pipe: DiffusionPipeline, timesteps: int | Sequence[int]) -> list[int]:
    train_timesteps = pipe.scheduler.config.num_train_timesteps
    prediction_type = pipe.scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"pipe: its prediction_type is {prediction_type!r}, expected 'epsilon' or 'v_prediction'")
    if isinstance(timesteps, int):
        return official_timesteps(timesteps, train_timesteps)
    steps = [int(t) for t in timesteps]
    if not steps or not all(0 <= t < train_timesteps for t in steps):
        raise ValueError(f"timesteps: got {steps}, expected at least one, each from 0 to {train_timesteps - 1}")
    return steps


def seeded(*entropy: int) -> torch.Generator:
    """A generator on the CPU whose numbers depend on these integers alone; zeros at the end change nothing."""
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def draw_noise(seed: int, k: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of the k-th timestep, float32 on the CPU: it depends on (seed, k) alone."""
    return torch.randn(shape, generator=seeded(seed, k), dtype=torch.float32, device="cpu")


def latent_shape(pipe: DiffusionPipeline) -> tuple[int, int, int]:
    """(C, h, w) of what the UNet was made for."""
    sample = pipe.unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else tuple(sample)
    return pipe.unet.config.in_channels, height, width


def preprocess(pipe: DiffusionPipeline, images: Sequence[Any]) -> Tensor:
    """(N, 3, height, width) float32 in [−1, 1] at the UNet's size, on its device; the aspect ratio is not kept."""
    height, width = (side * pipe.vae_scale_factor for side in latent_shape(pipe)[1:])
    if len(images) == 0:
        raise ValueError("images: got none, expected at least one")
    pixels = []
    for image in images:
        if isinstance(image, Tensor):
            image = image.detach().cpu().permute(1, 2, 0).float().numpy()
        elif isinstance(image, np.ndarray):
            image = image / 255
        if isinstance(image, np.ndarray):
            image = VaeImageProcessor.numpy_to_pil(image)[0]
        array = np.array(image.convert("RGB").resize((width, height), PIL_BICUBIC))
        pixels.append(2 * (torch.from_numpy(array).permute(2, 0, 1).float() / 255) - 1)
    return torch.stack(pixels).to(pipe.unet.device)


def widened(values: Tensor) -> Tensor:
    """float32 of what is narrower; float64 stays, so that a derivative can be checked by differences."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def encode_images(
    vae: Any, pixels: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Scaled posterior means, or samples by the generator (torch's own if None), (P, C, h, w).

    float32, or float64 of such a VAE.
    """
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    latents: Tensor = vae.config.scaling_factor * (posterior.sample(generator) if sample else posterior.mode())
    return widened(latents)


def encode_text(pipe: DiffusionPipeline, caption: str, rows: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
    """Text states (2, 77, E) of the empty text and the caption, and SDXL's pooled states (2, width) or None.

    `rows` takes some of the two, in one call of the text encoder.
    """
    if not hasattr(pipe, "text_encoder_2"):
        return pipe.text_encoder(tokenize(pipe, pipe.tokenizer, caption)[rows].to(pipe.text_encoder.device))[0], None
    states = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        output = encoder(tokenize(pipe, tokenizer, caption)[rows].to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
    text, pooled = torch.cat(states, dim=-1), output[0]
    if pipe.config.force_zeros_for_empty_prompt and rows.indices(2)[0] == 0:
        text[0], pooled[0] = 0, 0
    return text, pooled


def tokenize(pipe: DiffusionPipeline, tokenizer: Any, caption: str) -> Tensor:
    length = tokenizer.model_max_length
    caption = pipe.maybe_convert_prompt(caption, tokenizer)
    ids = tokenizer(["", caption], padding="max_length", max_length=length).input_ids
    if len(ids[1]) > length:
        raise ValueError(f"captions: {caption!r} has {len(ids[1])} tokens, expected at most {length}")
    return torch.tensor(ids, device="cpu")


def added_conditions(pipe: DiffusionPipeline, pooled: Tensor | None, latents: Tensor) -> dict[str, Tensor] | None:
    """SDXL's pooled text (B, width) and image sizes: original size, no crop, target size, all the latents' own."""
    if pooled is None:
        return None
    size = [side * pipe.vae_scale_factor for side in latents.shape[-2:]]
    time_ids = torch.tensor([*size, 0, 0, *size], device=latents.device, dtype=pipe.unet.dtype)
    return {
        "text_embeds": pooled.to(pipe.unet.dtype),
        "time_ids": time_ids.repeat(len(pooled), 1),
    }


def states_loss(
    pipe: DiffusionPipeline,
    states: Tensor,
    added: dict[str, Tensor] | None,
    latents: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> Tensor:
    """The plain noise loss of n clean latents with text states (n, T, E), (n,); differentiable in the states.

    Args:
        added: SDXL's conditions, from :func:`added_conditions`.
        latents: (n, C, h, w), scaled.
        timesteps: (n,).
        noise: (n, C, h, w).

    Raises:
        ValueError: a model that predicts neither the noise nor v.
    """
    unet, scheduler = pipe.unet, pipe.scheduler
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"pipe: its prediction_type is {kind!r}, expected 'epsilon' or 'v_prediction'")
    alphas = scheduler.alphas_cumprod.to(latents.device, latents.dtype)[timesteps][:, None, None, None]
    noised = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    wanted = noise if kind == "epsilon" else alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    predicted = unet(noised.to(unet.dtype), timesteps, states, added_cond_kwargs=added).sample
    return (widened(predicted) - widened(wanted)).square().flatten(1).mean(1)


@contextmanager
def upcast_vae(vae: Any) -> Iterator[None]:
    """float32 for a VAE that overflows in float16 (SDXL's), as the stock pipeline does; exact in both directions."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype)
