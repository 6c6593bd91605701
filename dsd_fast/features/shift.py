"""Content shift: how far features have moved away from the image.

Meng et al., arXiv 2410.06719, "Suppress Content Shift", section 4. Activations of a noised latent rebuild the image;
details that the noise has hidden are imagined, and drift from the input. With F_ref the same feature at t = 0, where
nothing is hidden,

    diff(F) = Σ_ij | ‖Lap(F_ref)_ij‖₂ − ‖Lap(F)_ij‖₂ |      (eq. 1, norms over channels)
    Score = (diff_anchor − diff(F)) / diff_anchor             (eq. 2)

with the anchor a feature of strong shift: 1 is no shift, 0 as much as the anchor's, below 0 more. The paper leaves
choices open and its repositories have no code for it; here

- Lap is the 3 × 3 kernel (0, 1, 0; 1, −4, 1; 0, 1, 0) on each channel by itself, borders reflected, in float32;
- F_ref is taken under the technique that F is taken under, so that what a technique changes in the features of a clean
  latent does not count as shift;
- the anchor is the same layer, of the same image, with an empty prompt and no technique at 4/5 of the schedule;
- features are as they come: F and F_ref share the network's scale. Dividing each position by its norm over channels
  (`normalize`) is an option: it compares directions, and no longer ignores a constant added to a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dsd_fast.features.extraction import raise_first
from dsd_fast.features.extractor import FeatureExtractor
from dsd_fast.features.inputs import Inputs, Prompts
from dsd_fast.features.shift_result import Floats, ShiftResult
from dsd_fast.features.technique import Technique
from dsd_fast.images import ImageSource, drawn
from dsd_fast.kernels.common.host import own_types
from dsd_fast.kernels.common.transfer import upload

_KERNEL = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def laplacian_norm(features: Tensor, *, normalize: bool = False) -> Tensor:
    """‖Lap(F)_ij‖₂: how sharply a feature changes at each position.

    Args:
        features: (…, C, h, w) of any floating-point type, h and w at least 2.
        normalize: divide each position by its L2 norm over channels before.

    Returns:
        (…, h, w) float32, float64 for float64 features.

    Raises:
        ValueError: features of another shape, or of one position along a side.
    """
    if features.ndim < 3 or min(features.shape[-2:]) < 2:
        raise ValueError(f"features has shape {tuple(features.shape)}, expected (…, C, h, w) with h and w at least 2")
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    if normalize:
        x = F.normalize(x, dim=-3)
    kernel = upload(torch.tensor(_KERNEL, dtype=x.dtype, device="cpu"), x.device)[None, None]
    padded = F.pad(x.reshape(-1, 1, *x.shape[-2:]), (1, 1, 1, 1), mode="reflect")
    with own_types(x.device):
        edges = F.conv2d(padded, kernel)
    norms: Tensor = edges.reshape(x.shape).norm(dim=-3)
    return norms


def content_shift(features: Tensor, reference: Tensor, *, normalize: bool = False) -> Tensor:
    """diff(F) of eq. 1: the summed differences of :func:`laplacian_norm`.

    Args:
        features: (…, C, h, w).
        reference: the same features at t = 0, a shape that broadcasts to that of ``features``.
        normalize: see :func:`laplacian_norm`.

    Returns:
        (…) float32, float64 for float64 features; 0 or more.

    Raises:
        ValueError: as for :func:`laplacian_norm`.
    """
    ours, theirs = (laplacian_norm(each, normalize=normalize) for each in (features, reference))
    return (theirs - ours).abs().sum((-2, -1))


@dataclass(frozen=True)
class Anchor:
    """The feature of strong shift that scores are told against.

    Attributes:
        technique: how it is extracted.
        timestep: at which; None: 4/5 of the schedule.
    """

    technique: Technique = field(default_factory=lambda: Technique("plain", prompts="", adapter=()))
    timestep: int | None = None


def noised_timesteps(timesteps: Sequence[int]) -> list[int]:
    """Those that are not 0, the reference.

    Raises:
        ValueError: there are none.
    """
    asked = [t for t in timesteps if t]
    if not asked:
        raise ValueError("timesteps: got 0 alone, where nothing shifts")
    return asked


class ShiftMeter:
    """Measures some images at a time; nothing of them is kept but numbers.

    Args:
        extractor: its layers and settings are used; its timesteps where ``timesteps`` is None. 0 is left out of them.
        techniques: K of them.
        normalize: see :func:`laplacian_norm`.

    Raises:
        ValueError: no technique or timestep, two techniques of one name, or features of a single position.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        techniques: Sequence[Technique],
        *,
        anchor: Anchor | None = None,
        normalize: bool = False,
    ) -> None:
        anchor = Anchor() if anchor is None else anchor
        names = [each.name for each in techniques]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"techniques: got {names}, expected at least one, and different names")
        asked = noised_timesteps(extractor.config.timesteps)
        flat = [name for name, shape in extractor.shapes.items() if min(shape[1:]) < 2]
        if flat:
            raise ValueError(f"layers: {flat[0]!r} has maps {extractor.shapes[flat[0]][1:]}, expected at least 2 x 2")
        strong = anchor.timestep
        if strong is None:
            strong = 4 * extractor.model.schedule.num_train_timesteps // 5
        self._techniques, self._anchor, self._normalize = list(techniques), anchor, normalize
        self._main = extractor.replaced(timesteps=(0, *asked), technique=techniques[0])
        # In one with what is asked of the anchor's technique, if anything is: they share the reference.
        shared = asked if anchor.technique in techniques else []
        self._strong = extractor.replaced(timesteps=(0, *shared, strong), technique=anchor.technique)
        self._names = tuple(names)
        # On the model's device until all images have been measured.
        self._diffs: list[Tensor] = []
        self._anchor_diffs: list[Tensor] = []

    def add(self, inputs: Inputs, prompts: Prompts) -> None:
        """Measures some images more.

        Args:
            prompts: of the request, for techniques without their own.
        """
        anchor = self._anchor.technique
        *shared, strong = self._measure(self._strong, anchor, inputs, prompts).unbind(1)
        measured = [
            torch.stack(shared, 1) if technique == anchor else self._measure(self._main, technique, inputs, prompts)
            for technique in self._techniques
        ]
        self._diffs.append(torch.stack(measured))
        self._anchor_diffs.append(strong)

    def result(self) -> ShiftResult:
        """Of all images so far.

        Raises:
            ValueError: there are none.
        """
        if not self._diffs:
            raise ValueError("images: got none, expected at least one")
        return ShiftResult(
            self._names,
            tuple(self._main.layers),
            tuple(self._main.timesteps[1:]),
            _numbers(self._diffs),
            _numbers(self._anchor_diffs),
            (self._anchor.technique.name, self._strong.timesteps[-1]),
        )

    def _measure(self, extractor: FeatureExtractor, technique: Technique, inputs: Inputs, prompts: Prompts) -> Tensor:
        """(L, S, n): diff at every timestep but the first, which is 0."""
        features = extractor.features_of(inputs, prompts, technique)
        found = []
        for layer in extractor.layers:
            # (n, S + 1, …): with draws that were kept each is compared with its own reference.
            norms = laplacian_norm(features[layer], normalize=self._normalize)
            diffs = (norms[:, :1] - norms[:, 1:]).abs().sum((-2, -1))
            found.append(diffs.flatten(2).mean(-1) if diffs.ndim > 2 else diffs)
        return torch.stack(found).movedim(1, -1).double()


