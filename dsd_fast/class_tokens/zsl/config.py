"""Settings of a run of DIG-ZSL, from TOML or Python."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from dsd_fast.class_tokens.cdm import CdmConfig
from dsd_fast.class_tokens.config import TokenConfig, are_templates
from dsd_fast.class_tokens.zsl.classifiers import CLASSIFIERS
from dsd_fast.engine.settings import Fields, above, check_fields, integer, is_bool, is_text, number, or_none
from dsd_fast.generation.config import GenerateConfig

ENSEMBLE = (
    "a photo of a {}",
    "a close-up photo of a {}",
    "a photo of one {}",
    "a good photo of the {}",
    "a photo of the large {}",
    "a photo of the small {}",
    "a bright photo of a {}",
    "a dark photo of the {}",
)
"""Some of the templates that CLIP's authors have for ImageNet."""

BASELINES = ("plain", "ensemble", "clip", "real")

TOKENS = TokenConfig(templates=("A photo of {}",), gradient_steps=1, stopping="gamma")
"""The paper's text, its one step with a gradient, and its stopping."""


@dataclass(frozen=True)
class ZslConfig:
    """How zero-shot learning by class tokens is run (Fu et al. 2024, "DIG-ZSL").

    Attributes:
        out: folder of all that is made.
        images: folder of the images, see :mod:`dsd_fast.class_tokens.zsl.data`.
        proposed: folder of ``res101.mat`` and ``att_splits.mat``; None: ``images`` has folders of classes.
        unseen: of one folder of classes the unseen ones, names or a file of one a line.
        names: of the classes, a file of one a line, in the order of the labels of ``proposed``, or of the folders'
            names; None: their own.
        test_share: of a seen class's images those held out, where the data set itself does not say.
        validation: seen classes that λ and γ are chosen on: how many, names, or a file; None: the data set's own, else
            in proportion; 0: none, and λ is 0 and γ the one of ``gammas``.
        model, clip, device, dtype, revision, local_files_only: see :func:`dsd_fast.load`; without a CLIP there are no
            prototypes.
        cdm: of the category discrimination model.
        tokens: of the learner.
        gammas: values of γ (``tokens.gamma``) to choose from; where there is one, it is taken.
        generate: of the images.
        per_class: images of each unseen class.
        accept: least probability, by the category discrimination model among the unseen classes, of an image that is
            one of the results; None takes all.
        max_tries: of each of them.
        classifiers: "softmax", "gaussian": see :func:`dsd_fast.class_tokens.zsl.classifiers.probabilities`; γ is chosen
            by the first.
        baselines: "plain": images of the same texts without the token; "ensemble": of other templates without it;
            "clip": CLIP's zero-shot classification; "real": real images of the unseen classes, in two halves, each
            tested on the other.
        ensemble: templates of "ensemble".
        counts: images of a class, of which the report shows how many are needed; larger ones than ``per_class`` count
            as it.
        seed: of what is drawn: held-out images and classes, and the generated images' noise.

    Raises:
        ValueError: a value outside its range, by name.
    """

    out: Path
    images: Path
    proposed: Path | None = None
    unseen: tuple[str, ...] | Path | None = None
    names: Path | None = None
    test_share: float = 0.2
    validation: int | tuple[str, ...] | Path | None = None
    model: str = "mini"
    clip: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    revision: str | None = None
    local_files_only: bool = False
    cdm: CdmConfig = field(default_factory=CdmConfig)
    tokens: TokenConfig = TOKENS
    gammas: tuple[float, ...] | None = None
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    per_class: int = 100
    accept: float | None = None
    max_tries: int = 10
    classifiers: tuple[str, ...] = CLASSIFIERS
    baselines: tuple[str, ...] = BASELINES
    ensemble: tuple[str, ...] = ENSEMBLE
    counts: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, _FIELDS)
        for name, kind in _TABLES.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}: got {getattr(self, name)!r:.80}, expected a {kind.__name__}")
        if self.tokens.loss == "noise":
            raise ValueError("tokens.loss: got 'noise', which needs images of unseen classes; expected 'cross-entropy'")
        if self.proposed is not None and self.unseen is not None:
            raise ValueError("unseen: given with proposed, whose splits say it; expected one of them")
        if self.gammas and self.tokens.stopping != "gamma":
            raise ValueError(f"gammas: given where tokens.stopping is {self.tokens.stopping!r}, expected 'gamma'")
        if self.gammas and len(self.gammas) > 1 and self.validation == 0:
            raise ValueError(f"gammas: got {len(self.gammas)} without validation classes to choose by, expected one")

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> ZslConfig:
        """Read a TOML file: fields by name, those of ``cdm``, ``tokens`` and ``generate`` in tables; paths as seen
        from its folder.

        Raises:
            ValueError: no such file, no TOML, an unknown or missing name, or a value outside its range.
        """
        path = Path(file)
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist, expected a TOML file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no TOML: {error}") from error
        try:
            return cls(**_values(cls, given, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


_TABLES = {"cdm": CdmConfig, "tokens": TokenConfig, "generate": GenerateConfig}
_PATHS = ("out", "images", "proposed", "names")
# A text is a file of them.
_NAMES = ("unseen", "validation")


def _values(cls: type[ZslConfig], given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    _check_names("", given, cls)
    for name in ("out", "images"):
        if name not in given:
            raise ValueError(f"{name} is missing")
    values = dict(given)
    for name in (*_PATHS, *_NAMES):
        if isinstance(values.get(name), str):
            values[name] = folder / values[name]
    for name, kind in _TABLES.items():
        if name in given:
            if not isinstance(given[name], dict):
                raise ValueError(f"{name}: got {given[name]!r:.80}, expected a table, [{name}]")
            _check_names(f"{name}.", given[name], kind)
            try:
                values[name] = replace(TOKENS, **given[name]) if name == "tokens" else kind(**given[name])
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
    return values


def _check_names(prefix: str, given: Mapping[str, Any], kind: Any) -> None:
    assert is_dataclass(kind)
    known = [each.name for each in fields(kind)]
    for name in given:
        if name not in known:
            like = difflib.get_close_matches(name, known, 1)
            meant = f"; {like[0]!r} may be meant" if like else f"; there are {', '.join(known)}"
            raise ValueError(f"{prefix}{name}: there is no such setting{meant}")


def _some_of(*values: str) -> Any:
    return lambda x: isinstance(x, tuple) and len(set(x)) == len(x) and set(x) <= set(values)


def _all(allowed: Any) -> Any:
    return lambda x: isinstance(x, tuple) and bool(x) and all(map(allowed, x))


def _is_path(x: object) -> bool:
    return isinstance(x, Path)


def _are_names(x: object) -> bool:
    return _is_path(x) or _all(is_text)(x)


_FIELDS: Fields = {
    "out": (_is_path, "a pathlib.Path"),
    "images": (_is_path, "a pathlib.Path"),
    "proposed": (or_none(_is_path), "a pathlib.Path, or None"),
    "unseen": (or_none(_are_names), "names, the pathlib.Path of a file of them, or None"),
    "names": (or_none(_is_path), "the pathlib.Path of a file, or None"),
    "test_share": (lambda x: above(0, 1)(x) and x < 1, "a number between 0 and 1"),
    "validation": (or_none(lambda x: integer(0)(x) or _are_names(x)), "a number of classes, names, a file, or None"),
    "model": (is_text, "a text"),
    "clip": (or_none(is_text), "a text, or None"),
    "device": (is_text, "a text"),
    "dtype": (is_text, "a text"),
    "revision": (or_none(is_text), "a text, or None"),
    "local_files_only": (is_bool, "True or False"),
    "gammas": (or_none(_all(number(0, 1))), "numbers from 0 to 1, or None"),
    "per_class": (integer(1), "an integer of at least 1"),
    "accept": (or_none(number(0, 1)), "a number from 0 to 1, or None"),
    "max_tries": (integer(1), "an integer of at least 1"),
    "classifiers": (lambda x: _some_of(*CLASSIFIERS)(x) and bool(x), f"some of {', '.join(CLASSIFIERS)}"),
    "baselines": (_some_of(*BASELINES), f"some of {', '.join(BASELINES)}, each once"),
    "ensemble": (are_templates, 'texts with one "{}" or "{class}" each'),
    "counts": (_all(integer(1)), "integers of at least 1"),
    "seed": (integer(0, 2**64 - 1), "an integer from 0 to 2**64 - 1"),
}
