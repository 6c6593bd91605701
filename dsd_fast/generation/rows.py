"""A row: one image to be made."""

from __future__ import annotations

from dataclasses import dataclass

from dsd_fast.images import ImageSource


@dataclass(frozen=True)
class GenerateRow:
    """One image to be made; what is None is as the configuration says.

    Attributes:
        prompt: the text.
        seed: of its noise, 0 ≤ seed < 2**64.
        negative_prompt: in the place of the absent prompt.
        size: (height, width) in pixels.
        steps, guidance, guidance_rescale, clip_skip, strength, adapter: see :class:`GenerateConfig`.
        image: that is started from.
        conditions: an image for each ControlNet; () makes it without any.
        original_size, crop, target_size: SDXL's micro-conditioning, (height, width), (top, left) and (height, width) in
            pixels; None: ``size``, (0, 0) and ``size``.
        label: the name of its class.
        cls: the index of its class.
        name: for people.
    """

    prompt: str
    seed: int = 0
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float | None = None
    clip_skip: int | None = None
    image: ImageSource | None = None
    strength: float | None = None
    conditions: tuple[ImageSource, ...] = ()
    adapter: tuple[str, ...] | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    label: str | None = None
    cls: int | None = None
    name: str = ""
