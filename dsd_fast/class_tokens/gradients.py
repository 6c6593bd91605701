"""What classes lose, and the gradient to their vectors: once through the text encoder, then by images made or given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.class_tokens.config import TokenConfig
from dsd_fast.class_tokens.learning import Losses
from dsd_fast.class_tokens.prompts import Prompts
from dsd_fast.diffusion import (
    Predict,
    RowNoise,
    guidance_embedding,
    guided,
    last_calls,
    sample,
    scheduler_timesteps,
)
from dsd_fast.engine import Engine, Texts, draw_noise
from dsd_fast.engine.guides import Guide
from dsd_fast.engine.noise_loss import NoiseLoss, draw_row
from dsd_fast.engine.prediction import Prediction
from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.generation.sampler import Sampler
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.prompts import PromptStates
from dsd_fast.models.splice import Splice

# What gradients are multiplied by on their way through half types, since float16 would take the smallest for zero; as a
# power of two it changes no digit.
_LIFT = 1024.0
# And of a class by at most this power of two or its inverse, which leaves float32 room on either side.
_LIFTS = 64
# Of the settings, those of how images are made.
_IMAGES = ("steps", "guidance", "scheduler", "image_size", "adapter", "memory_budget")
# Bounds the encoders' activations.
_TEXTS_AT_ONCE = 64


class Answer(NamedTuple):
    """What :class:`Gradients` ask of a loss.

    Attributes:
        told: (C,) losses, accuracies and probabilities; None of what there is not.
        lift: (C,), what each class's gradient was multiplied by.
    """

    told: tuple[Tensor, Tensor | None, Tensor | None]
    lift: Tensor


class Gradients(ABC):
    """The losses of classes and their gradients, whatever the loss.

    Args:
        engine: of the spliced model.
        splice: where vectors are put.
        prompts: of the classes.
        config: the settings.
    """

    def __init__(self, engine: Engine, splice: Splice, prompts: Prompts, config: TokenConfig) -> None:
        self._engine, self._splice, self._prompts, self._config = engine, splice, prompts, config
        self._model = engine.model

    def __call__(self, vectors: Sequence[Tensor], classes: Sequence[int], updates: Sequence[int]) -> Losses:
        """See :data:`~dsd_fast.class_tokens.learning.Differentiate`."""
        model = self._model
        leaves = [upload(each, model.device).detach().requires_grad_() for each in vectors]  # (N, v, E)
        self._splice.put(*(leaf.flatten(0, 1) for leaf in leaves))
        texts = [text for each in zip(classes, updates, strict=True) for text in self._prompts.texts(*each)]
        different = list(dict.fromkeys(texts))
        place = {text: number for number, text in enumerate(different)}
        text_of = torch.tensor([place[text] for text in texts], dtype=torch.int64, device="cpu")  # (C · images,)
        # The encoders keep nothing while the network runs, which needs the memory: they are gone through once more.
        with torch.no_grad():
            states = self._encoded(different)
        cut = [each.to(model.device, model.dtype).requires_grad_() for each in _tensors(states)]
        leaf_states = replace(states, states=cut[0], pooled=cut[1] if cut[1:] else None)
        answer = self._differentiate(leaf_states, text_of, classes, updates)
        for start in range(0, len(different), _TEXTS_AT_ONCE):
            part = slice(start, start + _TEXTS_AT_ONCE)
            again = _tensors(self._encoded(different[part]))
            torch.autograd.backward(again, [_grad(each)[part].to(own) for each, own in zip(cut, again, strict=True)])
        gradients = [(_grad(leaf)[classes] / answer.lift[:, None, None]).cpu() for leaf in leaves]
        losses, *optional = answer.told
        accuracies, probabilities = (None if each is None else each.detach().cpu() for each in optional)
        return Losses(losses.detach().cpu(), accuracies, probabilities, gradients)

    def compare(self, vectors: Sequence[Tensor], together: int) -> Tensor:
        """See :data:`~dsd_fast.class_tokens.learning.Compare`; the losses of a first update."""
        every = range(len(vectors[0]))
        parts = [every[start : start + together] for start in range(0, len(every), together)]
        return torch.cat([self(vectors, part, [0] * len(part)).losses for part in parts])

    def _encoded(self, texts: Sequence[str]) -> PromptStates:
        with self._engine.adapters.active(texts_only=True):
            return self._model.encode_prompts(texts)

    @abstractmethod
    def _differentiate(
        self, texts: PromptStates, text_of: Tensor, classes: Sequence[int], updates: Sequence[int]
    ) -> Answer:
        """Leave the gradient of the classes' losses in the states' leaves.

        Args:
            texts: the states of an update's different texts.
            text_of: (C · images,) the text of each image, class by class.
        """


def _tensors(states: PromptStates) -> list[Tensor]:
    return [each for each in (states.states, states.pooled) if each is not None]


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


class ThroughImages(Gradients):
    """The cross-entropy of a guide's outputs for images that are made.

    Schwartz et al. 2023, "Discriminative Class Tokens for Text-to-Image Diffusion Models", section 3, and run.py of
    idansc/discriminative_class_tokens: the gradient goes through the sampler's last calls of the network alone.

    Args:
        guide: judges the images.
        targets: the output of each class.
        latents: (images, C, h, w) that each update begins at, or None.
    """

    def __init__(
        self,
        engine: Engine,
        splice: Splice,
        prompts: Prompts,
        config: TokenConfig,
        guide: Guide,
        targets: Sequence[int],
        latents: Tensor | None,
    ) -> None:
        super().__init__(engine, splice, prompts, config)
        self._guide, self._targets, self._latents = guide, targets, latents
        if latents is None and config.noise == "fixed":
            shape = (self._model.latent_channels, *engine.latent_size)
            self._latents = draw_noise([config.seed], config.images, shape)[0]  # (images, C, h, w)
        # What the network says at the first call without a text, (images, C, h, w).
        self._first: Tensor | None = None
        self._scheduler = self._model.new_scheduler()
        self._calls = len(scheduler_timesteps(self._scheduler, config.steps))
        self._is_guided = config.guidance > 1 and not engine.program.guidance_width
        self._decoded = engine.images_decoded()
        self._unconditional = engine.encode_prompts(None if self._model.absent_prompt_is_zeros else [""])

    @cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self._model, GenerateConfig(**{name: getattr(self._config, name) for name in _IMAGES}))

    @torch.no_grad()
    def compare(self, vectors: Sequence[Tensor], together: int) -> Tensor:
        """See :data:`~dsd_fast.class_tokens.learning.Compare`; how improbable the guide finds each class, at the mean.

        Classes whose texts say the same are judged by the same images.
        """
        self._splice.put(*(each.flatten(0, 1) for each in vectors))
        texts = [self._prompts.first(number) for number in range(len(vectors[0]))]
        said = [
            (*(text.replace(token, "\0") for text in own), *(bytes(each[number].numpy()) for each in vectors))
            for number, (token, own) in enumerate(zip(self._prompts.tokens, texts, strict=True))
        ]
        shown = list(dict.fromkeys(said))
        rows = [
            self._sampler.resolve(GenerateRow(text, seed=(self._config.seed + image) % 2**64))
            for each in shown
            for image, text in enumerate(texts[said.index(each)])
        ]
        at_once = self._sampler.rows_at_once(rows[0])
        probabilities = torch.cat(
            [
                self._logs(self._sampler.pixels(rows[start : start + at_once])).exp()[:, self._targets].cpu()
                for start in range(0, len(rows), at_once)
            ]
        )
        means = probabilities.view(len(shown), self._config.compared, -1).mean(1)  # (different texts, N)
        return 1 - means[[shown.index(each) for each in said], range(len(said))]

    def _logs(self, pixels: Tensor) -> Tensor:
        """Logarithms of the guide's probabilities, (n, outputs), at least in float32."""
        logits = self._guide.logits(pixels) / self._config.temperature
        return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)

    def _differentiate(
        self, texts: PromptStates, text_of: Tensor, classes: Sequence[int], updates: Sequence[int]
    ) -> Answer:
        clean = self._sampled(texts, text_of, classes, updates)
        count, device = len(classes), clean.device
        targets = torch.tensor([self._targets[each] for each in classes], dtype=torch.int64, device="cpu")
        targets = upload(targets.repeat_interleave(self._config.images), device)
        told, gradient = [], torch.empty_like(clean)
        for start in range(0, len(clean), self._decoded):
            part = slice(start, start + self._decoded)
            leaf = clean[part].detach().requires_grad_()
            logs = self._logs(self._engine.decode_latents(leaf))
            own = logs.gather(1, targets[part, None])[:, 0]
            torch.autograd.backward(-own.sum() * _LIFT)
            gradient[part] = _grad(leaf)
            told.append(torch.stack([-own, (logs.argmax(1) == targets[part]).to(own), own.exp()]).detach())
        # Of each class as large as a half type likes it.
        largest = gradient.view(count, -1).abs().amax(1)
        lift = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(-_LIFTS, _LIFTS))
        lift = torch.where(largest.isfinite() & (largest > 0), lift, 1.0)
        torch.autograd.backward([clean], [(gradient.view(count, -1) * lift[:, None]).view_as(gradient)])
        means = torch.cat(told, dim=1).view(3, count, -1).mean(-1)
        return Answer((means[0], means[1], means[2]), lift * (_LIFT * self._config.images))

    def _sampled(self, texts: PromptStates, text_of: Tensor, classes: Sequence[int], updates: Sequence[int]) -> Tensor:
        """Clean latents of all images, (C · images, C, h, w), differentiable in the states by the last calls."""
        draws = self._draws(classes, updates)
        if self._latents is None:
            start = draws.start((self._model.latent_channels, *self._engine.latent_size))
        else:
            start = self._latents.repeat(len(classes), 1, 1, 1)
        start = upload(start, self._model.device, torch.promote_types(self._model.dtype, torch.float32))
        predict = last_calls(self._predict(texts, text_of), self._calls, self._config.gradient_steps)
        return sample(self._scheduler, predict, start, steps=self._config.steps, draws=draws)

    def _predict(self, texts: PromptStates, text_of: Tensor) -> Predict:
        """What the sampler calls.

        Where noise is fixed all classes have the same latents at the first call: what comes before the network reads a
        text is computed for those alone, and what it says without a text once for all updates.
        """
        config, rows, images = self._config, len(text_of), self._config.images
        width = self._engine.program.guidance_width
        every = torch.arange(rows, device="cpu")
        absent = torch.full_like(text_of, len(texts))
        states = Texts(texts, self._unconditional if self._is_guided else None)

        def prediction(text_of: Tensor, latent_of: Tensor, latents: int) -> Prediction:
            return self._engine.predict(
                states,
                text_of,
                latent_of=latent_of,
                timestep_cond=guidance_embedding([config.guidance] * latents, width) if width else None,
                gradients=config.gradient_steps,
                checkpoint=config.checkpointing,
            )

        asked = torch.cat([absent, text_of]) if self._is_guided else text_of
        usual = prediction(asked, every.repeat(len(asked) // rows), rows)
        first = None if self._latents is None else prediction(text_of, every % images, images)

        def predict(latents: Tensor, t: float) -> Tensor:
            nonlocal first
            if first is None:
                return usual(latents, t)
            begin, first = first, None
            given = begin(latents[:images], t)
            if not self._is_guided:
                return given
            if self._first is None:
                with torch.no_grad():
                    self._first = prediction(absent[:images], every[:images], images)(latents[:images], t)
            return torch.cat([self._first.repeat(rows // images, 1, 1, 1), given])

        return guided(predict, config.guidance) if self._is_guided else predict

    def _draws(self, classes: Sequence[int], updates: Sequence[int]) -> RowNoise:
        """The noise of all images: that of an update, of which each image is a draw."""
        config = self._config
        if config.noise == "fixed":
            seeds = [config.seed] * len(classes)
        else:
            seeds = [self._prompts.noise_seed(*each) for each in zip(classes, updates, strict=True)]
        return RowNoise([seed for seed in seeds for _ in range(config.images)], together=config.images)


class ThroughNoise(Gradients):
    """The noise loss of given images at random timesteps.

    Gal et al. 2022, "An Image is Worth One Word", eq. 2.

    Args:
        latents: of each class its images', (n, C, h, w) on the CPU.
    """

    def __init__(
        self, engine: Engine, splice: Splice, prompts: Prompts, config: TokenConfig, latents: Sequence[Tensor]
    ) -> None:
        super().__init__(engine, splice, prompts, config)
        self._latents = latents
        self._loss = NoiseLoss(engine, checkpoint=config.checkpointing)

    def _differentiate(
        self, texts: PromptStates, text_of: Tensor, classes: Sequence[int], updates: Sequence[int]
    ) -> Answer:
        images = self._config.images
        drawn = [
            self.draw(number, self._prompts.image_seed(number, update, image))
            for number, update in zip(classes, updates, strict=True)
            for image in range(images)
        ]
        clean, times, noise = (torch.stack(each) for each in zip(*drawn, strict=True))
        told = self._loss(texts, text_of, clean, times, noise, torch.autograd.backward)
        losses = told.view(len(classes), images).mean(1)
        return Answer((losses, None, None), torch.full_like(losses, images * clean[0].numel()))

    def draw(self, number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw one of a class's images, a timestep, and noise."""
        random, latents = torch.Generator().manual_seed(seed), self._latents[number]
        image = int(torch.randint(len(latents), (), generator=random, device="cpu"))
        time, noise = draw_row(random, (0, self._model.schedule.num_train_timesteps), latents.shape[1:])
        return latents[image], torch.tensor(time, device="cpu"), noise
