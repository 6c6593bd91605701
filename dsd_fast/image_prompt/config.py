"""Settings of a converter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsd_fast.engine.settings import Allowed, above, are_names, check_fields, integer, number, one_of, or_none
from dsd_fast.image_prompt.captions import SETS

INVERSES = ("truncated", "ridge", "prior")
# Captions: one in so many is held out.
LEAST = 8

_EXPECTED: Mapping[str, tuple[Allowed, str]] = {
    "inverse": (one_of(*INVERSES), f"one of {', '.join(INVERSES)}"),
    "cut": (or_none(number(0)), "a number of at least 0, or None"),
    "norm": (or_none(above(0)), "a number above 0, or None"),
    "captions": (
        lambda x: x is None or (x in SETS if isinstance(x, str) else are_names(x) and len(set(x)) >= LEAST),
        f"one of {', '.join(SETS)}, at least {LEAST} different texts, or None",
    ),
    "batch": (integer(1), "an integer of at least 1"),
}


@dataclass(frozen=True)
class ImagePromptConfig:
    """Settings of :class:`~dsd_fast.image_prompt.ImagePromptConverter`.

    Attributes:
        inverse: of the projection W that takes text states to CLIP's space: "truncated" leaves out singular values up
            to the cut, as the official code does; "ridge" takes s / (s² + cut²) for 1 / s; "prior" is the state that is
            expected of an embedding with noise where states are spread about 0 as the captions' are; were they spread
            alike in all directions it would be "ridge". A model whose text encoders are not CLIP's has a map fitted to
            the captions in place of an inverse, and takes neither this nor the cut.
        cut: a singular value; None: 0.3 of the truncated inverse of CLIP ViT-L/14, else the one that finds the
            captions' states best from their embeddings with noise.
        norm: of the vectors; None: 27.5 of CLIP ViT-L/14, else the mean of the captions' states at their end.
        captions: name of a set of :mod:`dsd_fast.image_prompt.captions`, or texts; None: "scenes" of the mini model,
            "things" of others. CLIP ViT-L/14 with the truncated inverse needs few of them, to be known.
        batch: images that go through CLIP together.

    Raises:
        ValueError: a value outside its range, by name.
    """

    inverse: str = "truncated"
    cut: float | None = None
    norm: float | None = None
    captions: str | tuple[str, ...] | None = None
    batch: int = 16

    def __post_init__(self) -> None:
        check_fields(self, _EXPECTED)

    def settings(self) -> dict[str, Any]:
        """Tell what changes answers, as JSON."""
        return {name: value for name, value in asdict(self).items() if name != "batch"}
