"""What classes lose, and the gradient to their vectors: once through the text encoder, then by images made or given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

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
from dsd_fast.engine import Engine, Noised, Texts
from dsd_fast.engine.guides import Guide
from dsd_fast.engine.prediction import Prediction
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.prompts import PromptStates
from dsd_fast.models.splice import Splice

# Gradients go through half types multiplied by it, so that float16 tells them from zero. A power of two changes no digit.
_LIFT = 1024.0


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
        leaves = [upload(each, model.device).requires_grad_() for each in vectors]  # (N, v, E)
        self._splice.put(*(leaf.flatten(0, 1) for leaf in leaves))
        texts = [text for each in zip(classes, updates, strict=True) for text in self._prompts.texts(*each)]
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        text_of = torch.tensor([place[text] for text in texts], dtype=torch.int64, device="cpu")  # (C · images,)
        with self._engine.adapters.active(texts_only=True):
            states = model.encode_prompts(list(place))
        made = [each for each in (states.states, states.pooled) if each is not None]
        # Cut here, so that the encoders are gone through once, in however many parts the rest is.
        cut = [each.detach().to(model.device, model.dtype).requires_grad_() for each in made]
        shown = replace(states, states=cut[0], pooled=cut[1] if cut[1:] else None)
        told, lift = self._differentiate(shown, text_of, classes, updates)
        torch.autograd.backward(made, [each.grad.to(own) for each, own in zip(cut, made, strict=True)])
        gradients = [leaf.grad[classes] / lift[:, None, None] for leaf in leaves]
        host = [each.detach().cpu() for each in told]
        return Losses(host[0], *(host[1:] or (None, None)), [each.cpu() for each in gradients])

    @abstractmethod
    def _differentiate(
        self, texts: PromptStates, text_of: Tensor, classes: Sequence[int], updates: Sequence[int]
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Leave the gradient of the classes' losses in the states' leaves.

        Args:
            texts: the states of an update's different texts.
            text_of: (C · images,) the text of each image, class by class.

        Returns:
            (losses, (C,); and, where there are, accuracies and probabilities), and (C,) what each class's gradient was
            multiplied by.
        """


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
        self._scheduler = self._model.new_scheduler()
        self._calls = len(scheduler_timesteps(self._scheduler, config.steps))
        self._is_guided = config.guidance > 1 and not engine.program.guidance_width
        self._unconditional = engine.encode_prompts(None if self._model.absent_prompt_is_zeros else [""])

    def _differentiate(
        self, texts: PromptStates, text_of: Tensor, classes: Sequence[int], updates: Sequence[int]
    ) -> tuple[Sequence[Tensor], Tensor]:
        clean = self._sampled(texts, text_of, classes, updates)
        count, device = len(classes), clean.device
        targets = torch.tensor([self._targets[each] for each in classes], dtype=torch.int64, device="cpu")
        targets = upload(targets.repeat_interleave(self._config.images), device)
        told, gradient = [], torch.empty_like(clean)
        for part in self._engine.decoded_parts(len(clean)):
            leaf = clean[part].detach().requires_grad_()
            logits = self._guide.logits(self._engine.decode_latents(leaf)) / self._config.temperature
            logs = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
            own = logs.gather(1, targets[part, None])[:, 0]
            (-own.sum() * _LIFT).backward()
            gradient[part] = leaf.grad
            told.append(torch.stack([-own, (logs.argmax(1) == targets[part]).to(own), own.exp()]).detach())
        # Of each class as large as a half type likes it.
        largest = gradient.view(count, -1).abs().amax(1)
        lift = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent)
        lift = torch.where(largest.isfinite() & (largest > 0), lift, 1.0)
        torch.autograd.backward([clean], [(gradient.view(count, -1) * lift[:, None]).view_as(gradient)])
        means = torch.cat(told, dim=1).view(3, count, -1).mean(-1)
        return list(means), lift * (_LIFT * self._config.images)

    def _sampled(self, texts: PromptStates, text_of: Tensor, classes: Sequence[int], updates: Sequence[int]) -> Tensor:
        """Clean latents of all images, (C · images, C, h, w), differentiable in the states by the last calls."""
        config, draws = self._config, self._draws(classes, updates)
        if self._latents is None:
            start = draws.start((self._model.latent_channels, *self._engine.latent_size))
        else:
            start = self._latents.repeat(len(classes), 1, 1, 1)
        start = upload(start, self._model.device, torch.promote_types(self._model.dtype, torch.float32))
        predict = self._guided(texts, text_of) if self._is_guided else self._predict(Texts(texts), text_of)
        predict = last_calls(predict, self._calls, config.gradient_steps)
        return sample(self._scheduler, predict, start, steps=config.steps, draws=draws)

    def _predict(self, texts: Texts, text_of: Tensor, latent_of: Tensor | None = None) -> Prediction:
        config, width = self._config, self._engine.program.guidance_width
        return self._engine.predict(
            texts,
            text_of,
            latent_of=latent_of,
            timestep_cond=guidance_embedding([config.guidance] * len(text_of), width) if width else None,
            gradients=True,
            checkpoint=config.checkpointing,
        )

    def _guided(self, states: PromptStates, text_of: Tensor) -> Predict:
        """Guided by unconditional rows, which have a gradient by the latents alone."""
        rows, texts = len(text_of), Texts(states, self._unconditional)
        both = torch.cat([torch.full_like(text_of, len(states)), text_of])
        predict = self._predict(texts, both, torch.arange(rows, device="cpu").repeat(2))
        free, given = slice(None, rows), slice(rows, None)

        def halves(latents: Tensor, t: float) -> Tensor:
            if latents.requires_grad or not torch.is_grad_enabled():
                return predict(latents, t)
            with torch.no_grad():
                unconditional = predict(latents, t, free)
            return torch.cat([unconditional, predict(latents, t, given)])

        return guided(halves, self._config.guidance)

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

    Gal et al. 2022, "An Image is Worth One Word", eq. 2;
    as the scripts of diffusers have it, against what the network was trained to predict.

    Args:
        latents: of each class its images', (n, C, h, w) on the CPU.
    """

    def __init__(
        self, engine: Engine, splice: Splice, prompts: Prompts, config: TokenConfig, latents: Sequence[Tensor]
    ) -> None:
        super().__init__(engine, splice, prompts, config)
        self._latents = latents

    def _differentiate(
        self, texts: PromptStates, text_of: Tensor, classes: Sequence[int], updates: Sequence[int]
    ) -> tuple[Sequence[Tensor], Tensor]:
        model, plan, images = self._model, self._engine.noise_plan, self._config.images
        drawn = [
            self._draw(number, self._prompts.image_seed(number, update, image))
            for number, update in zip(classes, updates, strict=True)
            for image in range(images)
        ]
        shown, told = Texts(texts), []
        for part in self._engine.gradient_parts(len(drawn), texts):
            clean, times, noise = (torch.stack(each) for each in zip(*drawn[part], strict=True))
            clean = upload(clean, model.device, model.dtype)
            noised = Noised.rows(model.schedule, clean, noise, times)
            used, own = torch.unique(text_of[part], return_inverse=True)
            answer = plan.run(
                noised.latents,
                times,
                shown.keys(plan, used),
                text_index=own,
                time_ids=model.time_ids(*self._engine.size),
                checkpoint=self._config.checkpointing,
            ).noise_pred
            assert answer is not None
            wrong = (answer.to(noised.noise.dtype) - self._wanted(clean, noised)).square().flatten(1)
            # The sum, since float16 has no gradients as small as the mean's.
            wrong.sum().backward()
            told.append(wrong.detach().mean(1))
        losses = torch.cat(told).view(len(classes), images).mean(1)
        return [losses], torch.full_like(losses, images * wrong.shape[1])

    def _draw(self, number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """One of a class's images, a timestep, and noise."""
        random, latents = torch.Generator().manual_seed(seed), self._latents[number]
        image = int(torch.randint(len(latents), (), generator=random, device="cpu"))
        steps = self._model.schedule.num_train_timesteps
        time = torch.randint(steps, (), generator=random, device="cpu")
        noise = torch.randn(latents.shape[1:], generator=random, dtype=torch.float32, device="cpu")
        return latents[image], time, noise

    def _wanted(self, clean: Tensor, noised: Noised) -> Tensor:
        """What the network is to predict, (n, C, h, w), in the noise's type."""
        kind, epsilon = self._model.schedule.prediction_type, noised.noise
        if kind == "epsilon":
            return epsilon
        if kind == "sample":
            return clean.to(epsilon.dtype)
        signal, sigma = self._model.schedule.coefficients(noised.timesteps)
        signal, sigma = (upload(each, clean.device, epsilon.dtype).view(-1, 1, 1, 1) for each in (signal, sigma))
        return signal * epsilon - sigma * clean.to(epsilon.dtype)