def _numbers(parts: Sequence[Tensor]) -> Floats:
    return np.asarray(torch.cat(list(parts), -1).cpu().numpy())


def measure_shift(
    extractor: FeatureExtractor,
    images: Iterable[ImageSource],
    techniques: Sequence[Technique] | None = None,
    prompts: str | Sequence[str] = "",
    seed: int = 0,
    *,
    seeds: Sequence[int] | None = None,
    anchor: Anchor | None = None,
    normalize: bool = False,
) -> ShiftResult:
    """Content shift of N images at the extractor's layers and timesteps, under each technique.

    Args:
        techniques: the extractor's own if None. They share what :meth:`FeatureExtractor.extract_each` shares.
        prompts, seed, seeds: as :meth:`FeatureExtractor.extract`.
        anchor: what scores are told against.
        normalize: see :func:`laplacian_norm`.

    Raises:
        ImageError: an image that cannot be used.
        ValueError: no images, or arguments that :class:`ShiftMeter` or the extractor refuses.
    """
    chosen = [extractor.technique] if techniques is None else techniques
    meter = ShiftMeter(extractor, chosen, anchor=anchor, normalize=normalize)
    request = Prompts(prompts)
    for inputs in inputs_of(extractor, images, chosen, request, seed, seeds):
        meter.add(inputs, request)
    return meter.result()


def inputs_of(
    extractor: FeatureExtractor,
    images: Iterable[ImageSource],
    techniques: Sequence[Technique],
    prompts: Prompts,
    seed: int,
    seeds: Sequence[int] | None,
) -> Iterator[Inputs]:
    """Images through the VAE, some at a time, for all of the techniques.

    Raises:
        ImageError: an image that cannot be used.
        ValueError: as :meth:`FeatureExtractor.encode`.
    """
    sources = images if isinstance(images, Sequence) else list(drawn(images))
    for inputs, errors in extractor.encode(sources, prompts, seed, seeds=seeds, techniques=techniques):
        raise_first(errors)
        yield inputs
