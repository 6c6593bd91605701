"""Image–text matching with a diffusion model."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dsd_fast.engine import ImagePrompt, Prompt, Texts
from dsd_fast.images import ImageError, ImageSource, drawn, load_image, to_tensor
from dsd_fast.jobs import locked
from dsd_fast.kernels.common.transfer import one_behind
from dsd_fast.matching.config import MatchConfig
from dsd_fast.matching.fitting.config import FitConfig, parse_methods
from dsd_fast.matching.fitting.files import LORA, Adapter, load, save
from dsd_fast.matching.heatmaps import Heatmap, check, heatmaps
from dsd_fast.matching.pairs import Pairs, taken_pair
from dsd_fast.matching.score import PairScorer, TermsBehind
from dsd_fast.matching.words import Span

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.training import FitHistory, FitRecord


class Matcher:
    """Scores how well texts describe images (DSD, He et al., arXiv 2305.10722).

    A pair's score depends on the pair, the model and the configuration alone: not on what else is scored, nor on
    the order. Images may be any number: they are streamed. Of the captions the text states are held in host memory.
    The network's activations and the texts' keys stay within the configuration's budget; one image in the VAE may need
    more. Several threads may score at once, with this matcher or with others of the model under other adapters.

    Args:
        model: from :func:`dsd_fast.load` or :func:`dsd_fast.from_pipeline`.
        config: see :class:`MatchConfig`.
        adapter: names of adapters, PEFT's of any kind, active while this matcher scores, in the UNet and the text
            encoders, () for none; None leaves the model as it stands.

    Raises:
        ValueError: a setting that does not fit the model.
    """

    def __init__(
        self, model: Model, config: MatchConfig | None = None, *, adapter: str | Sequence[str] | None = None
    ) -> None:
        names = adapter if adapter is None or isinstance(adapter, str) else tuple(adapter)
        self._adopt(model, PairScorer.of(model, config or MatchConfig(), names), None, names)

    def _adopt(self, model: Model, scorer: PairScorer, lora: str | None, adapter: Adapter) -> None:
        # The model that was given, without what was learned: others may be made on it.
        self.model, self.config = model, scorer.config
        self.runtime: str | None = None
        self._scorer, self._lora, self._adapter = scorer, lora, adapter

    @property
    def timesteps(self) -> list[int]:
        """The timesteps scored, one entry per noise draw."""
        return list(self._scorer.timesteps)

    @property
    def layers(self) -> dict[str, Tensor]:
        """Score id → (H,) float32 weights of its heads."""
        return dict(self._scorer.weights)

    def compile(self, runtime: str = "inductor") -> Matcher:
        """From now on the network runs compiled, see :meth:`dsd_fast.unet.plan.Plan.compile`; the matcher itself.

        Heat maps are made as before.

        Raises:
            ValueError: an unknown runtime; "cudagraph" with a model that is not on a CUDA device.
        """
        self._scorer.plan.compile(runtime)
        self.runtime = runtime
        return self

    def fit(
        self,
        examples: Iterable[Any],
        method: str | Sequence[str] = "lora",
        *,
        validation: Iterable[Any] | None = None,
        config: FitConfig | None = None,
        out: str | os.PathLike[str] | None = None,
        callback: Callable[[int, float | None, FitRecord | None], None] | None = None,
        progress: bool = True,
    ) -> FitHistory:
        """Adapts the scores to examples; from then on this matcher scores as adapted.

        The model stays as it is: the matcher then scores with a UNet of its own that shares all weights and has the
        adapters that were active, as strong as they were. What is done to the model's UNet afterwards, a move to
        another device or another adapter, does not reach it. A second fit goes on from the first: what its methods
        train is trained further, and the rest stays.

        Gradients are on inside, and autocast is what the configuration says, whatever the caller's program is under.

        Args:
            examples: :class:`~dsd_fast.Group`, or tuples (image, texts, label) or (images, text, label); the wrong
                candidates are the negatives. Of a paired group each of its 2n questions is one.
            method: one or more of
                "lora": low-rank matrices on q, k, v and out of attention layers, by PEFT (Hu et al., arXiv 2106.09685;
                the official code);
                "prompt": learned vectors that follow the tokens of each text, after the text encoder, the model frozen
                (the paper's attention-based prompt learning);
                "heads": weights of the attention term per layer and head, everything else frozen (the paper's dynamic
                head weighting). They become the configuration's `layers`, of which all heads take part.
            validation: held-out examples; the parameters that do best on them are kept. Without them the last are.
            config: see :class:`FitConfig`.
            out: folder for checkpoints, and for the matcher at the end, as :meth:`save` writes it. The same call with
                the same folder goes on where a killed process stopped, to the same result; on a GPU as far as its
                kernels repeat themselves.
            callback: called for each step as callback(step, loss, None), on a GPU while the next one is computed, and
                with each record as callback(step, None, record).
            progress: whether a bar with loss and held-out accuracy is shown.

        Raises:
            FloatingPointError: a loss or a gradient that is no finite number.
            ImageError: an image that cannot be used.
            LockedError: another process fits into `out`.
            ValueError: examples or settings that are not allowed, by name; an `out` of another fit.
        """
        from dsd_fast.matching.fitting.run import fit
        from dsd_fast.training import reporting

        fit_config, methods, runtime = config or FitConfig(), parse_methods(method), self.runtime
        with reporting("fitting", fit_config.steps, callback, progress) as report:
            scorer, lora, history = fit(
                self._scorer,
                self._lora,
                self._adapter,
                examples,
                methods,
                validation,
                fit_config,
                None if out is None else Path(out),
                report,
                runtime,
            )
        self._adopt(self.model, scorer, lora, self._adapter)
        if runtime is not None:
            self.compile(runtime)
        return history

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the configuration, but for its memory budget, and what was learned.

        ``matcher.json``; with a LoRA ``pytorch_lora_weights.safetensors``, which stock diffusers'
        ``pipe.load_lora_weights(folder)`` reads; with learned vectors ``prompt.safetensors``.

        Raises:
            LockedError: another process writes to the folder.
            OSError: the folder cannot be written.
        """
        with locked(Path(folder)):
            save(Path(folder), self._scorer, self._lora, self._adapter)

    def save_attn_procs(self, folder: str | os.PathLike[str]) -> None:
        """Writes the LoRA as a checkpoint that the official code reads, ``pytorch_lora_weights.safetensors``.

        :func:`dsd_fast.compat.attn_procs.save_attn_procs` says what is in it. ``Model.load_lora`` reads it too.

        Raises:
            OSError: the folder cannot be written.
            ValueError: no LoRA has been learned.
        """
        from dsd_fast.models.lora import save_official_lora

        if self._lora is None:
            raise ValueError("save_attn_procs: this matcher has learned no LoRA; fit it with method='lora'")
        save_official_lora(self._scorer.model.unet, self._lora, Path(folder) / LORA)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Model, *, memory_budget: int | None = None) -> Matcher:
        """The matcher that :meth:`save`, or :meth:`fit` with ``out``, has written.

        Args:
            folder: of the files.
            model: the model that it was fitted to. Another one of the family, or other adapters active on it, are taken
                with a warning.
            memory_budget: of the configuration, see :class:`MatchConfig`; it is no part of what was saved.

        Raises:
            ModelError: a LoRA that does not fit the model.
            ValueError: no such files, or ones for a model of another family; a budget that is no number of bytes.
        """
        matcher = cls.__new__(cls)
        matcher._adopt(model, *load(folder, model, memory_budget))
        return matcher

    def score(
        self,
        images: Iterable[ImageSource],
        captions: Sequence[Prompt] | ImagePrompt,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """All pairs: (N, M) float32 on the CPU, higher is better.

        Args:
            images: N paths (``pathlib.Path``), PIL images, uint8 HWC arrays or float CHW tensors in [0, 1]. Each is
                read before the next is asked for, so that a generator may fill one buffer again.
            captions: M strings, or images as prompts of one each; or M images as prompts.
            seeds: one noise seed per image; None: the configuration's for all.

        Raises:
            ImageError: an image that cannot be used; :meth:`score_iter` gives it back instead.
            ValueError: captions that are neither, or too long; images as prompts of another model.
        """
        rows = []
        for _, row in self.score_iter(images, captions, seeds=seeds):
            if isinstance(row, ImageError):
                raise row
            rows.append(row)
        return torch.stack(rows) if rows else torch.empty(0, len(captions), dtype=torch.float32, device="cpu")

    def score_iter(
        self,
        images: Iterable[ImageSource],
        captions: Sequence[Prompt] | ImagePrompt,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Tensor | ImageError]]:
        """:meth:`score` one image at a time, in order: (index, (M,) scores) or (index, the image's error)."""
        return self._scores(images, self._encode(captions), seeds)

    def _scores(
        self,
        images: Iterable[ImageSource],
        texts: Texts,
        seeds: Sequence[int] | None = None,
        together: int | None = None,
    ) -> Generator[tuple[int, Tensor | ImageError]]:
        """As :meth:`score_iter`, of texts that are encoded, and as many images together as is said."""
        every = torch.arange(len(texts), device="cpu")

        def begun() -> Iterator[tuple[tuple[list[int], dict[int, ImageError]], TermsBehind]]:
            for numbers, latents, errors in self._scorer.latents(images, texts, len(texts), together):
                image_of = torch.arange(len(numbers), device="cpu").repeat_interleave(len(texts))
                chosen = None if seeds is None else [_seed(seeds, number) for number in numbers]
                text_of = every.repeat(len(numbers))
                yield (numbers, errors), self._scorer.begin(latents, texts, image_of, text_of, chosen)

        for (numbers, errors), terms in one_behind(begun()):
            flat = self._scorer.sums(terms.done())
            scores = dict(zip(numbers, flat.view(len(numbers), len(texts)), strict=True))
            for number in sorted([*numbers, *errors]):
                yield number, errors[number] if number in errors else scores[number]

    def predict(self, pairs: Sequence[tuple[ImageSource, Prompt]]) -> Tensor:
        """(n,) float32 scores of the pairs, higher is better; each image and each caption is encoded once.

        A caption is a string, or an image as a prompt. Pairs of a generator may have their images in one buffer, which
        is read before the next pair is asked for.

        Raises:
            ImageError: an image that cannot be used.
            ValueError: captions that are neither, or too long; images as prompts of another model.
        """
        unique = Pairs()
        numbers = [unique.pair(image, caption) for image, caption in drawn(pairs, taken_pair)]
        if not numbers:
            return torch.empty(0, dtype=torch.float32, device="cpu")
        scores = torch.empty(len(unique), dtype=torch.float32, device="cpu")
        for _, chosen, parts, _ in unique.scored(self._scorer, self._encode(unique.texts), strict=True):
            scores[chosen] = parts.sum(0).float()
        return scores[torch.tensor(numbers, device="cpu")]

    def rank(
        self,
        *,
        image: ImageSource | None = None,
        texts: Sequence[Prompt] | ImagePrompt | None = None,
        text: Prompt | None = None,
        images: Sequence[ImageSource] | None = None,
        top_k: int | None = None,
    ) -> list[dict[str, Any]]:
        """Texts for an image (``image=``, ``texts=``) or images for a text (``text=``, ``images=``), best first.

        Texts are strings, or images as prompts.

        Returns:
            [{"corpus_id": position in the candidates, "score": float}, …], the first ``top_k`` of them; equal scores
            keep the candidates' order.

        Raises:
            ValueError: neither pair of arguments is given whole, or both are, or ``top_k`` is below 1.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: got {top_k}, expected at least 1")
        if image is not None and texts is not None and text is None and images is None:
            scores = self.score([image], texts)[0]
        elif text is not None and images is not None and image is None and texts is None:
            scores = self.score(images, [text])[:, 0]
        else:
            raise ValueError("rank: give image= and texts=, or text= and images=")
        # A NaN, from an overflow in half precision, is no match.
        order = torch.argsort(scores.nan_to_num(nan=float("-inf")), descending=True, stable=True)[:top_k]
        return [{"corpus_id": int(i), "score": float(scores[i])} for i in order]

    def heatmap(
        self,
        image: ImageSource,
        caption: str,
        *,
        spans: Sequence[str | Span] | None = None,
        layers: str | Sequence[str] = "up-finest",
    ) -> list[Heatmap]:
        """Where the image is looked at for each word of the caption (DAAM, Tang et al., arXiv 2210.04885).

        A map is the attention probability of the word's tokens (their mean), averaged over heads, layers and the
        matcher's timesteps and draws, upsampled bilinearly. It is not normalised: over all tokens of the text, begin,
        end and padding included, the values of a pixel sum to 1. :mod:`dsd_fast.matching.heatmaps` says what else
        follows DAAM and what does not.

        Args:
            image: as for :meth:`score`.
            caption: one string.
            spans: phrases ("red circle") or ranges of characters (start, end) to map instead of the words. A phrase is
                mapped wherever it stands, whatever its case; a range takes every token that has a character in it.
            layers: cross-attentions to average: "up-finest", those of the up part with the highest resolution, whose
                maps point at objects best; "all"; or score ids. The score's own `layers` play no part.

        Returns:
            [(characters, (start, end), map), …], a map for each word in the caption's order, so that a word that stands
            twice has two, or for each of ``spans``. (start, end) are positions in ``caption``, the end exclusive; a map
            is float32 (height, width), 0 to 1, at the configuration's image size. White space, punctuation and special
            tokens have no map.

        Raises:
            ImageError: an image that cannot be used.
            ValueError: a caption that is no string or too long, a span that it does not have, unknown layers.
        """
        if not isinstance(caption, str):
            raise ValueError(f"caption: got {type(caption).__name__}, expected a string")
        return heatmaps(self._scorer, self._latent(image), caption, spans, layers)

    def heatmaps(
        self, image: ImageSource, captions: Sequence[str], *, layers: str | Sequence[str] = "up-finest"
    ) -> list[list[Heatmap]]:
        """:meth:`heatmap` of each caption's words; the image is encoded once for all of them.

        Raises:
            ImageError: an image that cannot be used.
            ValueError: captions that are not strings or too long, unknown layers.
        """
        texts = _strings(captions)
        latent = self._latent(image)
        return [heatmaps(self._scorer, latent, caption, layers=layers) for caption in texts]

    def check_heatmaps(self, captions: Sequence[str], *, layers: str | Sequence[str] = "up-finest") -> None:
        """Refuses what :meth:`heatmaps` would refuse for some image, before there is one.

        Raises:
            ValueError: captions that are not strings or too long, or whose tokens' characters are unknown; unknown
                layers; a memory budget that does not hold one row with the maps of some caption.
        """
        check(self._scorer, _strings(captions), layers)

    def _latent(self, image: ImageSource) -> Tensor:
        engine = self._scorer.engine
        return engine.encode_images([to_tensor(load_image(image), engine.size)])

    def _encode(self, captions: Sequence[Prompt] | ImagePrompt) -> Texts:
        texts = captions if isinstance(captions, ImagePrompt) else _captions(captions)
        if not len(texts):
            raise ValueError("captions: got none, expected at least one")
        return self._scorer.encode_texts(texts)


def _captions(captions: Iterable[Prompt]) -> list[Prompt]:
    texts: list[Prompt] = [captions] if isinstance(captions, str) else list(captions)
    if isinstance(captions, str) or not all(isinstance(caption, str | ImagePrompt) for caption in texts):
        raise ValueError("captions: expected a sequence of strings, or of images as prompts")
    return texts


def _strings(captions: Iterable[str]) -> list[str]:
    texts = _captions(captions)
    if not all(isinstance(caption, str) for caption in texts):
        raise ValueError("captions: expected a sequence of strings")
    return cast("list[str]", texts)


def _seed(seeds: Sequence[int], number: int) -> int:
    if number >= len(seeds):
        raise ValueError(f"seeds: got {len(seeds)}, expected one per image")
    return seeds[number]
