"""UNet activations of images at any number of timesteps and layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from dsd_fast.features.export import extract_to
from dsd_fast.features.extraction import Extraction, raise_first
from dsd_fast.features.inputs import Prompts
from dsd_fast.features.pca import PCA, Moments
from dsd_fast.features.technique import Technique
from dsd_fast.images import ImageError, ImageSource, check_sources, drawn


class FeatureExtractor(Extraction):
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
        chunks = self.extract_chunks(images, prompts, seed, seeds=seeds)
        return (image for chunk in chunks for image in chunk.by_image())

    # What it documents holds for the method too.
    extract_to = extract_to

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
        sources = images if isinstance(images, Sequence) else list(drawn(images))
        request = Prompts(prompts)
        filled = [self._empty(len(sources)) if out is None else self._checked(out, len(sources)) for out in outs]
        for inputs, errors in self.encode(sources, request, seed, seeds=seeds, techniques=techniques):
            raise_first(errors)
            for technique, out in zip(techniques, filled, strict=True):
                self._capture(technique, inputs, request, out, inputs.numbers[0])
        return filled

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
