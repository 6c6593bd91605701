"""Which images are accepted: by a classifier, by CLIP, or by any function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from dsd_fast.engine.changes import FLEETING
from dsd_fast.engine.guides import clip_space
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.jobs import weights_hash
from dsd_fast.models.controlnet import named

if TYPE_CHECKING:
    from dsd_fast.models import Model

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Verdict:
    """What becomes of an image.

    Attributes:
        accepted: whether it is one of the results.
        reason: a word, of one that is not; "rejected" where none is given.
        score: that it was judged by, or None; what is not finite becomes None.

    Raises:
        ValueError: ``accepted`` is a score, say, or the score no number.
    """

    accepted: bool
    reason: str = ""
    score: float | None = None

    def __post_init__(self) -> None:
        score = self.score
        try:
            if not isinstance(self.accepted, bool | np.bool_) or not isinstance(self.reason, str):
                raise TypeError
            score = None if score is None or not math.isfinite(score) else float(score)
        except (TypeError, ValueError):
            raise ValueError(f"verdict: got {self!r:.200}, expected True or False, a text, and a number") from None
        # Plain Python values, of which JSON is made.
        object.__setattr__(self, "accepted", bool(self.accepted))
        object.__setattr__(self, "reason", self.reason or ("" if self.accepted else "rejected"))
        object.__setattr__(self, "score", score)


class Accept(Protocol):
    """Judges images: any function of them and their rows."""

    def __call__(self, images: Images, rows: Sequence[GenerateRow], /) -> Sequence[bool | Verdict]:
        """Give a verdict, or True or False, for each of (n, H, W, 3) images of 8 bits."""
        ...


def verdicts(accept: Accept | None, images: Images, rows: Sequence[GenerateRow]) -> list[Verdict]:
    """The verdicts of a judge, which may be a caller's own; without one all are accepted.

    Raises:
        ValueError: another number of verdicts than of images, or something else than verdicts, True and False: a score
            would be taken for True.
    """
    if accept is None:
        return [Verdict(True)] * len(images)
    given = list(accept(images, rows))
    if len(given) != len(images):
        raise ValueError(f"accept gave {len(given)} verdicts for {len(images)} images, expected one each")
    for verdict in given:
        if not isinstance(verdict, bool | np.bool_ | Verdict):
            raise ValueError(f"accept gave {repr(verdict)[:80]}, expected True, False or a Verdict for each image")
    return [verdict if isinstance(verdict, Verdict) else Verdict(verdict) for verdict in given]


def accept_settings(accept: Accept | None) -> Any:
    """Tell what of a judge changes results, as JSON; of a function its name, and the weights of modules bound to it.

    Raises:
        ValueError: a function that another process could not tell from another, as a lambda.
    """
    if accept is None or isinstance(accept, Judge):
        return None if accept is None else accept.settings()
    name = named(accept)
    if any(mark in name for mark in FLEETING):
        raise ValueError(
            f"accept is {name}, which a later run could not tell from another; expected a function of a module, "
            "functools.partial of one, or a judge of dsd_fast.generation"
        )
    bound = (*accept.args, *accept.keywords.values()) if isinstance(accept, partial) else (accept,)
    # Which their representations do not tell.
    networks = [each for each in bound if isinstance(each, torch.nn.Module)]
    return {"name": name, "weights": weights_hash(networks)} if networks else name


class Judge:
    """What judges images by a number."""

    def __init__(self, threshold: float, **about: Any) -> None:
        self.threshold = threshold
        self._about = about

    def check(self, row: GenerateRow) -> None:
        """Refuse a row whose images could not be judged.

        Raises:
            ValueError: says why.
        """

    def settings(self) -> dict[str, Any]:
        """Tell all that changes verdicts, as JSON."""
        return {"kind": type(self).__name__, "threshold": self.threshold, **self._about}


class AcceptClip(Judge):
    """Accepts an image whose CLIP embedding has at least this cosine with that of its prompt ("low-clip-score").

    Args:
        model: with a ``clip``.
        threshold: the least cosine, −1 to 1. CLIPScore (Hessel et al. 2021) is 100 times the cosine in torchmetrics.

    Raises:
        ValueError: a model without one, or another threshold.
    """

    def __init__(self, model: Model, threshold: float) -> None:
        self._space = clip_space(model, "crop")
        super().__init__(check_threshold(threshold, -1), clip=self._space.settings())

    def check(self, row: GenerateRow) -> None:
        """Refuse a row whose prompt CLIP does not read."""
        self._space.tokens([_text_of(row)])

    def __call__(self, images: Images, rows: Sequence[GenerateRow]) -> list[Verdict]:
        with torch.no_grad():
            texts = self._space.of_texts([_text_of(row) for row in rows])
            scores = (self._space.of_images(list(images)) * texts).sum(-1).tolist()
        return [by_score(score, self.threshold, "low-clip-score") for score in scores]


def _text_of(row: GenerateRow) -> str:
    if not isinstance(row.prompt, str):
        raise ValueError(f"prompt: got {row.prompt!r}, expected a text, with which CLIP compares images")
    return row.prompt


class NearDuplicates:
    """What images that are nearly the same are known by: CLIP embeddings with at least this cosine.

    Args:
        model: with a ``clip``.
        threshold: the least cosine of near-duplicates, 0 to 1.

    Raises:
        ValueError: a model without one, or another threshold.
    """

    def __init__(self, model: Model, threshold: float) -> None:
        self.threshold = check_threshold(threshold, 0)
        self._space = clip_space(model)

    def vectors(self, images: Images) -> npt.NDArray[np.float32]:
        """Embed (n, H, W, 3) images of 8 bits as (n, E) of unit length."""
        return self._space.of_images(list(images)).cpu().numpy()

    def settings(self) -> dict[str, Any]:
        """Tell what changes embeddings, as JSON."""
        return self._space.settings()

    def near(self, vector: npt.NDArray[np.float32], others: Sequence[npt.NDArray[np.float32]]) -> bool:
        """Whether an embedding (E,) is near to one of others."""
        return any(float(vector @ other) >= self.threshold for other in others)


def check_threshold(value: float, low: int) -> float:
    """A threshold as a number.

    Raises:
        ValueError: it is none from ``low`` to 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not low <= value <= 1:
        raise ValueError(f"threshold: got {value!r}, expected a number from {low} to 1")
    return float(value)


def by_score(score: float, threshold: float, reason: str) -> Verdict:
    """The verdict of a score; NaN is below any threshold."""
    return Verdict(score >= threshold, "" if score >= threshold else reason, score)
