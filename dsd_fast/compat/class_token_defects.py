"""What the official code of class tokens does otherwise than it means to, each by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsd_fast.class_tokens import ClassTokenLearner, TokenConfig
from dsd_fast.class_tokens.gradients import Gradients, ThroughImages
from dsd_fast.class_tokens.learning import CHECKPOINT, Losses
from dsd_fast.class_tokens.optimiser import clipped
from dsd_fast.class_tokens.prompts import Prompts
from dsd_fast.diffusion import Predict, guided
from dsd_fast.engine import Engine, Texts
from dsd_fast.engine.guides import Guide, NetworkGuide
from dsd_fast.engine.preprocessing import Preprocessing
from dsd_fast.engine.tokens import LearnedTokens
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models import Model
from dsd_fast.models.private import private
from dsd_fast.models.prompts import PromptStates
from dsd_fast.models.splice import Splice
from dsd_fast.unet import Plan, TextKV

Picture = Callable[[int, Tensor, int, float], None]
"""Called with an update's number from 0, an image (3, H, W) in [−1, 1], the output it was taken for, and its loss."""

# What accelerate multiplies a float16 network's loss by, at the beginning.
_SCALE = 65536.0
# What the lowest loss is at the beginning.
_NONE = 99999.0
# Side, mean and std of images as the official classifiers get them.
_OFFICIAL = {"inet": (256, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
_CUT = 224
_OTHERS = (_CUT, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Defects:
    """Flags of the official defects that change learning.

    Attributes:
        decay_vocabulary: AdamW's weight decay shrinks all other words' vectors, too, at every update.
        unpadded_prompts: texts, and the empty one beside each, have as many tokens as the text has, where pipelines pad
            them to the encoder's limit.
        collapse_changes_seed: an update whose loss is more than twice the lowest adds 1 to the seed of the noise.
        clip_before_backward: gradients are clipped before an image's own is added to those of the update's images
            before it, not after the last; of a model in float16 they are 65536 times as large then, as officially, so
            that next to nothing is left of all images but the last.
        save_after_step: the token is kept that the optimiser made of the one with the lowest loss.
        unfiltered_resize: images are resized without a filter, to a size that is not the classifier's own.
    """

    decay_vocabulary: bool = False
    unpadded_prompts: bool = False
    collapse_changes_seed: bool = False
    clip_before_backward: bool = False
    save_after_step: bool = False
    unfiltered_resize: bool = False


class OfficialLearner(ClassTokenLearner):
    """Learns one class from the official noise, with the defects that are asked for.

    Args:
        model, guide, config: as for :class:`~dsd_fast.class_tokens.ClassTokenLearner`.
        target: the class's output.
        defects: the flags.

    Attributes:
        picture: told of every image.
        clip_before: norm that gradients are clipped to before an image's own is added, or None.
    """

    def __init__(self, model: Model, guide: Guide, config: TokenConfig, target: int, defects: Defects) -> None:
        self.clip_before = config.clip_norm if defects.clip_before_backward else None
        config = config if self.clip_before is None else replace(config, clip_norm=None)
        super().__init__(model, guide, config, targets=[target])
        self._guide, self._defects = guide, defects
        self._latents = self.noise(config.seed)
        self.picture: Picture = lambda *_: None

    def noise(self, seed: int) -> Tensor:
        """Draw an update's first noise, (images, C, h, w) float32 on the CPU, as officially on the model's device."""
        model, config = self._model, self.config
        generator = torch.Generator(model.device).manual_seed(seed)
        shape = (1, model.latent_channels, *model.latent_size(config.image_size))
        drawn = [
            torch.randn(shape, generator=generator, dtype=torch.float32, device=model.device)
            for _ in range(config.images)
        ]
        return torch.cat(drawn).cpu()

    def begun(self, folder: Path) -> bool:
        """Tell whether learning goes on there."""
        return not self._defects.collapse_changes_seed and (folder / CHECKPOINT).exists()

    def learn(self, classes: Any, *, images: Any = None, out: Any = None, callback: Any = None) -> LearnedTokens:
        """See :meth:`ClassTokenLearner.learn`; where the noise may change, a kill loses what was learned."""
        kept = None if self._defects.collapse_changes_seed else out
        tokens = super().learn(classes, images=images, out=kept, callback=callback)
        if kept is None and out is not None:
            tokens.save(out)
        return tokens

    def _gradients(
        self, engine: Engine, splice: Splice, prompts: Prompts, names: list[str], images: Any
    ) -> tuple[Gradients, dict[str, Any]]:
        _, about = super()._gradients(engine, splice, prompts, names, images)
        gradients = _Defective(self, engine, splice, prompts, about["targets"])
        return gradients, {**about, "defects": {**asdict(self._defects), "max_grad_norm": self.clip_before}}


class _Defective(ThroughImages):
    def __init__(
        self, learner: OfficialLearner, engine: Engine, splice: Splice, prompts: Prompts, targets: Sequence[int]
    ) -> None:
        self._learner, self._defects = learner, learner._defects
        guide = _Watched(learner._guide, targets[0], learner)
        super().__init__(engine, splice, prompts, learner.config, guide, targets, learner._latents)
        self._watched, self._seed, self._lowest = guide, learner.config.seed, _NONE
        tables = [encoder.get_input_embeddings() for encoder in self._model.text_encoders]
        self._tables = [(table, table.weight.detach()) for table in tables]

    def __call__(self, vectors: Sequence[Tensor], classes: Sequence[int], updates: Sequence[int]) -> Losses:
        (update,), config = updates, self._config
        self._watched.update = update
        if self._defects.decay_vocabulary:
            for table, weight in self._tables:
                factor = (1 - config.learning_rate * config.weight_decay) ** update
                table.weight = nn.Parameter(weight * factor, requires_grad=False)
            with torch.no_grad():
                self._unconditional, self._first = self._encoded([""]), None
        each = super().__call__
        losses = (each if self._learner.clip_before is None else self._image_by_image)(vectors, classes, updates)
        total = float(losses.losses[0]) * config.images
        if self._defects.collapse_changes_seed and total > 2 * self._lowest:
            self._seed += 1
            self._latents, self._first = self._learner.noise(self._seed), None
        self._lowest = min(self._lowest, total)
        return losses

    def _image_by_image(self, *given: Any) -> Losses:
        """Add up the mean's gradient as officially, clipped before each image."""
        config, latents, prompts = self._config, self._latents, self._prompts
        assert latents is not None
        scale = _SCALE if self._model.dtype == torch.float16 else 1.0
        made, gradients = [], [torch.zeros_like(each) for each in given[0]]
        for image in range(config.images):
            self._config, self._latents, self._first = replace(config, images=1), latents[image : image + 1], None
            self._prompts = _OneText(prompts, image)
            made.append(super().__call__(*given))
            before = clipped([scale * each for each in gradients], self._learner.clip_before)
            gradients = [b / scale + g / config.images for b, g in zip(before, made[-1].gradients, strict=True)]
        self._config, self._latents, self._prompts = config, latents, prompts
        told = torch.tensor([each.of(0) for each in made], dtype=torch.float64, device="cpu").mean(0)[:, None]
        return Losses(told[0], told[1], told[2], gradients)

    def _predict(self, texts: PromptStates, text_of: Tensor) -> Predict:
        if not self._defects.unpadded_prompts:
            return super()._predict(texts, text_of)
        config, latent_of, states = self._config, torch.arange(len(text_of), device="cpu"), texts
        if self._is_guided:
            assert self._unconditional is not None
            # Beside each text an empty one of its length.
            empty = self._unconditional[torch.zeros(len(texts), dtype=torch.int64, device="cpu")]
            states = texts.followed_by(replace(empty, lengths=texts.lengths))
            text_of, latent_of = torch.cat([text_of + len(texts), text_of]), latent_of.repeat(2)
        predict = self._engine.predict(
            _Unpadded(states),
            text_of,
            latent_of=latent_of,
            gradients=config.gradient_steps,
            checkpoint=config.checkpointing,
        )
        return guided(predict, config.guidance) if self._is_guided else predict


class _OneText(Prompts):
    """The text of one of each update's images."""

    def __init__(self, prompts: Prompts, image: int) -> None:
        self._all, self._image = prompts, image

    def texts(self, number: int, update: int) -> list[str]:
        return [self._all.texts(number, update)[self._image]]


class _Unpadded(Texts):
    """Texts of which the network reads no padding."""

    def keys(self, plan: Plan, numbers: Tensor | None = None) -> TextKV:
        keys = super().keys(plan, numbers)
        return replace(keys, lengths=upload(self.chosen(numbers).lengths, plan.program.device))


class _Watched(Guide):
    """A guide whose images are shown as they are judged."""

    def __init__(self, guide: Guide, target: int, learner: OfficialLearner) -> None:
        self.labels, self.count = guide.labels, guide.count
        self._guide, self._target, self._learner, self.update = guide, target, learner, 0

    def logits(self, pixels: Tensor) -> Tensor:
        logits = self._guide.logits(pixels)
        losses = -logits.detach().float().log_softmax(1)[:, self._target]
        for image, output, loss in zip(pixels.detach(), logits.argmax(1).tolist(), losses.tolist(), strict=True):
            self._learner.picture(self.update, image, output, loss)
        return logits

    def settings(self) -> dict[str, Any]:
        return self._guide.settings()


@dataclass(frozen=True)
class _Unfiltered(Preprocessing):
    """The official one: bicubic, a = −3/4, from the pixels next to each alone, however many pictures lose."""

    filter: bool = False

    def __call__(self, pixels: Tensor) -> Tensor:
        x = (pixels.clamp(-1, 1) + 1) / 2
        return self._finish(F.interpolate(x, self._resized(*x.shape[2:]), mode="bicubic", align_corners=False))


def unfiltered(guide: Guide, kind: str) -> Guide:
    """A classifier's guide that sees images as the official code prepares them.

    The shorter side becomes 256 ("inet") or 224, and the centre of 224 is cut out.

    Raises:
        ValueError: a guide that is no classifier's.
    """
    if not isinstance(guide, NetworkGuide):
        raise ValueError(f"unfiltered_resize: got {type(guide).__name__}, expected a classifier's guide")
    side, mean, std = _OFFICIAL.get(kind, _OTHERS)
    network = copy.copy(guide.network)
    network.preprocessing = _Unfiltered(side, (_CUT, _CUT), "bicubic", mean, std)
    return NetworkGuide(network, guide.labels, guide.count)


def mean_pooled(guide: Guide) -> None:
    """Let a ViT's classifier read the mean of its patches, as the official classifiers of birds and of iNaturalist do.

    Their class has no other name in their files, so that transformers' own would read the class token.
    """
    assert isinstance(guide, NetworkGuide)
    classifier: Any = guide.network.network
    classifier.vit.layernorm.register_forward_pre_hook(lambda _, x: (x[0][:, 1:].mean(1, keepdim=True),))


def decayed(model: Model, factor: float) -> Model:
    """A view of a model whose words' vectors are multiplied by a factor."""
    other = copy.copy(model)
    other.text_encoders = tuple(map(private, model.text_encoders))
    for encoder in other.text_encoders:
        table = encoder.get_input_embeddings()
        table.weight = nn.Parameter(table.weight.detach() * factor, requires_grad=False)
    return other
