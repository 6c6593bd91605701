"""The scores of (image, text) pairs: every row that they need, none twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsd_fast.diffusion import noise, resolve_timesteps
from dsd_fast.matching.config import MatchConfig
from dsd_fast.matching.layers import layer_weights
from dsd_fast.unet import Output, TextKV, UNetProgram
from dsd_fast.unet.stream import default_budget

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.models.prompts import PromptStates

# Noised latents held at once: enough images to fill any micro-batch, whatever the number of images given.
_LATENT_BYTES = 64 << 20


class PairScorer:
    """One model, one configuration: the plan, the timesteps and the noise of every score.

    Attributes:
        timesteps: S·draws timesteps, each with its own draw.
        plan: the cut through the network that answers them.
        size, latent_size: (height, width) of images in pixels, and of their latents.
        images_at_once: how many images are noised together.
    """

    def __init__(self, model: Model, config: MatchConfig, adapter: str | Sequence[str] | None = None) -> None:
        self.model, self.config = model, config
        self.program = UNetProgram(model.unet)
        grid = resolve_timesteps(config.timesteps, model.schedule.num_train_timesteps)
        self.timesteps = [t for t in grid for _ in range(config.draws)]
        self.size = config.image_size or model.image_size
        factor = model.vae_scale_factor
        if any(side < factor or side % factor for side in self.size):
            raise ValueError(f"image_size: got {self.size}, expected multiples of {factor} pixels")
        self.latent_size = (self.size[0] // factor, self.size[1] // factor)
        per_image = len(self.timesteps) * model.unet.config.in_channels * self.latent_size[0] * self.latent_size[1] * 4
        self.images_at_once = max(1, _LATENT_BYTES // per_image)
        weights = layer_weights(self.program, config.layers) if config.attention_weight else {}
        self.plan = self.program.plan(
            scores=tuple(weights), noise_pred=config.noise_weight != 0, pool=config.pool, adapter=adapter
        )
        self.weights = {name: value.to(model.unet.device) for name, value in weights.items()}
        self.needs_unconditional = config.noise_weight != 0 or config.official
        self._unconditional: PromptStates | None = None

    def encode_texts(self, captions: Sequence[str]) -> PromptStates:
        """Each caption once through the text encoder.

        Raises:
            ValueError: a caption that is not a string or is longer than the encoder's limit.
        """
        with torch.no_grad():
            return self.model.encode_prompts(captions)

    def score(
        self,
        latents: Tensor,
        texts: PromptStates,
        image_of: Tensor,
        text_of: Tensor,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """(B,) float32 scores of the pairs (image_of[b], text_of[b]), on the CPU.

        Args:
            latents: (n, C, h, w) clean latents, at most :attr:`images_at_once`.
            texts: M texts.
            image_of, text_of: (B,) int64.
            seeds: one per image; None: the configuration's for all.
        """
        images, steps, pairs = len(latents), len(self.timesteps), len(image_of)
        device = self.model.unet.device
        epsilon = self._noise(seeds, latents.shape[1:]).to(device)
        times = torch.tensor(self.timesteps).repeat(images)
        clean = latents.to(device, torch.promote_types(latents.dtype, torch.float32)).repeat_interleave(steps, 0)
        every = epsilon.repeat(images, 1, 1, 1) if seeds is None else epsilon
        noised = self.model.schedule.add_noise(clean, every.to(clean.dtype), times).to(self.model.unet.dtype)
        ids = self.model.time_ids(*self.size)
        # One slot per row: the pairs' steps first, then the unconditional rows, one per noised latent.
        slots = pairs * steps + (images * steps if self.needs_unconditional else 0)
        attention = torch.zeros(slots, device=device, dtype=torch.float32)
        error = torch.zeros(slots, device=device, dtype=torch.float32)
        for text, latent_rows, text_rows, slot in self._rows(texts, image_of, text_of, images):
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
                    at = latent_rows[rows]
                    predicted = self.model.schedule.to_epsilon(
                        out.noise_pred.float(), noised[at.to(device)].float(), times[at]
                    )
                    error[where] = (every[at.to(device)].float() - predicted).flatten(1).norm(dim=1)
        return self._combine(attention.cpu().double(), error.cpu().double(), image_of, steps)

    def _rows(
        self, texts: PromptStates, image_of: Tensor, text_of: Tensor, images: int
    ) -> Iterator[tuple[TextKV, Tensor, Tensor, Tensor]]:
        """The rows of each group of texts whose keys fit the budget: texts, latents, texts' positions, slots."""
        steps = torch.arange(len(self.timesteps))
        pairs = len(image_of)
        size = self._texts_at_once(texts)
        for start in range(0, max(len(texts), 1), size):
            group = texts[start : start + size]
            chosen = torch.nonzero((text_of >= start) & (text_of < start + size)).flatten()
            latent_rows = (image_of[chosen, None] * len(steps) + steps).flatten()
            text_rows = (text_of[chosen, None] - start).expand(-1, len(steps)).flatten()
            slot = (chosen[:, None] * len(steps) + steps).flatten()
            if start == 0 and self.needs_unconditional:
                every = torch.arange(images * len(steps))
                latent_rows = torch.cat([latent_rows, every])
                text_rows = torch.cat([text_rows, torch.full_like(every, len(group))])
                slot = torch.cat([slot, pairs * len(steps) + every])
                group = group.followed_by(self._empty())
            if len(slot):
                yield self._encode(group), latent_rows, text_rows, slot

    def _encode(self, texts: PromptStates) -> TextKV:
        mask = None
        if self.config.tokens == "real":
            mask = torch.arange(texts.states.shape[1]) < texts.lengths[:, None]
        with torch.no_grad():
            return self.plan.encode_text(texts.states, pooled=texts.pooled, score_mask=mask)

    def _empty(self) -> PromptStates:
        if self._unconditional is None:
            with torch.no_grad():
                self._unconditional = self.model.encode_unconditional()
        return self._unconditional

    def _texts_at_once(self, texts: PromptStates) -> int:
        """PromptStates whose keys and values take half the budget."""
        device = self.model.unet.device
        budget = default_budget(device) if self.config.memory_budget is None else self.config.memory_budget
        width = sum(self.program.attention(name).inner_dim for name in self.plan.key_layers)
        per_text = 2 * width * texts.states.shape[1] * texts.states.element_size() if len(texts) else 1
        return max(1, budget // (2 * max(1, per_text)))

    def _noise(self, seeds: Sequence[int] | None, shape: Sequence[int]) -> Tensor:
        """(S·draws, C, h, w), or as many for each seed."""
        chosen = [self.config.seed] if seeds is None else seeds
        return torch.stack([noise(seed, draw, shape) for seed in chosen for draw in range(len(self.timesteps))])

    def _attention(self, out: Output, rows: int, device: torch.device) -> Tensor:
        total = torch.zeros(rows, device=device)
        for name, weight in self.weights.items():
            total = total + out.scores[name].float() @ weight
        return total

    def _combine(self, attention: Tensor, error: Tensor, image_of: Tensor, steps: int) -> Tensor:
        config, pairs = self.config, len(image_of)
        att, err = attention[: pairs * steps].view(pairs, steps), error[: pairs * steps].view(pairs, steps)
        score = config.attention_weight * att
        if self.needs_unconditional:
            free_att = attention[pairs * steps :].view(-1, steps)[image_of]
            free_err = error[pairs * steps :].view(-1, steps)[image_of]
            score = score + config.noise_weight * (free_err - err)
            if config.official:
                score = score + config.attention_weight * free_att
        return score.mean(1).float()
