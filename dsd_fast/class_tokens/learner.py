"""Any number of class tokens, learned side by side."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsd_fast.class_tokens.config import TokenConfig
from dsd_fast.class_tokens.gradients import Gradients, ThroughImages, ThroughNoise
from dsd_fast.class_tokens.learning import CHECKPOINT, Learning
from dsd_fast.class_tokens.progress import Callback, ClassHistory
from dsd_fast.class_tokens.prompts import Prompts
from dsd_fast.diffusion import scheduler_timesteps
from dsd_fast.diffusion.schedulers import check_draws
from dsd_fast.engine import Engine
from dsd_fast.engine.fingerprint import model_settings, scheduler_settings
from dsd_fast.engine.guides import guide_of, targets_of
from dsd_fast.engine.items import prompt_check
from dsd_fast.engine.tokens import LIST, LearnedTokens
from dsd_fast.generation.grids import read_classes
from dsd_fast.generation.sampler import under_scheduler
from dsd_fast.images import ImageSource
from dsd_fast.images.batch import check_sources
from dsd_fast.jobs import locked, remove_stale, tensors_hash
from dsd_fast.kernels.common.host import own_types
from dsd_fast.models.prompts import token_limit
from dsd_fast.models.splice import Splice
from dsd_fast.models.tokens import BANK, ENCODERS
from dsd_fast.training.loop import as_json

if TYPE_CHECKING:
    from dsd_fast.models import Model

# Of the settings, what changes memory or time alone.
_NEUTRAL = {"together", "checkpointing", "save_every", "memory_budget"}
Images = Mapping[str, Sequence[ImageSource]]


class ClassTokenLearner:
    """Learns a word for each class, by gradient through the images that the word makes.

    Schwartz et al. 2023, "Discriminative Class Tokens for Text-to-Image Diffusion Models"; with the cosines of a
    category discrimination model as the guide's outputs Fu et al. 2024, "DIG-ZSL"; with the noise loss Gal et al. 2022,
    "Textual Inversion". The model stays as it is, all of it frozen.

    Args:
        model: from :func:`dsd_fast.load` or :func:`dsd_fast.from_pipeline`.
        classifier: what judges images, see :func:`~dsd_fast.engine.guides.guide_of`: "clip", a classifier, a folder or
            hub id of one, a guide; None for the noise loss.
        config: the settings; None: the defaults.
        targets: the classifier's output of each class, see :func:`~dsd_fast.engine.guides.targets_of`; None: found by
            its labels.
        latents: (images, C, h, w) that each update of each class begins at, in place of fixed noise.

    Attributes:
        config: the settings.
        history: class → what became of it, of the last :meth:`learn`.

    Raises:
        ValueError: a setting that does not fit the model, or another one, by name.
    """

    def __init__(
        self,
        model: Model,
        classifier: Any = None,
        config: TokenConfig | None = None,
        *,
        targets: Mapping[str, int | str] | Sequence[int | str] | None = None,
        latents: Tensor | None = None,
    ) -> None:
        self.config = config = config or TokenConfig()
        self._model = under_scheduler(model, config.scheduler)
        self._classifier, self._targets = classifier, targets
        self._latents = None if latents is None else latents.detach().to("cpu", copy=True)
        self._runtime: str | None = None
        self.history: dict[str, ClassHistory] = {}
        engine = self._engine(self._model)
        if config.loss == "noise":
            if classifier is not None or latents is not None:
                name = "latents" if classifier is None else "classifier"
                raise ValueError(f"{name}: got one for the noise loss, which has no use for it, expected None")
            return
        if classifier is None:
            raise ValueError("classifier: got None, expected what judges images, or the settings' loss='noise'")
        scheduler = self._model.new_scheduler()
        check_draws(scheduler)
        calls = len(scheduler_timesteps(scheduler, config.steps))
        if config.gradient_steps > calls:
            raise ValueError(
                f"gradient_steps: got {config.gradient_steps}, expected at most the {calls} calls that there are"
            )
        shape = (config.images, model.latent_channels, *engine.latent_size)
        if latents is not None and (tuple(latents.shape) != shape or config.noise != "fixed"):
            raise ValueError(
                f"latents: got {tuple(latents.shape)} for noise={config.noise!r}, expected {shape} for 'fixed'"
            )

    def compile(self, runtime: str = "inductor") -> ClassTokenLearner:
        """From now on the network runs compiled, see :meth:`dsd_fast.unet.plan.Plan.compile`; the learner itself.

        Raises:
            ValueError: an unknown runtime; "cudagraph" with a model that is not on a CUDA device.
        """
        self._engine(self._model).compile(runtime)
        self._runtime = runtime
        return self

    def learn(
        self,
        classes: Sequence[str] | os.PathLike[str],
        *,
        images: Images | None = None,
        out: str | os.PathLike[str] | None = None,
        callback: Callback | None = None,
    ) -> LearnedTokens:
        """Learn a token for each class.

        As many classes as ``together`` says are learned side by side; one that has met its stopping rule leaves, and
        one that waits takes its rows. What becomes of a class depends on the settings, its name and its updates alone,
        up to rounding. A class whose loss or gradient is no finite number ends ("not-finite") with the vectors it had.

        Args:
            classes: their names, or the `pathlib.Path` of a file of one a line.
            images: of each class, for the noise loss.
            out: folder for checkpoints, and for the tokens at the end, as :meth:`LearnedTokens.save` writes them. The
                same call with the same folder goes on where a killed process stopped, with as many classes together to
                the same bits; on a GPU as far as its kernels repeat themselves.
            callback: called for each update of each class.

        Returns:
            The tokens, in the classes' order; ``about`` each are "initial", the words that what is kept began as,
            "updates", "ended" and "best_update" (see :class:`~dsd_fast.class_tokens.ClassHistory`), "loss", "accuracy"
            and "probability" of that update, with ``keep="last"`` of the last one, and of the vectors "norm", the
            longest as a multiple of the vocabulary's mean norm, and "clamped", the share of them at the clamp.

        Raises:
            ValueError: a class, a text, an argument or a setting that does not fit, by name; an ``out`` of another
                learning, or of tokens that came from elsewhere.
            ImageError: an image that cannot be used.
            LockedError: another process learns into ``out``.
        """
        config, names = self.config, read_classes(classes)
        prompts = Prompts(names, config)
        _check_images(config, names, images)
        folder = None if out is None else Path(out)
        with ExitStack() as stack:
            # The caller's program may be without gradients, or mix precisions; this is training, in the model's types.
            for context in (torch.inference_mode(False), torch.enable_grad(), own_types(self._model.device)):
                stack.enter_context(context)
            model = self._model.frozen()
            splice = Splice(model, dict.fromkeys(prompts.tokens, config.vectors), config.pooled)
            _check_texts(splice.model, prompts, len(names))
            initial = [
                [splice.initial(token, words) for words in prompts.initial(number)]
                for number, token in enumerate(prompts.tokens)
            ]
            real = torch.promote_types(model.dtype, torch.float32)
            engine = self._engine(splice.model)
            gradients, about = self._gradients(engine, splice, prompts, names, images)
            if folder is not None:
                stack.enter_context(locked(folder))
                if (folder / BANK).exists() and not (folder / CHECKPOINT).exists():
                    raise ValueError(
                        f"out: {str(folder)!r} has tokens that were not learned there; give another folder"
                    )
            settings = as_json({**self._settings(model), "classes": names, **about})
            learning = Learning(
                names,
                [
                    torch.stack([torch.stack([start[encoder] for start in own]) for own in initial], dim=1).to(real)
                    for encoder in range(len(splice.widths))
                ],  # (S, N, v, E) each
                splice.vocabulary_norms(),
                gradients,
                config,
                self._together(engine),
                callback,
                folder,
                settings,
                gradients.compare if len(initial[0]) > 1 else None,
            )
            try:
                learning.run()
            finally:
                self.history = dict(zip(names, learning.histories, strict=True))
            tokens = _learned(learning, prompts, names, settings, config)
            if folder is not None:
                for name in (BANK, LIST, *tokens.files().values()):
                    remove_stale(folder / name)
                tokens.save(folder)
        return tokens

    def _engine(self, model: Model) -> Engine:
        config = self.config
        engine = Engine(model, config.adapter, image_size=config.image_size, memory_budget=config.memory_budget)
        if self._runtime is not None:
            engine.compile(self._runtime)
        return engine

    def _together(self, engine: Engine) -> int:
        """As many classes as fill a few micro-batches without gradients, of which most calls of the network are."""
        config, plan = self.config, engine.noise_plan
        tokens = token_limit(engine.model.tokenizers, engine.model.text_encoders)
        rows = 2 if config.loss != "noise" and config.guidance > 1 else 1
        images = engine.images_together(plan, rows, tokens)
        texts = (engine.texts_together(plan) - 1) // min(config.images, len(config.templates))
        return max(1, min(images // config.images, texts))

    def _gradients(
        self, engine: Engine, splice: Splice, prompts: Prompts, names: list[str], images: Images | None
    ) -> tuple[Gradients, dict[str, Any]]:
        """What differentiates the loss, and what of it changes the result, as JSON."""
        if images is not None:
            digest, latents = hashlib.sha256(), []
            for name in names:
                latents.append(engine.encode_sources(images[name], digest))
                digest.update(b"class")
            return ThroughNoise(engine, splice, prompts, self.config, latents), {"images": digest.hexdigest()}
        guide = guide_of(self._classifier, model=self._model, classes=names)
        found = targets_of(guide, names, self._targets)
        targets = [found[name] for name in names]
        given = None if self._latents is None else tensors_hash({"latents": self._latents})
        about = {"guide": guide.settings(), "targets": targets, "latents": given}
        return ThroughImages(engine, splice, prompts, self.config, guide, targets, self._latents), about

    def _settings(self, model: Model) -> dict[str, Any]:
        """All but the classes that changes the result; not the device, nor what only changes memory or time."""
        config = {key: value for key, value in asdict(self.config).items() if key not in _NEUTRAL | {"scheduler"}}
        about = {**model_settings(self._engine(model)), "scheduler": scheduler_settings(model)}
        return {**about, **{f"config.{key}": value for key, value in config.items()}}


def _check_images(config: TokenConfig, names: Sequence[str], images: Images | None) -> None:
    if (images is None) == (config.loss == "noise"):
        got = "none" if images is None else "some"
        raise ValueError(f"images: got {got} with loss={config.loss!r}, expected them with loss='noise' alone")
    if images is None:
        return
    if other := sorted(images.keys() ^ set(names)):
        lacks = "lacks" if other[0] in names else "has"
        raise ValueError(f"images: {lacks} class {other[0]!r}, expected those of the classes to be learned")
    for name in names:
        check_sources(images[name])
        if not len(images[name]):
            raise ValueError(f"images: got none of class {name!r}, expected at least one")


def _check_texts(model: Model, prompts: Prompts, classes: int) -> None:
    check = prompt_check(model)
    for number in range(classes):
        for text in prompts.every(number):
            if (wrong := check(text)) is not None:
                raise ValueError(f"classes[{number}]: {text!r}: {wrong[1]}")


def _learned(
    learning: Learning, prompts: Prompts, names: Sequence[str], settings: Mapping[str, Any], config: TokenConfig
) -> LearnedTokens:
    vectors, about = {}, {}
    for number, (token, history) in enumerate(zip(prompts.tokens, learning.histories, strict=True)):
        kept = learning.kept(number)
        vectors[token] = kept[0] if len(kept) == 1 else dict(zip(ENCODERS, kept, strict=True))
        norm, clamped = learning.about(kept)
        last = config.keep == "last"
        initial = prompts.initial(number)[history.initial(last)]
        about[token] = {"initial": initial, **history.summary(last), "norm": norm, "clamped": clamped}
    classes = dict(zip(prompts.tokens, names, strict=True))
    return LearnedTokens(vectors, classes=classes, about=about, settings=settings, pooled=config.pooled)
