"""The qualitative guide: does a technique bring what the model makes of an image closer to the image?

Meng et al., arXiv 2410.06719, section 5: img2img (Meng et al. 2022, "SDEdit") at high strength without the technique
is the reference; with it, the output should come closer to the input. The paper looks at the pictures; here they are
kept for looking, and the distance to the input is measured too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsd_fast.diffusion import RowNoise, guided, img2img
from dsd_fast.engine import Engine
from dsd_fast.engine.clip import ClipSpace
from dsd_fast.features.inputs import Inputs, Prompts, own_prompts, predictor
from dsd_fast.features.shift_result import Floats
from dsd_fast.features.technique import Technique
from dsd_fast.images import to_picture
from dsd_fast.metrics import bootstrap
from dsd_fast.models.tuners import adapter_names


@dataclass(frozen=True, eq=False)
class GuideResult:
    """Distances of img2img outputs to their inputs, for N images.

    Attributes:
        techniques: K names, the baseline's first.
        spaces: "vae", root mean square difference of latents; and "clip", 1 − cosine of embeddings, if the model has a
            CLIP.
        distances: (K, spaces, N) float64.
        unchanged: of K: whether img2img was the baseline's own for every image. A way to make latents (`denoise_from`,
            `inversion`) does not enter img2img, so the guide cannot tell what it does.
        inputs: the first images as the model sees them.
        outputs: of each technique, what became of those.
    """

    techniques: tuple[str, ...]
    spaces: tuple[str, ...]
    distances: Floats
    unchanged: tuple[bool, ...]
    inputs: list[Image.Image]
    outputs: list[list[Image.Image]]

    def gains(self, confidence: float = 0.95) -> tuple[Floats, Floats, Floats]:
        """By what share outputs are closer to the inputs than the baseline's: 1 − Σ d / Σ d_baseline.

        Returns:
            The value and the bounds of its bootstrap interval over images, (K, spaces) each; 0 is the baseline, 1 the
            input itself. NaN where the baseline's outputs are the inputs.
        """

        def share(drawn: Floats) -> Floats:
            total = drawn.sum(0)
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(1 - total / total[:1])

        drawn = np.moveaxis(self.distances, -1, 0)
        low, high = bootstrap(drawn, share, confidence=confidence)
        return share(drawn), low, high

    def accepted(self, confidence: float = 0.95) -> list[bool | None]:
        """Whether a technique brings outputs closer, by the intervals of :meth:`gains`.

        True where they are above 0 in every space; False where one is below 0, so that outputs are farther there; None
        where neither is sure, for the baseline, and for techniques that the guide cannot tell from it.
        """
        _, low, high = self.gains(confidence)
        answers = zip(self.unchanged, map(_accepted, low, high), strict=True)
        return [None if same else answer for same, answer in answers]


def _accepted(low: Floats, high: Floats) -> bool | None:
    if (low > 0).all():
        return True
    return False if (high < 0).any() else None


def check_strength(strength: float, steps: int) -> None:
    """Refuses an img2img without a step.

    Raises:
        ValueError: a strength outside its range, or too low for one step.
    """
    if not 0 < strength <= 1 or int(strength * steps) < 1:
        raise ValueError(f"strength is {strength}, expected above 0, at most 1, and enough for one of {steps} steps")


class Guide:
    """Runs img2img under each technique, some images at a time.

    Techniques that share prompts, ControlNets and adapters are run once. Noise is that of the features.

    Args:
        engine: its model's scheduler's own steps are taken.
        techniques: K of them, the baseline first.
        strength: share of the steps that is taken, above 0 and at most 1. High: what the noise leaves of the image must
            not be enough.
        steps: number of inference steps over the whole schedule.
        guidance: scale of classifier-free guidance against the absent prompt, as the stock pipeline has it
            (:meth:`dsd_fast.models.Model.encode_unconditional`); 1 is none, as features are extracted.
        shown: pictures that are kept.
        runtime: compile for it, see :meth:`dsd_fast.unet.plan.Plan.compile`.

    Raises:
        ValueError: a strength or a number of steps outside its range, or an unknown runtime.
    """

    def __init__(
        self,
        engine: Engine,
        techniques: Sequence[Technique],
        *,
        strength: float = 0.8,
        steps: int = 20,
        guidance: float = 1.0,
        shown: int = 8,
        runtime: str | None = None,
    ) -> None:
        check_strength(strength, steps)
        self._model = model = engine.model
        self._techniques = list(techniques)
        self._adapters = any(adapter_names(part) for part in (model.unet, *model.text_encoders))
        self._engines = [engine.under(technique.adapter, technique.controls) for technique in techniques]
        if runtime is not None:
            for own in self._engines:
                own.compile(runtime)
        self._strength, self._steps, self._guidance, self._shown = strength, steps, guidance, shown
        self._clip = None if model.clip is None else ClipSpace(model)
        # On the model's device until all images are done.
        self._distances: list[Tensor] = []
        self._unchanged = [True] * len(self._techniques)
        self._inputs: list[Image.Image] = []
        self._outputs: list[list[Image.Image]] = [[] for _ in techniques]

    def add(self, inputs: Inputs, prompts: Prompts) -> None:
        """Some images more.

        Args:
            prompts: of the request, for techniques without their own.
        """
        kept = max(0, self._shown - len(self._inputs))
        self._inputs += [to_picture(pixels) for pixels in inputs.pixels[:kept]]
        with torch.no_grad():
            target = None if self._clip is None else self._clip.of_pixels(torch.stack(list(inputs.pixels)))
            made: dict[tuple[object, ...], tuple[list[Tensor], list[Image.Image]]] = {}
            first: tuple[object, ...] | None = None
            found = []
            for number, (technique, engine) in enumerate(zip(self._techniques, self._engines, strict=True)):
                texts = tuple(own_prompts(technique, prompts).of(inputs.numbers))
                # Without adapters in the model it is all the same which of them are named.
                key = (texts, technique.controls, technique.adapter if self._adapters else None)
                first = key if first is None else first
                self._unchanged[number] &= key == first
                if key not in made:
                    made[key] = self._generate(engine, inputs, texts, target, kept)
                distances, pictures = made[key]
                found.append(torch.stack(distances))
                self._outputs[number] += pictures
        self._distances.append(torch.stack(found).double())

    def result(self) -> GuideResult:
        """Of all images so far.

        Raises:
            ValueError: there are none.
        """
        if not self._distances:
            raise ValueError("images: got none, expected at least one")
        return GuideResult(
            tuple(each.name for each in self._techniques),
            ("vae",) if self._clip is None else ("vae", "clip"),
            torch.cat(self._distances, -1).cpu().numpy(),
            tuple(self._unchanged),
            list(self._inputs),
            [list(each) for each in self._outputs],
        )

    def _generate(
        self, engine: Engine, inputs: Inputs, prompts: Sequence[str], target: Tensor | None, kept: int
    ) -> tuple[list[Tensor], list[Image.Image]]:
        """Distances in each space, (n,) each, and the first pictures."""
        predict = predictor(engine, inputs, prompts)
        if self._guidance != 1:
            predict = guided(predictor(engine, inputs, [*[None] * len(inputs), *prompts]), self._guidance)
        latents = img2img(
            self._model.new_scheduler(),
            predict,
            inputs.latents,
            inputs.noise[:, 0, 0],
            strength=self._strength,
            steps=self._steps,
            draws=RowNoise(inputs.seeds),
        )
        distances = [latent_distance(latents, inputs.latents)]
        pixels = engine.decode_latents(latents[: kept if self._clip is None else None])
        if self._clip is not None and target is not None:
            distances.append(clip_distance(self._clip.of_pixels(pixels), target).to(latents.device))
        return distances, [to_picture(each.float()) for each in pixels[:kept]]


def latent_distance(latents: Tensor, target: Tensor) -> Tensor:
    """Root mean square difference of scaled latents, (n, C, h, w) each, to (n,) float32.

    Latents have about unit variance, so unrelated pictures are about √2 apart.
    """
    return (latents.float() - target.float()).square().flatten(1).mean(1).sqrt()


def clip_distance(embeds: Tensor, target: Tensor) -> Tensor:
    """1 − cosine of embeddings of unit length, (n, E) each, to (n,); 0 to 2."""
    return 1 - (embeds * target).sum(-1)
