"""The score of (image, text) pairs: its two terms, row by row, for inference and for fitting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsd_fast.diffusion import resolve_timesteps
from dsd_fast.engine import Engine, ImagePrompt, Noised, Prompt, Texts, draw_noise
from dsd_fast.images import ImageError, ImageSource, decode_chunks
from dsd_fast.kernels.common.host import own_types
from dsd_fast.kernels.common.transfer import Download, upload
from dsd_fast.matching.config import MatchConfig
from dsd_fast.matching.layers import layer_weights
from dsd_fast.unet import Output

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.models.prompts import PromptStates


@dataclass(frozen=True)
class Terms:
    """The two terms of some pairs at their timesteps, before weights and means; all of one shape.

    Attributes:
        attention: Σ_l w_l · mean over heads and positions of lse_l, of the text's row.
        error: ‖ε − ε_text‖; zeros where the plan predicts no noise.
        free_attention, free_error: the same of the unconditional row; None without one.
    """

    attention: Tensor
    error: Tensor
    free_attention: Tensor | None = None
    free_error: Tensor | None = None

    def parts(self, config: MatchConfig) -> tuple[Tensor, Tensor]:
        """Weigh the attention and the noise-prediction part of the score, whose sum it is, at each timestep.

        Without an unconditional row both lack what it adds to all texts of an image alike.
        """
        attention, error = config.attention_weight * self.attention, self.error
        if self.free_attention is not None and self.free_error is not None:
            error = error - self.free_error
            if config.official:
                attention = attention + config.attention_weight * self.free_attention
        return attention, -config.noise_weight * error


class TermsBehind:
    """Terms of some pairs on their way to host memory, see :class:`Download`.

    Args:
        values: (2, B·S), and as many more as there are unconditional rows.
        image_of: (B,) int64 on the CPU.
        steps: S.
        images: n, how many images' unconditional rows follow; None: there are none.
    """

    def __init__(self, values: Tensor, image_of: Tensor, steps: int, images: int | None) -> None:
        self._download, self._image_of, self._steps, self._images = Download({"": values}), image_of, steps, images
        self.beside = self._download.beside

    def done(self) -> Terms:
        """Give them, (B, S) float64 on the CPU."""
        image_of, steps = self._image_of, self._steps
        rows = len(image_of) * steps
        attention, error = self._download.done()[""].double()
        terms = [value[:rows].view(len(image_of), steps) for value in (attention, error)]
        if self._images is not None:
            terms += [value[rows:].view(self._images, steps)[image_of] for value in (attention, error)]
        return Terms(*terms)


class PairScorer:
    """One engine, one configuration: the plan, the timesteps and the noise of every score.

    Args:
        engine: with the configuration's image size and memory budget, see :meth:`of`.
        config: see :class:`~dsd_fast.matching.Matcher`.
        prompt: (n, E) learned vectors that follow the tokens of each caption, or None.

    Attributes:
        timesteps: S·draws timesteps, each with its own draw.
        plan: the cut through the network that answers them.
        weights: score id → (H,) float32 weights of its heads.
        images_at_once: how many images may be noised together.
        needs_unconditional: whether the score compares with the unconditional row.
    """

    def __init__(self, engine: Engine, config: MatchConfig, prompt: Tensor | None = None) -> None:
        self.engine, self.config, self.prompt = engine, config, prompt
        self.model, self.program = engine.model, engine.program
        grid = resolve_timesteps(config.timesteps, self.model.schedule.num_train_timesteps)
        self.timesteps = [t for t in grid for _ in range(config.draws)]
        self.images_at_once = engine.images_held(len(self.timesteps))
        weights = layer_weights(self.program, config.layers) if config.attention_weight else {}
        self.plan = engine.plan(scores=tuple(weights), noise_pred=config.noise_weight != 0, pool=config.pool)
        self.weights = {name: upload(value, self.model.device) for name, value in weights.items()}
        self.needs_unconditional = config.noise_weight != 0 or config.official

    @classmethod
    def of(cls, model: Model, config: MatchConfig, adapter: str | Sequence[str] | None = None) -> PairScorer:
        """Make the scorer of a model under adapters, see :class:`~dsd_fast.matching.Matcher`."""
        engine = Engine(model, adapter, image_size=config.image_size, memory_budget=config.memory_budget)
        return cls(engine, config)

    def texts(self, states: PromptStates, unconditional: PromptStates | None = None) -> Texts:
        """Join encoded captions with what the scorer has learned for them."""
        return Texts(states, unconditional, vectors=self.prompt, scored=self.config.tokens)

    def encode_texts(self, captions: Sequence[Prompt] | ImagePrompt, unconditional: bool = True) -> Texts:
        """Encode each caption once; the states are in host memory.

        Args:
            captions: M strings, or images as prompts of one each; or M images as prompts.
            unconditional: whether the unconditional text comes with them where the score needs it.

        Raises:
            ValueError: a caption that is neither, or is longer than the encoder's limit; an image as a prompt of
                another model.
        """
        wanted = unconditional and self.needs_unconditional
        empty = self.engine.encode_prompts(None).to("cpu") if wanted else None
        return self.texts(self.engine.encode_prompts(captions).to("cpu"), empty)

    def images_together(self, texts: Texts, per_image: int) -> int:
        """Tell how many images make a few full micro-batches of rows, with ``per_image`` of the texts each.

        Raises:
            ValueError: a memory budget that does not hold one row.
        """
        engine = self.engine
        together = engine.images_together(self.plan, per_image * len(self.timesteps), texts.tokens)
        if not texts.fits(self.plan, engine.latent_size, engine.memory_budget):
            # The keys of all texts do not fit together and are made again for each chunk: the fewer, the better.
            return self.images_at_once
        return min(self.images_at_once, together)

    def latents(
        self, images: Iterable[ImageSource], texts: Texts, per_image: int, together: int | None = None
    ) -> Iterator[tuple[list[int], Tensor, dict[int, ImageError]]]:
        """Yield chunks of images, ``per_image`` texts each: their numbers, (n, C, h, w) latents, and the errors.

        Args:
            together: images of a chunk; None: :meth:`images_together`.
        """
        chunk = together or self.images_together(texts, per_image)
        for numbers, pixels, errors in decode_chunks(images, self.engine.size, chunk):
            yield numbers, self.engine.encode_images(pixels), errors

    def score(
        self,
        latents: Tensor,
        texts: Texts,
        image_of: Tensor,
        text_of: Tensor,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Score the pairs (image_of[b], text_of[b]): (B,) float32 on the CPU.

        Args:
            latents: (n, C, h, w) clean latents, at most :attr:`images_at_once`.
            texts: from :meth:`encode_texts` or :meth:`texts`.
            image_of, text_of: (B,) int64.
            seeds: one per image; None: the configuration's for all.
        """
        return self.sums(self.begin(latents, texts, image_of, text_of, seeds).done())

    def sums(self, terms: Terms) -> Tensor:
        """Average (B, S) terms to the scores, (B,) float32."""
        attention, noise = self.parts(terms)
        return (attention + noise).float()

    def parts(self, terms: Terms) -> tuple[Tensor, Tensor]:
        """Average (B, S) terms to the attention and the noise-prediction part of the scores, (B,) each."""
        attention, noise = terms.parts(self.config)
        return attention.mean(1), noise.mean(1)

    def begin(
        self,
        latents: Tensor,
        texts: Texts,
        image_of: Tensor,
        text_of: Tensor,
        seeds: Sequence[int] | None = None,
        *,
        epsilon: Tensor | None = None,
    ) -> TermsBehind:
        """Begin to compute what :meth:`score` is made of; unconditional terms where texts have them.

        Args:
            latents: as for :meth:`score`, or (n, S, C, h, w), one clean latent per timestep.
            epsilon: (S, C, h, w) noise, instead of the seeds'.
        """
        if not len(image_of):
            # Of images that failed there is nothing to noise.
            return TermsBehind(
                torch.zeros(2, 0, dtype=torch.float32, device="cpu"), image_of, len(self.timesteps), None
            )
        images, steps = len(latents), len(self.timesteps)
        device, model = self.model.device, self.model
        if epsilon is None:
            epsilon = draw_noise([self.config.seed] if seeds is None else seeds, steps, latents.shape[-3:])
        epsilon = epsilon.view(-1, steps, *epsilon.shape[-3:])  # (1 or n, S, C, h, w)
        noised = Noised.grid(model.schedule, upload(latents, device, model.dtype), epsilon, self.timesteps)
        # The pairs' steps first, then the unconditional rows, one per noised latent.
        latent_of = (image_of[:, None] * steps + torch.arange(steps, device="cpu")).flatten()  # (B·S,)
        text_rows = text_of.repeat_interleave(steps)
        if texts.unconditional is not None:
            every = torch.arange(images * steps, device="cpu")
            latent_of = torch.cat([latent_of, every])
            text_rows = torch.cat([text_rows, torch.full_like(every, len(texts))])
        values = torch.zeros(2, len(latent_of), device=device, dtype=noised.noise.dtype)
        for rows, out in self.engine.rows(
            self.plan, noised.latents, noised.timesteps, texts, text_rows, latent_of=latent_of
        ):
            values[:, upload(rows, device)] = torch.stack(self.row_terms(out, noised, latent_of[rows], self.weights))
        return TermsBehind(values, image_of, steps, None if texts.unconditional is None else images)

    def row_terms(
        self, out: Output, noised: Noised, rows: Tensor, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the attention term and the error of some rows, (b,) float32 or more each; differentiable.

        Args:
            out: what the plan answered.
            rows: (b,) int64 on the CPU, the noised latent of each row.
            weights: score id → (H,) weights of its heads.
        """
        attention = noised.noise.new_zeros(len(rows))
        with own_types(attention.device):
            for name, weight in weights.items():
                attention = attention + out.scores[name] @ weight.to(out.scores[name])
        error = torch.zeros_like(attention) if out.noise_pred is None else noised.error(out, rows)
        return attention, error
