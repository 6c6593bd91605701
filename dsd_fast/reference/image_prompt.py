"""Images as prompts, the official way (SD-IPC, Ding et al. 2023, arXiv 2305.12716).

CLIP's image encoder gives an image p, its state after the last layer norm, and a caption that fits the image has an end
state whose projection points where p's does. So

    W_T⁺ = pinv(W_T), singular values up to ``cut`` left out
    u = W_T⁺ W_V p,   h = norm · u / ‖u‖

stands for a caption's end state (inference_sd_ipc.py). One image after the other is prepared, encoded and converted.

Tuning trains deep prompts in the image encoder (prompt_clip.py), and of the UNet what requires a gradient, by the plain
noise loss with the image's own conversion as its text. Sources name neither rates nor draws: here a step's draws depend
on (seed, step) alone, and its optimiser is AdamW.

Deviations: the inverse is computed in float64; a prompt that is too long is refused; deep prompts stand between the
class token and the patches, where officially those of the first layer replace the first patches (``official``).

Letters: N images, T tokens, E width of the text states, V of the image encoder's, D of CLIP's common space.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dsd_fast.reference.inputs import encode_images, preprocess, seeded, states_loss, tokenize, upcast_vae, widened

__all__ = ["DeepPrompts", "convert", "draws", "edit", "finetune", "inverse", "processor", "tuning_loss", "vectors"]

Image = Any


def inverse(clip: Any, cut: float = 0.3) -> Tensor:
    """W_T⁺ of a transformers CLIPModel, (E, D) float64; singular values up to ``cut`` count as 0."""
    inverted: Tensor = torch.linalg.pinv(clip.text_projection.weight.detach().double(), atol=cut, rtol=0.0)
    return inverted


def processor(clip: Any) -> Any:
    """CLIP's own image processor: the one beside the weights, or OpenAI's at the encoder's size."""
    from transformers import CLIPImageProcessorPil

    if clip.name_or_path:
        with suppress(OSError):
            return CLIPImageProcessorPil.from_pretrained(clip.name_or_path)
    side = clip.config.vision_config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def vectors(
    clip: Any,
    pixels: Tensor,
    *,
    cut: float = 0.3,
    norm: float = 27.5,
    inverted: Tensor | None = None,
    vision: Any = None,
) -> Tensor:
    """h of prepared images, (N, E) in CLIP's type, or float32 if that is narrower; differentiable.

    Args:
        pixels: (N, 3, side, side), the processor's.
        cut: of :func:`inverse`.
        norm: of each h.
        inverted: what :func:`inverse` gives, where it is known.
        vision: in the place of CLIP's image encoder: :class:`DeepPrompts`.
    """
    weight = clip.visual_projection.weight
    pooled = (vision or clip.vision_model)(pixel_values=pixels.to(weight.device, weight.dtype)).pooler_output
    inverted = inverse(clip, cut) if inverted is None else inverted
    projected = widened(pooled) @ widened(weight.detach()).T
    raw = projected @ inverted.to(projected).T
    h: Tensor = norm * raw / raw.norm(dim=1, keepdim=True)
    return h


def convert(
    pipe: DiffusionPipeline, clip: Any, images: Sequence[Image], prompts: str | Sequence[str] = "", **recipe: Any
) -> Tensor:
    """Prompt states of images for `prompt_embeds`, (N, T, E): a prompt's words, and h from its end token on.

    Of the empty prompt, the official one, that is the begin state and h in all other places. Officially another prompt
    has no effect here.

    Args:
        pipe: StableDiffusionPipeline whose text encoder is CLIP's.
        clip: CLIPModel.
        images: Pillow images.
        prompts: of all images or of each.
        recipe: cut, norm, inverted, vision, as for :func:`vectors`.

    Raises:
        ValueError: a prompt that is too long.
    """
    return edit(pipe, clip, images, prompts, 0.0, **recipe)


@torch.no_grad()
def edit(
    pipe: DiffusionPipeline,
    clip: Any,
    images: Sequence[Image],
    prompts: str | Sequence[str],
    alpha: float = 0.6,
    **recipe: Any,
) -> Tensor:
    """Prompt states of images edited by texts, (N, T, E): from the end token on h + ``alpha`` times the text's states.

    Args:
        pipe, clip, images, recipe: as for :func:`convert`.
        prompts: of all images or of each.
        alpha: 0.6 is official.

    Raises:
        ValueError: a prompt that is too long.
    """
    if "inverted" not in recipe:
        recipe["inverted"] = inverse(clip, recipe.get("cut", 0.3))
    prepare, known, rows = processor(clip), {}, []
    each = [prompts] * len(images) if isinstance(prompts, str) else prompts
    for image, prompt in zip(images, each, strict=True):
        if prompt not in known:
            known = {prompt: _text(pipe, prompt)}
        texts, end = known[prompt]
        pixels = prepare(images=image.convert("RGB"), return_tensors="pt").pixel_values
        h = vectors(clip, pixels, **recipe).to(texts)
        states = texts.clone()
        states[:, end:] = h[:, None] + alpha * texts[:, end:]
        rows.append(states)
    return torch.cat(rows)


