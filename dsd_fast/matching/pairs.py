"""The scores of (image, text) pairs: every row that they need, none twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsd_fast.diffusion import noise, resolve_timesteps
from dsd_fast.matching.config import MatchConfig
from dsd_fast.matching.layers import layer_weights
from dsd_fast.matching.texts import project
from dsd_fast.models.batches import encode_within
from dsd_fast.unet import Output, TextKV, UNetProgram
from dsd_fast.unet.adapters import AdapterScope, active_strengths, split_adapters
from dsd_fast.unet.stream import default_budget, rows_at_once

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.models.prompts import PromptStates

# Noised latents held at once: enough images to fill any micro-batch, whatever the number of images given.
_LATENT_BYTES = 64 << 20
# Micro-batches scored together: enough that a partly filled last one costs little, few enough that results come soon.
_MICRO_BATCHES = 4


@dataclass(frozen=True)
class Terms:
    """The two terms of B pairs at S timesteps, before weights and means, float64 on the CPU.

    Attributes:
        attention: (B, S), Σ_l w_l · mean over heads and positions of lse_l, of the text's row.
        error: (B, S), ‖ε − ε_text‖; zeros where the plan predicts no noise.
        free_attention, free_error: (B, S), the same of the unconditional row; None without one.
    """

    attention: Tensor
    error: Tensor
    free_attention: Tensor | None
    free_error: Tensor | None


class Captions:
    """M encoded captions of one call, held in host memory, and the unconditional text if the score needs one.

    ``keys`` are those of all of them, once made, where they fit the budget together.
    """

    def __init__(self, states: PromptStates, empty: PromptStates | None) -> None:
        self.states, self.empty = states, empty
        self.keys: TextKV | None = None

    def __len__(self) -> int:
        return len(self.states)


class PairScorer:
    """One model, one configuration: the plan, the timesteps and the noise of every score.

    Args:
        model: see :class:`~dsd_fast.matching.Matcher`, as `config` and `adapter`.
        prompt: (n, E) learned vectors that follow the tokens of each caption, or None.
        like: a scorer on the same text encoders, whose adapters they have, as strong as there. The UNet's are then
            those active on it at each call, and `adapter` is not looked at.

    Attributes:
        timesteps: S·draws timesteps, each with its own draw.
        plan: the cut through the network that answers them.
        size, latent_size: (height, width) of images in pixels, and of their latents.
        images_at_once: how many images may be noised together.
    """

    def __init__(
        self,
        model: Model,
        config: MatchConfig,
        adapter: str | Sequence[str] | None = None,
        prompt: Tensor | None = None,
        like: PairScorer | None = None,
    ) -> None:
        self.model, self.config, self.prompt = model, config, prompt
        self.program = UNetProgram(model.unet)
        grid = resolve_timesteps(config.timesteps, model.schedule.num_train_timesteps)
        self.timesteps = [t for t in grid for _ in range(config.draws)]
        self.size = config.image_size or model.image_size
        factor = model.vae_scale_factor
        if any(side < factor or side % factor for side in self.size):
            raise ValueError(f"image_size: got {self.size}, expected multiples of {factor} pixels")
        self.latent_size = (self.size[0] // factor, self.size[1] // factor)
        per_image = len(self.timesteps) * model.unet.config.in_channels * self.latent_size[0] * self.latent_size[1] * 4
        self.images_at_once: int = max(1, _LATENT_BYTES // per_image)
        weights = layer_weights(self.program, config.layers) if config.attention_weight else {}
        unet_adapter: tuple[str, ...] | None = None
        self._encoder_scopes: list[AdapterScope]
        if like is None:
            unet_adapter, self._encoder_scopes = split_adapters(model.unet, model.text_encoders, adapter)
        else:
            self._encoder_scopes = like._encoder_scopes
        self.plan = self.program.plan(
            scores=tuple(weights),
            noise_pred=config.noise_weight != 0,
            pool=config.pool,
            adapter=unet_adapter,
        )
        self.weights = {name: value.to(model.unet.device) for name, value in weights.items()}
        self.needs_unconditional = config.noise_weight != 0 or config.official

    def encode_texts(self, captions: Sequence[str], unconditional: bool = True) -> Captions:
        """Each caption once through the text encoder, under this scorer's adapters.

        Args:
            captions: M strings.
            unconditional: whether the unconditional text comes with them where the score needs it.

        Raises:
            ValueError: a caption that is not a string or is longer than the encoder's limit.
        """
        with ExitStack() as scopes:
            for scope in self._encoder_scopes:
                scopes.enter_context(scope.active())
            scopes.enter_context(torch.no_grad())
            # Again for each call: the text encoder's own adapters may have changed since the last.
            wanted = unconditional and self.needs_unconditional
            empty = self.model.encode_unconditional().to("cpu") if wanted else None
            return Captions(self.model.encode_prompts(captions).to("cpu"), empty)

    def strengths(self) -> list[list[tuple[str, float]]]:
        """The active adapters of the UNet and of each text encoder, and how strong they are."""
        with ExitStack() as scopes:
            scopes.enter_context(self.plan.active())
            for scope in self._encoder_scopes:
                scopes.enter_context(scope.active())
            return [active_strengths(network) for network in (self.model.unet, *self.model.text_encoders)]

    def images_together(self, captions: Captions, texts: int) -> int:
        """How many images make a few full micro-batches of rows, with ``texts`` of the captions each.

        Raises:
            ValueError: a memory budget that does not hold one row.
        """
        if captions.keys is None and self._texts_at_once(captions) < len(captions):
            # The keys of all captions do not fit together and are made again for each chunk: the fewer, the better.
            return self.images_at_once
        tokens, budget = self._tokens(captions), self.config.memory_budget
        rows = _MICRO_BATCHES * rows_at_once(self.plan, *self.latent_size, tokens, memory_budget=budget)
        return max(1, min(self.images_at_once, -(-rows // (texts * len(self.timesteps)))))

    def encode_images(self, pixels: Sequence[Tensor]) -> Tensor:
        """(n, C, h, w) clean latents of n images, each (3, height, width) in [−1, 1], a few at a time."""
        given = self.config.memory_budget
        budget = default_budget(self.model.unet.device) if given is None else given
        return encode_within(self.model, pixels, budget)

    def score(
        self,
        latents: Tensor,
        captions: Captions,
        image_of: Tensor,
        text_of: Tensor,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """(B,) float32 scores of the pairs (image_of[b], text_of[b]), on the CPU.

        Args:
            latents: (n, C, h, w) clean latents, at most :attr:`images_at_once`.
            captions: from :meth:`encode_texts`.
            image_of, text_of: (B,) int64.
            seeds: one per image; None: the configuration's for all.
        """
        return self._combine(self.terms(latents, captions, image_of, text_of, seeds))

    def terms(
        self,
        latents: Tensor,
        captions: Captions,
        image_of: Tensor,
        text_of: Tensor,
        seeds: Sequence[int] | None = None,
        *,
        epsilon: Tensor | None = None,
    ) -> Terms:
        """What :meth:`score` is made of; there is an unconditional row where the captions have an empty text.

        Args:
            latents: as for :meth:`score`, or (n, S, C, h, w), one clean latent per timestep.
            epsilon: (S, C, h, w) noise, instead of the seeds'.
        """
        images, steps, pairs = len(latents), len(self.timesteps), len(image_of)
        device = self.model.unet.device
        epsilon = (self._noise(seeds, latents.shape[-3:]) if epsilon is None else epsilon).to(device)
        times = torch.tensor(self.timesteps).repeat(images)
        clean = latents.to(device, torch.promote_types(latents.dtype, torch.float32))
        clean = clean.flatten(0, 1) if latents.ndim == 5 else clean.repeat_interleave(steps, 0)
        every = epsilon.repeat(images, 1, 1, 1) if seeds is None else epsilon
        noised = self.model.schedule.add_noise(clean, every.to(clean.dtype), times).to(self.model.unet.dtype)
        ids = self.model.time_ids(*self.size)
        # One slot per row: the pairs' steps first, then the unconditional rows, one per noised latent.
        slots = pairs * steps + (images * steps if captions.empty is not None else 0)
        attention = torch.zeros(slots, device=device, dtype=torch.float32)
        error = torch.zeros(slots, device=device, dtype=torch.float32)
        for text, latent_rows, text_rows, slot in self._rows(captions, image_of, text_of, images):
            for rows, out in self.plan.stream(
                noised,
                times,
                text,
                latent_index=latent_rows,
                text_index=text_rows,
                time_ids=ids,
                memory_budget=self.config.memory_budget,
            ):
                where = slot[rows].to(device)
                attention[where] = self._attention(out, len(rows), device)
                if out.noise_pred is not None:
                    at = latent_rows[rows].to(device)
                    predicted = self.model.schedule.to_epsilon(
                        out.noise_pred.float(), noised[at].float(), times[latent_rows[rows]]
                    )
                    error[where] = (every[at].float() - predicted).flatten(1).norm(dim=1)
        attention, error = attention.cpu().double(), error.cpu().double()
        free_attention = free_error = None
        if captions.empty is not None:
            free_attention = attention[pairs * steps :].view(-1, steps)[image_of]
            free_error = error[pairs * steps :].view(-1, steps)[image_of]
        return Terms(
            attention[: pairs * steps].view(pairs, steps),
            error[: pairs * steps].view(pairs, steps),
            free_attention,
            free_error,
        )

    def _rows(
        self, captions: Captions, image_of: Tensor, text_of: Tensor, images: int
    ) -> Iterator[tuple[TextKV, Tensor, Tensor, Tensor]]:
        """The rows of each group of texts whose keys fit the budget: texts, latents, texts' positions, slots."""
        steps = torch.arange(len(self.timesteps))
        at_once = self._texts_at_once(captions) if captions.keys is None else len(captions)
        if at_once >= len(captions):
            # One group: its keys are made once and kept for the next images.
            if captions.keys is None:
                captions.keys = self._encode(captions.states, captions.empty)
            used = torch.arange(len(captions))
        else:
            used, text_of = torch.unique(text_of, return_inverse=True)
        for start in range(0, max(len(used), 1), at_once):
            group = used[start : start + at_once]
            chosen = torch.nonzero((text_of >= start) & (text_of < start + at_once)).flatten()
            latent_rows = (image_of[chosen, None] * len(steps) + steps).flatten()
            text_rows = (text_of[chosen, None] - start).expand(-1, len(steps)).flatten()
            slot = (chosen[:, None] * len(steps) + steps).flatten()
            empty = captions.empty if start == 0 else None
            if empty is not None:
                every = torch.arange(images * len(steps))
                latent_rows = torch.cat([latent_rows, every])
                text_rows = torch.cat([text_rows, torch.full_like(every, len(group))])
                slot = torch.cat([slot, len(image_of) * len(steps) + every])
            keys = captions.keys or self._encode(captions.states[group], empty)
            yield keys, latent_rows, text_rows, slot

    def _encode(self, states: PromptStates, empty: PromptStates | None) -> TextKV:
        if empty is not None:
            states = states.followed_by(empty)
        with torch.no_grad():
            return project(
                self.plan, states, tokens=self.config.tokens, prompt=self.prompt, bare=int(empty is not None)
            )

    def _tokens(self, captions: Captions) -> int:
        """Keys of each caption: its tokens, padding included, and the learned vectors."""
        return int(captions.states.states.shape[1]) + (0 if self.prompt is None else len(self.prompt))

    def _texts_at_once(self, captions: Captions) -> int:
        """Captions whose keys and values, with the unconditional text's, take half the budget and leave a row room."""
        unet, given = self.model.unet, self.config.memory_budget
        names = (*self.plan.key_layers, *self.plan.value_layers)
        width: int = sum(self.program.attention(name).inner_dim for name in names)
        per_text = max(1, width * self._tokens(captions) * unet.dtype.itemsize)
        budget = default_budget(unet.device) // 2
        if given is not None:
            room = given - self.plan.run_bytes(1, *self.latent_size, self._tokens(captions))
            budget = min(given // 2, room)
        count: int = budget // per_text - int(captions.empty is not None)
        return max(1, count)

    def _noise(self, seeds: Sequence[int] | None, shape: Sequence[int]) -> Tensor:
        """(S·draws, C, h, w), or as many for each seed."""
        chosen = [self.config.seed] if seeds is None else seeds
        return torch.stack([noise(seed, draw, shape) for seed in chosen for draw in range(len(self.timesteps))])

    def _attention(self, out: Output, rows: int, device: torch.device) -> Tensor:
        total = torch.zeros(rows, device=device)
        for name, weight in self.weights.items():
            total = total + out.scores[name].float() @ weight
        return total

    def parts(self, terms: Terms) -> tuple[Tensor, Tensor]:
        """The attention and the noise-prediction part of the score, (B,) float64 each; their sum is the score."""
        config = self.config
        attention, noise_part = config.attention_weight * terms.attention, torch.zeros_like(terms.error)
        if terms.free_attention is not None and terms.free_error is not None:
            noise_part = config.noise_weight * (terms.free_error - terms.error)
            if config.official:
                attention = attention + config.attention_weight * terms.free_attention
        return attention.mean(1), noise_part.mean(1)

    def _combine(self, terms: Terms) -> Tensor:
        attention, noise_part = self.parts(terms)
        return (attention + noise_part).float()
