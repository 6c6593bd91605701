"""Images to prompts by CLIP's own two projections."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from dsd_fast.engine import Engine
from dsd_fast.engine.clip import ClipSpace
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.engine.items import prompt_check
from dsd_fast.engine.preprocessing import Preprocessing
from dsd_fast.engine.settings import above, or_none
from dsd_fast.image_prompt.config import ImagePromptConfig
from dsd_fast.image_prompt.mapping import StateMap
from dsd_fast.images import ImageError, ImageSource, check_sources, load_image
from dsd_fast.images.batch import ahead
from dsd_fast.jobs import storable
from dsd_fast.kernels.common.host import own_types
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.load import load_clip
from dsd_fast.models.prompts import token_limit

if TYPE_CHECKING:
    from transformers import CLIPModel

    from dsd_fast.models import Model

# Threads that decode and resize, and how far ahead.
_WORKERS = min(os.cpu_count() or 1, 8)
_AHEAD = 2 * _WORKERS
# Of its images' lengths, what a blend is at least.
_NOTHING = 1e-4


class Conversion:
    """Makes prompts of images: the text state whose projection by CLIP is that of the image.

    Ding et al. 2023, "The CLIP Model is Secretly an Image-to-Prompt Converter", section 3: h = norm · u / |u| with
    u = W_T⁺ W_V p, p being the vision tower's pooled state, W_T and W_V CLIP's projections of texts and images, and
    W_T⁺ an inverse, see :class:`ImagePromptConfig`.

    It holds where the UNet reads the last states of CLIP's own text tower (SD 1.x), which captions tell: both towers
    must give the same for them. Else (SD 2.x, SDXL) the states at captions' ends, and SDXL's pooled states, are fitted
    to CLIP's embeddings of the captions by least squares, and ``map.quality`` tells how well that finds the states of
    captions that were held out.

    Args:
        model: from :func:`dsd_fast.load` or :func:`dsd_fast.from_pipeline`.
        clip: a CLIPModel, or a folder or hub id of one; None: the model's own.
        config: the settings; None: the defaults.
        adapter: names of the adapters that the text encoders are under, see :class:`~dsd_fast.engine.Engine`.

    Attributes:
        model: with that CLIP.
        config: the settings.
        engine: of the model under the adapter.
        map: from pooled states to text states.
        preprocessing: CLIP's own, of pictures.
        vision: the tower, from prepared pixels (n, 3, h, w) to pooled states (n, V), or an output that has them.
        adapter: as given.
        lora, full: name of the LoRA that a tuning has learned in the model's UNet, or None; whether it has learned
            whole matrices there.

    Raises:
        ValueError: no CLIP; captions that the text encoders do not take; a fitted map that is no better than the mean,
            or is given an inverse or a cut.
        ModelError: a CLIP that cannot be loaded.
    """

    def __init__(
        self,
        model: Model,
        clip: CLIPModel | str | os.PathLike[str] | None = None,
        config: ImagePromptConfig | None = None,
        *,
        adapter: str | Sequence[str] | None = None,
    ) -> None:
        if clip is not None:
            network = load_clip(clip, model.dtype, local_files_only=False, cache_dir=None)
            model = model.with_clip(network if network is clip else network.to(model.device).requires_grad_(False))
        if model.clip is None:
            raise ValueError(
                f"clip: got None, and {model.name or 'the model'} has none; expected a CLIPModel, a folder or a hub "
                "id, here or as dsd_fast.load(…, clip=…)"
            )
        self.model, self.config, self.adapter = model, config or ImagePromptConfig(), adapter
        self.engine = Engine(model, adapter)
        space = ClipSpace(model, resize="crop")
        self.map = StateMap(self.engine, space, self.config)
        self.preprocessing: Preprocessing = space.vision.preprocessing
        self.vision: nn.Module = model.clip.vision_model
        self.lora: str | None = None
        self.full = False

    def with_vision(self, vision: nn.Module) -> Self:
        """This converter with another vision tower."""
        other = copy.copy(self)
        other.vision = vision
        return other

    def tuned(self, model: Model, vision: nn.Module, lora: str | None, full: bool) -> Self:
        """This converter with what a tuning has learned, see the attributes."""
        other = self.with_vision(vision)
        other.model, other.engine = model, self.engine.with_unet(model)
        other.lora, other.full = lora, full
        return other

    def convert(
        self,
        images: Iterable[ImageSource],
        prompts: str | Sequence[str] = "",
        *,
        norm: float | None = None,
        names: Sequence[str] | None = None,
    ) -> ImagePrompt:
        """Convert N images: of an empty prompt the begin state, and the image's vector in all other places.

        Args:
            images: N paths (``pathlib.Path``), PIL images, uint8 HWC arrays or float CHW tensors in [0, 1]; consumed as
                they are needed.
            prompts: one for all, or one each, whose words stay before the vector.
            norm: length of the vectors, as that of negative prompts may be another one; None: the settings'.
            names: of the prompts; None: a file's name without its ending, the position of other images.

        Raises:
            ImageError: an image that cannot be used.
            ValueError: prompts that are too long; prompts or names that are not as many as images; a vector that is no
                finite number.
        """
        return self._converted(images, prompts, 0.0, norm, names)

    def edit(
        self,
        images: Iterable[ImageSource],
        prompts: str | Sequence[str],
        alpha: float = 0.6,
        *,
        norm: float | None = None,
        names: Sequence[str] | None = None,
    ) -> ImagePrompt:
        """Convert N images under edits: a prompt's words stay, and from its end on its states are added to the vector.

        Args:
            images, prompts, norm, names: see :meth:`convert`.
            alpha: how much of the prompt's own states is added; of SDXL's pooled state, too.

        Raises:
            ImageError, ValueError: see :meth:`convert`; an ``alpha`` that is no finite number.
        """
        return self._converted(images, prompts, alpha, norm, names)

    def blend(
        self,
        groups: Sequence[Sequence[ImageSource]],
        weights: Sequence[float] | Sequence[Sequence[float]] | None = None,
        prompts: str | Sequence[str] = "",
        alpha: float = 0.0,
        *,
        norm: float | None = None,
        names: Sequence[str] | None = None,
    ) -> ImagePrompt:
        """Convert N groups of images, each to one prompt: their states are mixed before they are given their length.

        Args:
            groups: N sequences of images.
            weights: of the images of a group, for all groups or of each; of images to lead away from below 0. None:
                equal ones.
            prompts, alpha, norm, names: see :meth:`edit`; a name is by default its group's position.

        Raises:
            ImageError, ValueError: see :meth:`edit`; an empty group; weights that are not as many as its images, are no
                finite numbers, or cancel each other.
        """
        check_sources(groups)
        self.check(alpha, norm, prompts, len(groups))
        shares = _shares(groups, weights)
        rows = _checked(itertools.chain.from_iterable(self.mapped_chunks(image for group in groups for image in group)))
        mixed = []
        for number, share in enumerate(shares):
            own = torch.stack(list(itertools.islice(rows, len(share))))
            mixed.append(upload(torch.tensor(share, dtype=own.dtype, device="cpu"), own.device) @ own)
            if not float(mixed[-1].norm()) > _NOTHING * float(own.norm()):
                raise ValueError(f"weights: {share} of groups[{number}] cancel each other")
        names = [str(number) for number in range(len(groups))] if names is None else names
        return self.prompt_of(mixed, prompts, alpha, norm=norm, names=names)

    def prompt_of(
        self,
        mapped: Tensor | Sequence[Tensor],
        prompts: str | Sequence[str] = "",
        alpha: float = 0.0,
        *,
        norm: float | None = None,
        names: Sequence[str] = (),
    ) -> ImagePrompt:
        """Compose N prompts of what :meth:`StateMap.mapped` gives of each, (E [+ E2],).

        Raises:
            ValueError: see :meth:`edit`.
        """
        self.check(alpha, norm, prompts, len(mapped))
        if names and len(names) != len(mapped):
            raise ValueError(f"names: got {len(names)} for {len(mapped)} images, expected one each")
        texts = [prompts] * len(mapped) if isinstance(prompts, str) else list(prompts)
        number_of = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        states = self.engine.encode_prompts(list(number_of))
        text_of = torch.tensor([number_of[text] for text in texts], dtype=torch.int64, device="cpu")
        ends = states.lengths - 1
        width = int(ends.max()) if len(ends) and not alpha else states.states.shape[1]
        # What is kept may meet gradients later.
        with torch.inference_mode(False), torch.no_grad():
            rows = torch.stack(list(mapped)) if len(mapped) else self.map.matrix.new_zeros(0, len(self.map.matrix))
            vectors, pooled = self.map.sized(rows, norm)
            if pooled is not None and alpha and states.pooled is not None:
                own = states.pooled[upload(text_of, states.pooled.device)]
                pooled = pooled + alpha * upload(own, pooled.device, pooled.dtype)
        return ImagePrompt(
            vectors=vectors,
            texts=upload(states.states[:, :width], self.model.device, self.model.dtype),
            ends=ends,
            text_of=text_of,
            pooled=pooled,
            alpha=float(alpha),
            tokens=token_limit(self.model.tokenizers, self.model.text_encoders),
            names=tuple(map(storable, names)),
            settings=self.settings(norm),
        )

    def check(
        self, alpha: float, norm: float | None, prompts: str | Sequence[str] = "", count: int | None = None
    ) -> None:
        """Refuse what can be refused without images.

        Args:
            alpha, norm, prompts: see :meth:`edit`.
            count: of images, where it is known.

        Raises:
            ValueError: a value outside its range, by name.
        """
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"alpha: got {alpha!r}, expected a finite number")
        if not or_none(above(0))(norm):
            raise ValueError(f"norm: got {norm!r}, expected a finite number above 0, or None")
        if not isinstance(prompts, Sequence):
            raise ValueError(f"prompts: got {type(prompts).__name__}, expected a text, or a sequence of one each")
        if not isinstance(prompts, str) and count is not None and len(prompts) != count:
            raise ValueError(f"prompts: got {len(prompts)} for {count} images, expected one, or one each")
        check = prompt_check(self.model)
        for number, text in enumerate([prompts] if isinstance(prompts, str) else prompts):
            wrong = check(text) if isinstance(text, str) else ("", f"got {type(text).__name__}, expected a text")
            if wrong is not None:
                raise ValueError(f"prompts{'' if isinstance(prompts, str) else f'[{number}]'}: {wrong[1]}")

    def prepared(self, images: Iterable[ImageSource]) -> Iterator[Tensor | ImageError]:
        """Yield images as the vision tower takes them, (3, h, w) float32 on the CPU, decoded by threads ahead."""
        load = partial(_prepared, self.preprocessing)
        return ahead(load, images, workers=_WORKERS, read_ahead=_AHEAD, name="dsd-decode")

    def pooled(self, prepared: Tensor) -> Tensor:
        """Run the vision tower on prepared pixels (n, 3, h, w): (n, V) in its type; differentiable."""
        weight = next(self.vision.parameters())
        with own_types(weight.device):
            output = self.vision(upload(prepared, weight.device, weight.dtype))
        result: Tensor = getattr(output, "pooler_output", output)
        return result

    def vectors_of(self, pooled: Tensor, norm: float | None = None) -> tuple[Tensor, Tensor | None]:
        """Make vectors (n, E), and SDXL's pooled states (n, E2), of pooled states (n, V), in the UNet's type.

        Differentiable.
        """
        return self.map.sized(self.map.mapped(pooled), norm)

    def mapped_chunks(
        self, images: Iterable[ImageSource], chunk: int | None = None
    ) -> Iterator[list[Tensor | ImageError]]:
        """Yield of each image what :meth:`StateMap.mapped` gives, (E [+ E2],), or its error, in the images' order.

        Args:
            images: consumed as they are needed.
            chunk: images together; None: as the settings say.
        """
        check_sources(images)
        done = 0
        # Nothing goes on decoding when who asks stops early.
        with closing(cast("Generator[Tensor | ImageError]", self.prepared(images))) as prepared:
            while some := list(itertools.islice(prepared, chunk or self.config.batch)):
                if pixels := [each for each in some if isinstance(each, Tensor)]:
                    with torch.inference_mode(False), torch.no_grad():
                        rows = self.map.mapped(self.pooled(torch.stack(pixels)))
                    places = [place for place, each in enumerate(some) if isinstance(each, Tensor)]
                    for place, row, finite in zip(places, rows, rows.isfinite().all(dim=1).tolist(), strict=True):
                        some[place] = row if finite else _not_finite(done + place)
                done += len(some)
                yield some

    def settings(self, norm: float | None = None) -> dict[str, Any]:
        """Tell how prompts are made, as JSON: CLIP's projections by a hash, the towers by the model's name alone.

        Args:
            norm: of the vectors; None: the settings'.
        """
        told = {"model": self.model.name, "preprocessing": self.preprocessing.settings(), **self.map.settings()}
        return told if norm is None else told | {"norm": float(norm)}

    def _converted(
        self,
        images: Iterable[ImageSource],
        prompts: str | Sequence[str],
        alpha: float,
        norm: float | None,
        names: Sequence[str] | None,
    ) -> ImagePrompt:
        check_sources(images)
        self.check(alpha, norm, prompts, len(images) if isinstance(images, Sequence) else None)
        labels: list[str] = []

        def sources() -> Iterator[ImageSource]:
            for number, image in enumerate(images):
                labels.append(Path(image).stem if isinstance(image, os.PathLike) else str(number))
                yield image

        mapped = list(_checked(itertools.chain.from_iterable(self.mapped_chunks(sources()))))
        return self.prompt_of(mapped, prompts, alpha, norm=norm, names=labels if names is None else names)


def _checked(rows: Iterable[Tensor | ImageError]) -> Iterator[Tensor]:
    for row in rows:
        if isinstance(row, ImageError):
            raise row
        yield row


def _not_finite(number: int) -> ImageError:
    what = f"image {number}"
    return ImageError(what, "not-finite", f"CLIP makes no finite numbers of {what}, which dtype float32 may avoid")


def _prepared(preprocessing: Preprocessing, source: ImageSource) -> Tensor | ImageError:
    try:
        return preprocessing.of_image(load_image(source))[0]
    except ImageError as error:
        return error


def _shares(
    groups: Sequence[Sequence[ImageSource]], weights: Sequence[float] | Sequence[Sequence[float]] | None
) -> list[list[float]]:
    """The weights of each group's images.

    Raises:
        ValueError: see :meth:`Conversion.blend`.
    """
    given: Sequence[Any] = [[1.0 / max(1, len(group))] * len(group) for group in groups] if weights is None else weights
    if not given or not isinstance(given[0], Sequence | np.ndarray):
        given = [given] * len(groups)
    if len(given) != len(groups):
        raise ValueError(f"weights: got {len(given)} for {len(groups)} groups, expected one for each")
    shares = []
    for number, (group, own) in enumerate(zip(groups, given, strict=True)):
        share = [float(each) for each in own]
        if not len(group):
            raise ValueError(f"groups[{number}] is empty, expected at least one image")
        if len(share) != len(group) or not all(map(math.isfinite, share)):
            raise ValueError(
                f"weights: got {share} for {len(group)} images of groups[{number}], expected one number each"
            )
        shares.append(share)
    return shares
