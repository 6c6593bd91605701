"""Texts with a place for a class."""

from __future__ import annotations

import string
from collections.abc import Sequence


def check_templates(templates: str | Sequence[str]) -> list[str]:
    """Templates as a list.

    Raises:
        ValueError: none, or one without exactly one place for the class.
    """
    texts = [templates] if isinstance(templates, str) else list(templates)
    for text in texts or [""]:
        try:
            if [part[1:] for part in string.Formatter().parse(text) if part[1] is not None] not in (
                [("", "", None)],
                [("class", "", None)],
            ):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"templates: got {text!r}, expected texts such as 'a photo of a {{}}', each with one {{}} or {{class}}"
            ) from None
    return texts


def filled(template: str, name: str) -> str:
    """A template with a class in its place."""
    return template.format(name, **{"class": name})
