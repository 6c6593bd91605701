"""From a vision tower's pooled states to text states: what the map is made of, and how long its vectors are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsd_fast.engine import Engine
from dsd_fast.engine.clip import ClipSpace
from dsd_fast.engine.items import prompt_check
from dsd_fast.engine.network import wide
from dsd_fast.image_prompt.captions import captions_of
from dsd_fast.image_prompt.config import LEAST, ImagePromptConfig
from dsd_fast.image_prompt.inverse import Inverse, best_cut, fitted, held_out_quality, prior, ridge, rounded, truncated
from dsd_fast.jobs import row_id, tensors_hash
from dsd_fast.kernels.common.host import own_types
from dsd_fast.kernels.common.transfer import upload

# Of CLIP ViT-L/14, by its (text width, vision width, vision layers, patch): the official script's CONSTANT_NORM and
# PINV_ATOL.
_VIT_L = (768, 1024, 24, 14)
_NORM, _CUT = 27.5, 0.3
# A tower of these sizes but other weights has another norm.
_NEAR = 0.25
# Captions by which towers are compared, and how far apart, of their length, rounding may bring their states: also where
# a pipeline's tower and CLIP's were rounded to 16 bits apart.
_PROBES = 16
_SAME, _SAME_HALF = 1e-3, 2e-2


class StateMap:
    """The map of a model and its CLIP; see :class:`~dsd_fast.image_prompt.ImagePromptConverter`.

    Args:
        engine: of the model, under the adapters of the text encoders.
        space: of its CLIP.
        config: the settings.

    Attributes:
        exact: whether the UNet reads the last states of CLIP's own text tower, by what both give for captions.
        quality: of a fitted map: "r2" and "cosine" of held-out captions' states, "pooled_r2" and "pooled_cosine" of
            SDXL's pooled ones; {} of an exact one.

    Raises:
        ValueError: captions that the text encoders do not take; a fitted map that is no better than the mean, or is
            given an inverse or a cut.
    """

    def __init__(self, engine: Engine, space: ClipSpace, config: ImagePromptConfig) -> None:
        self._engine, self._space, self._config = engine, space, config
        self._model, self._clip = engine.model, engine.model.clip
        self._source = config.captions or ("scenes" if self._model.name == "mini" else "things")
        self._captions = self._usable()
        self._on_device: dict[object, tuple[Tensor, Tensor]] = {}
        probes = self._captions[:: max(1, len(self._captions) // _PROBES)]
        own, pooled = self._states(probes)
        theirs = self._clip_states(probes)
        half = any(encoder.dtype.itemsize < 4 for encoder in (self._clip, *self._model.text_encoders))
        near = own.shape == theirs.shape and float((own - theirs).norm() / theirs.norm())
        self.exact = pooled is None and near is not False and near <= (_SAME_HALF if half else _SAME)
        vision, width = self._clip.config.vision_config, self._clip.config.text_config.hidden_size
        sizes = (width, vision.hidden_size, vision.num_hidden_layers, vision.patch_size)
        norm = float(theirs.norm(dim=1).mean())
        self._is_vit_l = self.exact and sizes == _VIT_L and abs(norm / _NORM - 1) <= _NEAR
        if not self.exact and (config.cut is not None or config.inverse != "truncated"):
            raise ValueError(
                f"inverse, cut: got {config.inverse!r} and {config.cut}, expected none, for a map fitted to captions "
                f"takes the place of an inverse: {self._model.name or 'the model'} does not read the states of this "
                "CLIP's text tower as they are"
            )
        self.quality = {} if self.exact else self._fitted_quality()

    @cached_property
    def norm(self) -> float:
        """The length of the vectors."""
        if self._config.norm is not None:
            return self._config.norm
        return _NORM if self._is_vit_l else rounded(float(self._caption_states[0].norm(dim=1).mean()))

    @cached_property
    def pooled_norm(self) -> float | None:
        """The length of SDXL's pooled states, the mean of the captions'; None of other families."""
        pooled = None if self.exact else self._caption_states[1]
        return None if pooled is None else rounded(float(pooled.norm(dim=1).mean()))

    @cached_property
    def inverse(self) -> Inverse:
        """From embeddings of unit length to states, SDXL's pooled ones behind them, up to their lengths."""
        if not self.exact:
            states = [each for each in self._caption_states if each is not None]
            return fitted(self._caption_embeds, torch.cat(states, dim=1))
        projection = float64(self._clip.text_projection.weight)
        how = self._config.inverse
        if how == "prior":
            make = prior(projection, self._caption_states[0])
        else:
            make = truncated(projection) if how == "truncated" else ridge(projection)
        cut = self._config.cut
        if cut is None and self._is_vit_l and how == "truncated":
            cut = _CUT
        made = make(best_cut(make, projection, self._caption_states[0]) if cut is None else cut)
        if made.kept == 0:
            largest = float(torch.linalg.svdvals(projection)[0])
            raise ValueError(f"cut: got {cut}, expected one below CLIP's largest singular value, {largest:.4g}")
        return made

    @cached_property
    def matrix(self) -> Tensor:
        """W_map, (E [+ E2], V) float64 on the CPU: from pooled states of the vision tower to ``inverse``'s states."""
        return self.inverse.matrix @ float64(self._clip.visual_projection.weight)

    def mapped(self, pooled: Tensor) -> Tensor:
        """Map (n, V) to states (n, E [+ E2]) up to their lengths, at least float32; differentiable.

        The embedding's length does not count, so that of a blend's images none is more than its weight.
        """
        pooled = wide(pooled)
        key = (pooled.device, pooled.dtype)
        if key not in self._on_device:
            parts = self.matrix, float64(self._clip.visual_projection.weight)
            # What is kept may meet gradients later.
            with torch.inference_mode(False):
                matrix, visual = (upload(part.clone(), *key) for part in parts)
                self._on_device[key] = matrix, visual
        matrix, visual = self._on_device[key]
        with own_types(pooled.device):
            return F.linear(pooled / F.linear(pooled, visual).norm(dim=-1, keepdim=True), matrix)

    def sized(self, mapped: Tensor, norm: float | None = None) -> tuple[Tensor, Tensor | None]:
        """Bring states to their lengths: (n, E) vectors and SDXL's pooled (n, E2), in the UNet's type; differentiable.

        Args:
            norm: of the vectors; None: the map's.
        """
        width, norm = self._model.text_width, self.norm if norm is None else norm
        vectors, pooled = (
            (size * part / part.norm(dim=-1, keepdim=True)).to(self._model.device, self._model.dtype)
            for part, size in ((mapped[:, :width], norm), (mapped[:, width:], self.pooled_norm or 0.0))
        )
        return vectors, None if self.pooled_norm is None else pooled

    @cached_property
    def _hash(self) -> str:
        # Of what the map is made of, for the map itself has other last bits on another machine or with more threads.
        return tensors_hash({"text": self._clip.text_projection.weight, "visual": self._clip.visual_projection.weight})

    def settings(self) -> dict[str, Any]:
        """Tell what changes answers, and how good they are, as JSON, the same on every machine."""
        told: dict[str, Any] = {"projections": self._hash, "norm": self.norm}
        if self.exact:
            told |= {"inverse": self._config.inverse, "cut": self.inverse.cut, "kept": self.inverse.kept}
        else:
            told |= {"inverse": "fitted", "pooled_norm": self.pooled_norm, "quality": self.quality}
        return told | {"captions": self._source if isinstance(self._source, str) else row_id(*self._captions)}

    def _usable(self) -> tuple[str, ...]:
        """The captions; of a set those that the tokenizers do not make too long, as those of a small model may."""
        check = prompt_check(self._model)
        if not isinstance(self._source, str):
            for number, text in enumerate(self._source):
                if (wrong := check(text)) is not None:
                    raise ValueError(f"captions[{number}]: {wrong[1]}")
            return self._source
        usable = tuple(text for text in captions_of(self._source) if check(text) is None)
        if len(usable) < LEAST:
            raise ValueError(f"captions: of {self._source!r} the model takes {len(usable)}, expected at least {LEAST}")
        return usable

    @cached_property
    def _caption_states(self) -> tuple[Tensor, Tensor | None]:
        # Of CLIP's own tower without the padding, which takes most of the time.
        return (self._clip_states(self._captions), None) if self.exact else self._states(self._captions)

    @cached_property
    def _caption_embeds(self) -> Tensor:
        with torch.no_grad():
            return float64(self._space.of_texts(self._captions))

    def _states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """(n, E) at the texts' ends, and SDXL's pooled (n, E2), float64 on the CPU."""
        states = self._engine.encode_prompts(texts)
        rows, places = (
            upload(each, states.states.device) for each in (torch.arange(len(states), device="cpu"), states.lengths - 1)
        )
        return float64(states.states[rows, places]), None if states.pooled is None else float64(states.pooled)

    def _clip_states(self, texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return float64(self._space.text_states(texts))

    def _fitted_quality(self) -> dict[str, float]:
        quality: dict[str, float] = {}
        for prefix, states in zip(("", "pooled_"), self._caption_states, strict=True):
            if states is None:
                continue
            told = held_out_quality(self._caption_embeds, states)
            quality |= {f"{prefix}{name}": rounded(value) for name, value in told.items()}
            if not told["r2"] > 0:
                raise ValueError(
                    f"clip: {self._model.name or 'the model'} does not read the states of this CLIP's text tower, and "
                    f"a map fitted to {len(self._captions)} captions finds those of others no better than their mean "
                    f"does (R² {told['r2']:.3f}); expected the CLIP that one of the model's text encoders is of, or "
                    "more captions"
                )
        return quality


def float64(value: Tensor) -> Tensor:
    """Give a tensor in float64 on the CPU, without its gradient."""
    return value.detach().to("cpu", torch.float64)
