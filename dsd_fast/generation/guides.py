"""Classifiers that accept an image of which they say its class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dsd_fast.engine.guides import Guide, guide_of, some, targets_of
from dsd_fast.generation.accept import Images, Judge, Verdict, by_score, check_threshold
from dsd_fast.generation.grids import read_classes
from dsd_fast.generation.rows import GenerateRow

if TYPE_CHECKING:
    from dsd_fast.models import Model


class AcceptClassifier(Judge):
    """Accepts an image of which a classifier says its row's label.

    The label must be the first of all outputs ("other-class"), with at least the threshold's probability, by the
    softmax of all ("low-probability"); the score is that probability.

    Args:
        classifier: a guide, a folder or hub id, or a module: see :func:`dsd_fast.engine.guides.guide_of`.
        classes: the job's, names or a file of one a line; which outputs they are, see
            :func:`dsd_fast.engine.guides.targets_of`.
        threshold: the least probability, 0 to 1.
        options: of :func:`dsd_fast.engine.guides.guide_of`.

    Attributes:
        classes: the job's.

    Raises:
        ModelError, ValueError: as those functions do; another threshold.
    """

    def __init__(
        self,
        classifier: Guide | nn.Module | str | os.PathLike[str],
        classes: Sequence[str] | os.PathLike[str],
        threshold: float = 0.0,
        **options: Any,
    ) -> None:
        self.classes = read_classes(classes)
        threshold = check_threshold(threshold, 0)
        self._guide = guide_of(classifier, classes=self.classes, **options)
        self._outputs = targets_of(self._guide, self.classes)
        super().__init__(threshold, classes=self.classes, guide=self._guide.settings())

    def probabilities(self, images: Images) -> Tensor:
        """Give (n, outputs) float32 of (n, H, W, 3) images of 8 bits."""
        return self._guide.of_images(list(images)).float().softmax(-1)

    def __call__(self, images: Images, rows: Sequence[GenerateRow]) -> list[Verdict]:
        wanted = [self.output_of(row.label) for row in rows]
        found = self.probabilities(images)
        firsts = found.argmax(-1).tolist()
        scores = found[range(len(wanted)), wanted].tolist()
        return [
            by_score(score, self.threshold, "low-probability")
            if first == output
            else Verdict(False, "other-class", score)
            for first, output, score in zip(firsts, wanted, scores, strict=True)
        ]

    def check(self, row: GenerateRow) -> None:
        """Refuse a row of another class."""
        self.output_of(row.label)

    def output_of(self, label: str | None) -> int:
        """The output of a class.

        Raises:
            ValueError: it is none of the classes.
        """
        if label is None or label not in self._outputs:
            raise ValueError(f"label: got {label!r}, expected one of accept's classes: {some(self.classes)}")
        return self._outputs[label]


class AcceptZeroShot(AcceptClassifier):
    """Accepts by CLIP's probabilities among the job's classes.

    Args:
        model: with a ``clip``.
        classes: the job's, names or a file of one a line.
        threshold: the least probability, 0 to 1.
        template: text of a class, as in :func:`dsd_fast.generation.grid`.

    Raises:
        ValueError: a model without one, another threshold, a template without a place for the class, or a name that
            CLIP does not know.
    """

    def __init__(
        self,
        model: Model,
        classes: Sequence[str] | os.PathLike[str],
        threshold: float = 0.0,
        *,
        template: str = "a photo of a {}",
    ) -> None:
        super().__init__("clip", classes, threshold, model=model, templates=template)
