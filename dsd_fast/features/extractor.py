"""UNet activations of images at any number of timesteps and layers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsd_fast.engine import Engine
from dsd_fast.features.attention import KEY, AttentionTap
from dsd_fast.features.capture import Capture, exits
from dsd_fast.features.config import FeatureConfig
from dsd_fast.features.inputs import Inputs, Prompts, draws_of_noise, own_prompts
from dsd_fast.features.latents import Way, told_timesteps, used_timesteps
from dsd_fast.features.layers import Layers, resolve_layers
from dsd_fast.features.pca import PCA, Moments
from dsd_fast.features.technique import Technique
from dsd_fast.images import ImageError, ImageSource, check_sources, decode_chunks
from dsd_fast.models.prompts import token_limit
from dsd_fast.unet import Plan, UNetProgram
from dsd_fast.unet.adapters import adapter_strengths

if TYPE_CHECKING:
    from dsd_fast.features.export import Exported
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


class FeatureExtractor:
    """Features of images: activations of a diffusion model's UNet (Meng et al., arXiv 2410.03558 and 2410.06719).

    An image goes through the VAE once, its latents are noised to all timesteps at once, and the UNet runs up to the
    last layer asked for, over as many rows together as memory allows. A feature depends on the image, its prompt, its
    seed, the model and the settings alone: not on the other images, timesteps or layers asked for.

    On the way out, in this order: the mean over draws (unless kept), PCA, resizing or pooling, L2 normalisation over
    channels, the type.

    Args:
        model: from :func:`dsd_fast.load` or :func:`dsd_fast.from_pipeline`.
        layers: layer ids; a set by name ("practical", "legacy", or of :data:`dsd_fast.features.SETS`); "all"; id → bool
            as in the official JSON files, or the path of one.
        timesteps: S of them, exactly as given; 0 is the clean latent, fed at timestep 0.
        attention: places whose attention maps are the feature "attn" (:class:`dsd_fast.features.AttentionTap`):
            "up_cross", "down_self" and so on.
        official_timesteps: use what the official extractors make of the timesteps (50 becomes 51, 49 or 50, by the
            scheduler: :func:`dsd_fast.diffusion.img2img_timestep`), and with a technique that moves latents its
            scheduler's own steps.
        draws: D noise draws for each timestep, averaged (Tang et al., arXiv 2306.03881, "DIFT").
        keep_draws: keep them apart instead.
        image_size: (height, width) in pixels that images are resized to; the model's own if None.
        resize: (height, width) for all maps, bilinear; or a factor that divides their sides, by mean over windows
            (the official ``feature_resize``, which leaves "attn" as it is).
        pool: "mean" or "max" over positions, which leaves one.
        normalize: divide by the L2 norm over channels at each position.
        pca: id → :class:`~dsd_fast.features.PCA`, see also :meth:`fit_pca`.
        dtype: of the features; the network's if None.
        technique: see :class:`Technique`.
        memory_budget: bytes for activations and text keys; None: the device's, see
            :func:`dsd_fast.unet.stream.default_budget`. What is handed out comes on top: all features of
            :meth:`extract`, an eighth of the budget (or one image's) elsewhere.

    Attributes:
        layers: the layer ids, in the order of the features; "attn" at the end if attention is asked for.
        timesteps: S timesteps as the network is told them; a scheduler's own may lie between two of the schedule.
        shapes: id → (C, h, w) of what is handed out.

    Raises:
        ValueError: a setting that is not allowed or does not fit the model, by name.
        ModelError: a ControlNet that does not fit the UNet.
    """

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

    def compile(self, runtime: str = "inductor") -> FeatureExtractor:
        """From now on the network runs compiled, see :meth:`dsd_fast.unet.plan.Plan.compile`; the extractor itself.

        Raises:
            ValueError: an unknown runtime; "cudagraph" with a model that is not on a CUDA device.
        """
        for _, engine, plan in self._runs.values():
            plan.compile(runtime)
            engine.compile(runtime)
        self.runtime = runtime
        return self

    def extract(
        self,
        images: Iterable[ImageSource],
        prompts: str | Sequence[str] = "",
        seed: int = 0,
        *,
        seeds: Sequence[int] | None = None,
        out: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Features of N images.

        Args:
            images: N paths (``pathlib.Path``), PIL images, uint8 HWC arrays or float CHW tensors in [0, 1].
            prompts: one for all, or one each; a technique's own prompts go before them.
            seed: of the noise, the same for every image and timestep.
            seeds: one for each image instead.
            out: tensors to fill, contiguous, of the shapes below, on the model's device and of any float type.

        Returns:
            id → (N, S, C, h, w), or (N, S, D, C, h, w) where draws are kept, on the model's device; ``out`` if given.

        Raises:
            ImageError: an image that cannot be used; :meth:`extract_iter` gives it back instead.
            ValueError: prompts that are too long or not as many as images; an ``out`` that does not fit.
        """
        return self._extract(images, [self.technique], prompts, seed, seeds, [out])[0]

    def extract_each(
        self,
        images: Iterable[ImageSource],
        techniques: Sequence[Technique],
        prompts: str | Sequence[str] = "",
        seed: int = 0,
        *,
        seeds: Sequence[int] | None = None,
    ) -> list[dict[str, Tensor]]:
        """:meth:`extract` under each of the techniques, instead of the extractor's own.

        Images go through the VAE once, edges are found once, and equal texts are encoded once for all of them.
        """
        return self._extract(images, techniques, prompts, seed, seeds, [None] * len(techniques))

    def extract_iter(
        self,
        images: Iterable[ImageSource],
        prompts: str | Sequence[str] = "",
        seed: int = 0,
        *,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, dict[str, Tensor] | ImageError]]:
        """:meth:`extract` of any number of images, one at a time and in order.

        Yields:
            (number, id → (S, C, h, w), or (S, D, C, h, w)), or (number, the image's error).
        """
        return _one_by_one(self.extract_chunks(images, prompts, seed, seeds=seeds))

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
        """Images through the VAE, some at a time, for :meth:`features_of` under any of the techniques.

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
        return self._encoded(decode_chunks(images, self.size, at_once), seed, seeds)

    def _encoded(
        self,
        chunks: Iterator[tuple[list[int], list[Tensor], dict[int, ImageError]]],
        seed: int,
        seeds: Sequence[int] | None,
    ) -> Iterator[tuple[Inputs, dict[int, ImageError]]]:
        for numbers, pixels, errors in chunks:
            latents = self.engine.encode_images(pixels).to(self.model.device)
            epsilon = draws_of_noise(seed, seeds, numbers, self.config.draws, latents)
            yield Inputs(numbers, pixels, latents, epsilon), errors

    def features_of(self, inputs: Inputs, prompts: Prompts, technique: Technique | None = None) -> dict[str, Tensor]:
        """Features of encoded images, id → (n, S, C, h, w), under a technique, or the extractor's own."""
        out = self._empty(len(inputs))
        if len(inputs):
            self._capture(technique or self.technique, inputs, prompts, out, 0)
        return out

    def extract_to(
        self,
        folder: str | os.PathLike[str],
        images: Iterable[ImageSource],
        prompts: str | Sequence[str] = "",
        seed: int = 0,
        *,
        names: Sequence[str] | None = None,
        layout: str = "shards",
        shard_rows: int | None = None,
        worker: int = 0,
        workers: int = 1,
        retry_errors: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Exported:
        """:meth:`extract` of any number of images into files, resumable: see :func:`dsd_fast.features.extract_to`."""
        from dsd_fast.features.export import extract_to

        return extract_to(
            self,
            folder,
            images,
            prompts,
            seed,
            names=names,
            layout=layout,
            shard_rows=shard_rows,
            worker=worker,
            workers=workers,
            retry_errors=retry_errors,
            progress=progress,
        )

    def fit_pca(
        self,
        images: Iterable[ImageSource],
        components: int,
        prompts: str | Sequence[str] = "",
        seed: int = 0,
        *,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, PCA]:
        """The principal components of each feature over images, timesteps and positions; from now on they are used.

        Args:
            components: k, channels that are left of each feature.

        Raises:
            ImageError: an image that cannot be used.
            ValueError: fewer positions or channels than components.
        """
        whole = self.replaced(resize=None, pool=None, normalize=False, pca=None)
        narrowest = min(shape[0] for shape in whole.shapes.values())
        if not 1 <= components <= narrowest:
            raise ValueError(f"components: got {components}, expected 1 to {narrowest}, the channels of a feature")
        if any(name.endswith("-map") for name in self.layers):
            raise ValueError("layers: whole attention maps have no channels to make components of")
        moments = {name: Moments() for name in self.layers}
        for part in whole.extract_chunks(images, prompts, seed, seeds=seeds):
            raise_first(part.errors)
            for name, value in part.features[0].items():
                moments[name].add(value)
        self._set_pca({name: each.pca(components) for name, each in moments.items()})
        return dict(self.pca)

    def replaced(self, **changes: Any) -> FeatureExtractor:
        """An extractor like this one but for some of its arguments."""
        given = {each.name: getattr(self.config, each.name) for each in fields(self.config)}
        other = FeatureExtractor(self.model, **{**given, "pca": self.pca, "technique": self.technique, **changes})
        return other if self.runtime is None else other.compile(self.runtime)

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

    def _extract(
        self,
        images: Iterable[ImageSource],
        techniques: Sequence[Technique],
        prompts: str | Sequence[str],
        seed: int,
        seeds: Sequence[int] | None,
        outs: Sequence[Mapping[str, Tensor] | None],
    ) -> list[dict[str, Tensor]]:
        check_sources(images)
        sources = images if isinstance(images, Sequence) else list(images)
        request = Prompts(prompts)
        filled = [self._empty(len(sources)) if out is None else self._checked(out, len(sources)) for out in outs]
        for inputs, errors in self.encode(sources, request, seed, seeds=seeds, techniques=techniques):
            raise_first(errors)
            for technique, out in zip(techniques, filled, strict=True):
                self._capture(technique, inputs, request, out, inputs.numbers[0])
        return filled

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
        times = torch.tensor(stood).repeat_interleave(draws).repeat(images)  # (n·S·D,)
        image_of = torch.arange(images).repeat_interleave(steps * draws)
        texts, text_of = engine.texts(prompts)
        batches = engine.rows(
            plan,
            z.flatten(0, 2),
            times,
            texts,
            text_of[image_of],
            # Attention maps are taken of every token.
            map_tokens=torch.arange(texts.tokens),
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
            if core.inversion and self.config.draws > 1:
                raise ValueError(f"draws: got {self.config.draws}, expected 1: an inversion draws no noise")
            engine = self.engine.under(core.adapter, core.controls)
            plan = engine.plan(features=self._ids, maps=() if self._attention is None else self._attention.ids)
            if self.runtime is not None:
                plan.compile(self.runtime)
                engine.compile(self.runtime)
            run = self._runs[core] = strengths, engine, plan
        return run[1:]

    def images_at_once(self, technique: Technique | None = None) -> int:
        """Images that fill a few micro-batches."""
        engine, plan = self._run(technique or self.technique)
        latents = len(self.timesteps) * self.config.draws
        together = min(engine.images_together(plan, latents, self._tokens), engine.images_held(latents))
        return max(1, min(together, engine.memory // _OUT_SHARE // self._out_bytes()))

    def _out_bytes(self) -> int:
        """Of one image's features, and of the sums that its draws are added to."""
        steps, config = len(self.timesteps), self.config
        given = steps * sum(math.prod(shape) for shape in self.shapes.values()) * self._dtype.itemsize
        if config.draws == 1:
            return given
        sums = steps * sum(math.prod(each.taken) for each in self._exits.values()) * 4
        return given * config.draws if config.keep_draws else given + sums

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

    def _checked(self, out: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
        if set(out) != set(self.layers):
            raise ValueError(f"out: holds {', '.join(out) or 'nothing'}, expected {', '.join(self.layers)}")
        for name, value in out.items():
            wanted, device = self._shape(name, images), self.model.device
            if tuple(value.shape) != wanted or value.device != device or not value.is_floating_point():
                raise ValueError(
                    f"out: {name!r} is {tuple(value.shape)} {value.dtype} on {value.device}, expected {wanted} of a "
                    f"float type on {device}"
                )
            if not value.is_contiguous():
                raise ValueError(f"out: {name!r} is not contiguous")
        return dict(out)


def _one_by_one(parts: Iterator[Extracted]) -> Iterator[tuple[int, dict[str, Tensor] | ImageError]]:
    for part in parts:
        place = {number: row for row, number in enumerate(part.numbers)}
        for number in sorted([*part.numbers, *part.errors]):
            if number in part.errors:
                yield number, part.errors[number]
            else:
                yield number, {name: value[place[number]] for name, value in part.features[0].items()}


def raise_first(errors: Mapping[int, ImageError]) -> None:
    """Raises the error of the first image that cannot be used, if there is one."""
    if errors:
        raise errors[min(errors)]
