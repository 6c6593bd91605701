"""Rows of each template, class and seed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsd_fast.engine.templates import check_templates, filled
from dsd_fast.generation.reading import Seeds, check_seeds
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.jobs.tables import is_text, read_lines


def grid(
    templates: str | Sequence[str], classes: Sequence[str] | os.PathLike[str], seeds: Seeds = 0
) -> Iterator[GenerateRow]:
    """Gives a row for each class, template and seed, in this order, the seeds innermost.

    Args:
        templates: texts as "a photo of a {}", the class in the place of the one "{}" or "{class}"; "{{" and "}}" stand
            for braces.
        classes: names, or the `pathlib.Path` of a file of one a line. A row's ``cls`` is its class's position.
        seeds: one or several, the same for each class.

    Raises:
        ValueError: a template without such a place, or with others; no class, an empty one, or one that is there twice;
            no seeds.
    """
    texts = check_templates(templates)
    names = read_classes(classes)
    chosen = check_seeds(seeds) or (0,)
    return (
        GenerateRow(filled(text, name), seed, label=name, cls=number)
        for number, name in enumerate(names)
        for text in texts
        for seed in chosen
    )


def read_classes(classes: Sequence[str] | os.PathLike[str]) -> list[str]:
    """The names of classes, in order, from a list or a file of one a line.

    Raises:
        ValueError: none, one that is empty, or one that is there twice.
    """
    if isinstance(classes, os.PathLike):
        names = [line for _, line in read_lines(Path(classes))]
    elif isinstance(classes, str):
        raise ValueError(f"classes: got the str {classes[:80]!r}, expected a list of names, or a pathlib.Path")
    else:
        names = list(classes)
    wrong = next((name for name in names if not is_text(name)), None)
    if not names or wrong is not None:
        raise ValueError(f"classes: got {'none' if not names else repr(wrong)}, expected names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"classes: {twice!r} is there more than once, so that its index is not known")
    return names