class DeepPrompts(nn.Module):
    """CLIP's image encoder with learned tokens in each layer; its parameters have the names of prompt_clip.py.

    Args:
        clip: CLIPModel, whose encoder stays as it is.
        length: tokens.
        official: whether those of the first layer take the place of the first patches, as officially, instead of
            standing before them.
        dropout: of the tokens in training, by torch's own generator.
    """

    def __init__(self, clip: Any, length: int = 50, *, official: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        config = clip.config.vision_config
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        bound = math.sqrt(6 / (3 * patches + width))
        first = torch.empty(config.num_hidden_layers, length, width, dtype=torch.float32, device="cpu")
        self.deep_prompt_embeddings = nn.Parameter(first.uniform_(-bound, bound))
        self.prompt_proj = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.prompt_proj.weight, a=0, mode="fan_out")
        self.prompt_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.prompt_dropout = nn.Dropout(dropout)
        self.length, self.official, self._clip = length, official, [clip.vision_model]
        self.to(clip.device, clip.dtype)

    def forward(self, pixel_values: Tensor) -> Any:
        """(n, 3, side, side) → what has a `pooler_output` (n, V)."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        (vision,) = self._clip
        states = vision.pre_layrnorm(vision.embeddings(pixel_values))
        for place, layer in enumerate(vision.encoder.layers):
            projected = self.prompt_proj(self.deep_prompt_embeddings[place]).expand(len(states), -1, -1)
            patches = 1 + self.length if place or self.official else 1
            states = layer(torch.cat([states[:, :1], self.prompt_dropout(projected), states[:, patches:]], 1), None)
        return BaseModelOutputWithPooling(pooler_output=vision.post_layernorm(self.prompt_norm(states[:, 0])))


def tuning_loss(pipe: DiffusionPipeline, h: Tensor, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """The plain noise loss of n images with their own conversions as texts, (n,), differentiable.

    Args:
        h: (n, E), from :func:`vectors`.
        latents: (n, C, h, w), scaled.
        timesteps: (n,).
        noise: (n, C, h, w).

    Raises:
        ValueError: a model that predicts neither the noise nor v.
    """
    with torch.no_grad():
        texts, _ = _text(pipe, "")
    rest = h.to(texts)[:, None].expand(-1, texts.shape[1] - 1, -1)
    states = torch.cat([texts[:, :1].expand(len(h), -1, -1), rest], 1)
    return states_loss(pipe, states, None, latents, timesteps, noise)


def finetune(
    pipe: DiffusionPipeline,
    clip: Any,
    images: Sequence[Image],
    *,
    steps: int,
    learning_rate: float,
    batch: int = 1,
    length: int = 50,
    official: bool = False,
    dropout: float = 0.1,
    weight_decay: float = 1e-2,
    seed: int = 0,
    **recipe: Any,
) -> tuple[DeepPrompts, list[float]]:
    """Train deep prompts, and of the pipeline's UNet what requires a gradient, which changes in place.

    Args:
        pipe, clip, images: as for :func:`convert`.
        batch: images of a step, see :func:`draws`.
        length, official, dropout: of :class:`DeepPrompts`.
        recipe: cut, norm, as for :func:`vectors`.

    Returns:
        The image encoder, and each step's mean loss before its update.

    Raises:
        ValueError: a model that predicts neither the noise nor v.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision = DeepPrompts(clip, length, official=official, dropout=dropout)
    inverted = inverse(clip, recipe.pop("cut", 0.3))
    trained = [*vision.parameters(), *(each for each in pipe.unet.parameters() if each.requires_grad)]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    prepared = processor(clip)(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
    with torch.no_grad(), upcast_vae(pipe.vae):
        latents = torch.cat([encode_images(pipe.vae, preprocess(pipe, [image])) for image in images])
    latents = latents.to(pipe.unet.dtype)
    total, losses = pipe.scheduler.config.num_train_timesteps, []
    for step in range(steps):
        rows, timesteps, noise = draws(seed, step, batch, len(images), latents.shape[1:], total)
        h = vectors(clip, prepared[rows], inverted=inverted, vision=vision, **recipe)
        loss = tuning_loss(pipe, h, latents[rows], timesteps.to(latents.device), noise.to(latents)).mean()
        torch.autograd.backward(loss, inputs=trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return vision.eval(), losses


def draws(
    seed: int, step: int, batch: int, count: int, shape: Sequence[int], train_timesteps: int = 1000
) -> tuple[Tensor, Tensor, Tensor]:
    """What a step of :func:`finetune` draws: ``batch`` of ``count`` images, their timesteps and their noise.

    Returns:
        (batch,) int64, (batch,) int64 and (batch, C, h, w) float32, on the CPU.
    """
    generator = seeded(seed, step)
    rows = torch.randint(count, (batch,), generator=generator, device="cpu")
    timesteps = torch.randint(train_timesteps, (batch,), generator=generator, device="cpu")
    return rows, timesteps, torch.randn((batch, *shape), generator=generator, dtype=torch.float32, device="cpu")


def _text(pipe: Any, prompt: str) -> tuple[Tensor, int]:
    """A prompt's states, (1, T, E), and the place of its end token."""
    ids = tokenize(pipe, pipe.tokenizer, prompt)[1:]
    end = len(pipe.tokenizer(pipe.maybe_convert_prompt(prompt, pipe.tokenizer)).input_ids) - 1
    return pipe.text_encoder(ids.to(pipe.text_encoder.device))[0], end
