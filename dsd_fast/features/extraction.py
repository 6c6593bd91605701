"""From images to their features, some at a time: what extraction into memory and into folders stand on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsd_fast.engine import Engine
from dsd_fast.features.attention import KEY, AttentionTap
from dsd_fast.features.capture import Capture, exits
from dsd_fast.features.config import FeatureConfig
from dsd_fast.features.inputs import Inputs, Prompts, chosen_seeds, own_prompts
from dsd_fast.features.latents import Way, told_timesteps, used_timesteps
from dsd_fast.features.layers import Layers, resolve_layers
from dsd_fast.features.pca import PCA
from dsd_fast.features.technique import Technique
from dsd_fast.images import ImageError, ImageSource, check_sources, decode_chunks
from dsd_fast.kernels.common.host import as_tensor
from dsd_fast.models.prompts import token_limit
from dsd_fast.unet import Plan, UNetProgram
from dsd_fast.unet.adapters import adapter_strengths

if TYPE_CHECKING:
    from dsd_fast.models import Model

# Share of the memory budget that the features of images extracted together may take besides.
_OUT_SHARE = 8


@dataclass(frozen=True)
class Extracted:
    """What a few images of a request gave.

    Attributes:
        numbers: positions in the request of the images that could be used.
        features: of each technique, id → (n, S, C, h, w), or (n, S, D, C, h, w) where draws are kept.
        errors: position → error of the others.
    """

    numbers: list[int]
    features: list[dict[str, Tensor]]
    errors: dict[int, ImageError]

    def by_image(self) -> Iterator[tuple[int, dict[str, Tensor] | ImageError]]:
        """(position, id → (S, C, h, w) under the first technique, or the image's error), in order."""
        rows = {number: row for row, number in enumerate(self.numbers)}
        for number in sorted([*self.numbers, *self.errors]):
            if number in self.errors:
                yield number, self.errors[number]
            else:
                yield number, {name: value[rows[number]] for name, value in self.features[0].items()}


class Extraction:
    """One model with the settings of its features; :class:`~dsd_fast.features.FeatureExtractor` says what they are."""

    def __init__(
        self,
        model: Model,
        layers: Layers = "practical",
        timesteps: Sequence[int] = (50,),
        *,
        attention: Sequence[str] = (),
        official_timesteps: bool = False,
        draws: int = 1,
        keep_draws: bool = False,
        image_size: tuple[int, int] | None = None,
        resize: int | tuple[int, int] | None = None,
        pool: str | None = None,
        normalize: bool = False,
        pca: Mapping[str, PCA] | None = None,
        dtype: str | None = None,
        technique: Technique | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.model = model
        ids = resolve_layers(layers, UNetProgram(model.unet))
        asked = timesteps if isinstance(timesteps, int) else tuple(timesteps)
        self.config = FeatureConfig(
            layers=ids,
            timesteps=asked,
            attention=attention if isinstance(attention, str) else tuple(attention),
            official_timesteps=official_timesteps,
            draws=draws,
            keep_draws=keep_draws,
            image_size=tuple(image_size) if isinstance(image_size, list) else image_size,
            resize=tuple(resize) if isinstance(resize, list) else resize,
            pool=pool,
            normalize=normalize,
            dtype=dtype,
            memory_budget=memory_budget,
        )
        self.technique = technique or Technique()
        self._used = used_timesteps(model, self.config.timesteps, official_timesteps)
        self.timesteps = told_timesteps(model, self.technique, self.config.timesteps, official_timesteps)
        self.engine = Engine(model, image_size=self.config.image_size, memory_budget=memory_budget)
        self.program, self.size, self.latent_size = self.engine.program, self.engine.size, self.engine.latent_size
        self._tokens = token_limit(model.tokenizers, model.text_encoders)
        self._attention: AttentionTap | None = None
        if self.config.attention:
            self._attention = AttentionTap(self.program, self.config.attention, self.latent_size, self._tokens)
        if not ids and self._attention is None:
            raise ValueError("layers: got none, expected at least one, or attention")
        self.layers = ids if self._attention is None else (*ids, KEY)
        self._ids = ids
        self.runtime: str | None = None
        self._runs: dict[Technique, tuple[object, Engine, Plan]] = {}
        # Here, so that what does not fit the model is told before there is an image.
        self._run(self.technique)
        self.pca: dict[str, PCA] = {}
        self._set_pca(pca or {})

    @property
    def plan(self) -> Plan:
        """The cut through the network that answers, under the extractor's own technique."""
        return self._run(self.technique)[1]

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Id → (C, h, w) of what is handed out."""
        return {name: each.given for name, each in self._exits.items()}

    def extract_chunks(
        self,
        images: Iterable[ImageSource],
        prompts: str | Sequence[str] = "",
        seed: int = 0,
        *,
        seeds: Sequence[int] | None = None,
        techniques: Sequence[Technique] | None = None,
        chunk: int | None = None,
    ) -> Iterator[Extracted]:
        """:meth:`extract` of any number of images, some at a time, in order; nothing of earlier ones is kept.

        Args:
            techniques: instead of the extractor's own.
            chunk: images at a time; as many as fill a few micro-batches if None.
        """
        chosen = [self.technique] if techniques is None else list(techniques)
        request = Prompts(prompts)
        encoded = self.encode(images, request, seed, seeds=seeds, techniques=chosen, chunk=chunk)
        return (
            Extracted(
                list(inputs.numbers), [self.features_of(inputs, request, technique) for technique in chosen], errors
            )
            for inputs, errors in encoded
        )

    def encode(
        self,
        images: Iterable[ImageSource],
        prompts: Prompts,
        seed: int = 0,
        *,
        seeds: Sequence[int] | None = None,
        techniques: Sequence[Technique] | None = None,
        chunk: int | None = None,
    ) -> Iterator[tuple[Inputs, dict[int, ImageError]]]:
        """Encode images, some at a time, for :meth:`features_of` under any of the techniques.

        Args:
            prompts: of the request, or one empty prompt; of a sequence of images there must be one, or one each.
            techniques, chunk: as :meth:`extract_chunks`.

        Yields:
            (inputs, position → error of the images that cannot be used).

        Raises:
            ValueError: prompts, of the request or of a technique, or seeds that are not as many as images.
        """
        chosen = [self.technique] if techniques is None else list(techniques)
        if not chosen:
            raise ValueError("techniques: got none, expected at least one")
        check_sources(images)
        count = len(images) if isinstance(images, Sequence) else None
        for technique in chosen:
            own_prompts(technique, prompts).check(count)
        if seeds is not None and count is not None and len(seeds) != count:
            raise ValueError(f"seeds: got {len(seeds)} for {count} images, expected one each")
        self.engine.forget()
        at_once = chunk or min(self.images_at_once(technique) for technique in chosen)

        def inputs(numbers: list[int], pixels: list[Tensor]) -> Inputs:
            latents = self.engine.encode_images(pixels).to(self.model.device)
            return Inputs(numbers, pixels, latents, chosen_seeds(seed, seeds, numbers), self.config.draws)

        chunks = decode_chunks(images, self.size, at_once)
        return ((inputs(numbers, pixels), errors) for numbers, pixels, errors in chunks)

    def features_of(self, inputs: Inputs, prompts: Prompts, technique: Technique | None = None) -> dict[str, Tensor]:
        """Extract the features of encoded images, id → (n, S, C, h, w), under a technique, or the extractor's own."""
        out = self._empty(len(inputs))
        if len(inputs):
            self._capture(technique or self.technique, inputs, prompts, out, 0)
        return out

    def settings(self) -> dict[str, Any]:
        """What of the settings changes the features, as JSON; the model, the technique's networks and the PCA aside."""
        config = asdict(self.config)
        del config["memory_budget"]
        return {
            **config,
            "timesteps": list(self.timesteps),
            "image_size": list(self.size),
            "dtype": self.config.dtype or str(self.model.dtype).removeprefix("torch."),
            "technique": self.technique.settings(),
        }

    def images_at_once(self, technique: Technique | None = None) -> int:
        """Tell how many images fill a few micro-batches."""
        engine, plan = self._run(technique or self.technique)
        latents = len(self.timesteps) * self.config.draws
        together = min(engine.images_together(plan, latents, self._tokens), engine.images_held(latents))
        return max(1, min(together, engine.memory // _OUT_SHARE // self._out_bytes()))

    def _capture(
        self, technique: Technique, inputs: Inputs, request: Prompts, out: Mapping[str, Tensor], first: int
    ) -> None:
        """Fills the rows of ``out`` that begin with image ``first``."""
        engine, plan = self._run(technique)
        prompts = own_prompts(technique, request).of(inputs.numbers)
        config = self.config
        way = Way(engine, technique, config.timesteps, self._used, config.official_timesteps)
        with torch.no_grad():
            z, stood = way.latents(inputs, prompts)
        images, steps, draws = z.shape[:3]
        mean_of = 1 if config.keep_draws else draws
        kept = steps * draws // mean_of
        flat = {name: value.flatten(0, -4) for name, value in out.items()}
        capture = Capture(self._exits, self._attention, flat, first * kept, images * kept, mean_of)
        times = as_tensor(stood).repeat_interleave(draws).repeat(images)  # (n·S·D,)
        image_of = torch.arange(images, device="cpu").repeat_interleave(steps * draws)
        texts, text_of = engine.texts(prompts)
        batches = engine.rows(
            plan,
            z.flatten(0, 2),
            times,
            texts,
            text_of[image_of],
            # Attention maps are taken of every token.
            tokens=torch.arange(texts.tokens, device="cpu"),
            conditions=inputs.conditions(engine.controls),
            condition_of=image_of,
        )
        for rows, output in batches:
            capture.add(rows, output)
        capture.finish()

    def _run(self, technique: Technique) -> tuple[Engine, Plan]:
        # Neither changes the network's calls; the strengths of adapters are those of the request.
        core = replace(technique, name="network", prompts=None)
        strengths = () if core.adapter is None else adapter_strengths(self.model.unet, *self.model.text_encoders)
        run = self._runs.get(core)
        if run is None or run[0] != strengths:
            told_timesteps(self.model, core, self.config.timesteps, self.config.official_timesteps)
            if core.inversion:
                check_inversion(self.config.draws)
            engine = self.engine.under(core.adapter, core.controls)
            plan = engine.plan(features=self._ids, maps=() if self._attention is None else self._attention.ids)
            if self.runtime is not None:
                plan.compile(self.runtime)
                engine.compile(self.runtime)
            run = self._runs[core] = strengths, engine, plan
        return run[1:]

    def _out_bytes(self) -> int:
        """Of one image's features, and of the sums that its draws are added to."""
        steps, config = len(self.timesteps), self.config
        features = steps * sum(math.prod(shape) for shape in self.shapes.values()) * self._dtype.itemsize
        if config.draws == 1:
            return features
        sums = steps * sum(math.prod(way_out.taken) for way_out in self._exits.values()) * 4
        return features * config.draws if config.keep_draws else features + sums

    def _set_pca(self, pca: Mapping[str, PCA]) -> None:
        held = {name: each.to(self.model.device) for name, each in pca.items()}
        self._exits = exits(self.program, self.config, self._ids, self._attention, self.latent_size, self._tokens, held)
        self.pca = held

    def _shape(self, name: str, images: int) -> tuple[int, ...]:
        draws = (self.config.draws,) if self.config.keep_draws else ()
        return (images, len(self.timesteps), *draws, *self.shapes[name])

    def _empty(self, images: int) -> dict[str, Tensor]:
        dtype, device = self._dtype, self.model.device
        return {name: torch.empty(self._shape(name, images), dtype=dtype, device=device) for name in self.layers}

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype if self.config.dtype is None else getattr(torch, self.config.dtype)
        return dtype


def check_inversion(draws: int) -> None:
    """Refuses several draws of an inversion.

    Raises:
        ValueError: more than one.
    """
    if draws > 1:
        raise ValueError(f"draws: got {draws}, expected 1: an inversion draws no noise")


def raise_first(errors: Mapping[int, ImageError]) -> None:
    """Raises the error of the first image that cannot be used, if there is one."""
    if errors:
        raise errors[min(errors)]
