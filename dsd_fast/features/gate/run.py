"""The gate: both parts over the same images, which go through the VAE once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dsd_fast.engine.adapters import Adapters
from dsd_fast.features.extractor import FeatureExtractor
from dsd_fast.features.gate.guide import Guide
from dsd_fast.features.gate.result import GateResult
from dsd_fast.features.inputs import Prompts
from dsd_fast.features.shift import Anchor, ShiftMeter, inputs_of
from dsd_fast.features.technique import Technique
from dsd_fast.jobs import weights_hash
from dsd_fast.unet.adapters import strengths_summary

if TYPE_CHECKING:
    from dsd_fast.images import ImageSource
    from dsd_fast.models import Model


def gate(
    extractor: FeatureExtractor | Model,
    images: Iterable[ImageSource],
    techniques: Sequence[Technique],
    prompts: str | Sequence[str] = "",
    seed: int = 0,
    *,
    seeds: Sequence[int] | None = None,
    baseline: Technique | None = None,
    anchor_timestep: int | None = None,
    normalize: bool = False,
    guide: bool = True,
    strength: float = 0.8,
    steps: int = 20,
    guidance: float = 1.0,
    shown: int = 8,
) -> GateResult:
    """Measures which techniques keep features true to the images (GATE: Meng et al., arXiv 2410.06719, section 5).

    Two parts: the content shift of features under each technique (:func:`~dsd_fast.features.shift.measure_shift`), and
    the paper's guide, which looks at what img2img makes of the image with and without the technique
    (:class:`Guide`). Encoded images, edges and texts are shared.

    Args:
        extractor: its layers, timesteps and settings are measured; a model stands for ``FeatureExtractor(model)``.
        images: N images.
        techniques: with different names.
        prompts, seed, seeds: as :meth:`FeatureExtractor.extract`.
        baseline: what techniques are compared with, and the anchor's technique; by default the empty prompt and
            nothing else.
        anchor_timestep: of the anchor; None: 4/5 of the schedule.
        normalize: see :func:`~dsd_fast.features.shift.laplacian_norm`.
        guide: False leaves the second part out.
        strength, steps, guidance, shown: see :class:`Guide`.

    Raises:
        ImageError: an image that cannot be used.
        ValueError: no images or techniques, two of one name, or an argument outside its range.
    """
    if not isinstance(extractor, FeatureExtractor):
        extractor = FeatureExtractor(extractor)
    if not techniques:
        raise ValueError("techniques: got none, expected at least one")
    plain = Technique("baseline", prompts="", adapter=()) if baseline is None else baseline
    compared = [plain, *techniques]
    meter = ShiftMeter(extractor, compared, anchor=Anchor(plain, anchor_timestep), normalize=normalize)
    drawer = None
    if guide:
        drawer = Guide(
            extractor.engine,
            compared,
            strength=strength,
            steps=steps,
            guidance=guidance,
            shown=shown,
            runtime=extractor.runtime,
        )
    request = Prompts(prompts)
    for inputs in inputs_of(extractor, images, compared, request, seed, seeds):
        meter.add(inputs, request)
        if drawer is not None:
            drawer.add(inputs, request)
    shift = meter.result()
    model, given = extractor.model, extractor.settings()
    # Its own is not measured.
    del given["technique"]
    settings = {
        "model": model.name,
        "revision": model.revision,
        "weights": weights_hash([model.unet, model.vae, *model.text_encoders]),
        "extractor": given | {"timesteps": list(shift.timesteps)},
        "prompts": prompts if isinstance(prompts, str) else list(prompts),
        "baseline": _settings(model, plain),
        "techniques": {each.name: _settings(model, each) for each in techniques},
        "anchor": list(shift.anchor),
        "normalize": normalize,
        "guide": {"strength": strength, "steps": steps, "guidance": guidance} if guide else None,
        "seed": seed if seeds is None else list(seeds),
    }
    return GateResult(shift, None if drawer is None else drawer.result(), settings)


def _settings(model: Model, technique: Technique) -> dict[str, Any]:
    """A technique's settings with the identity of its networks: the ControlNets' weights, the adapters' strengths."""
    adapters = Adapters(model.unet, model.text_encoders, technique.adapter)
    strengths = [strengths_summary(layers) for layers in adapters.strengths()]
    found = technique.settings()
    controls = [
        {**control, "name": str(each.net.config.get("_name_or_path") or ""), "weights": weights_hash([each.net])}
        for control, each in zip(found["controls"], technique.controls, strict=True)
    ]
    return {**found, "controls": controls, "adapters": strengths}
