"""What the columns of a table mean, format by format."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from dsd_fast.jobs.tables import Row, is_text
from dsd_fast.matching.datasets.drafts import Draft

# Sentences of VQA that each image is asked about besides the right one.
_VQA_NEGATIVES = 9

# Format → the columns by which a table is known.
LAYOUTS = {
    "comvg": ("sentence", "pos_image_id", "neg_image_id"),
    "vqa": ("sentence", "pos_image_id", "neg_sentence_1"),
    "winoground": ("caption_0", "caption_1", "image_0", "image_1"),
}
PLAIN = "image with texts or text_0, text_1, …, or images or image_0, image_1, … with text; label"


def layout_of(columns: Collection[str]) -> str | None:
    """The format that a table's columns tell: one of the layouts, "plain", or None."""
    for format, needed in LAYOUTS.items():
        if all(name in columns for name in needed):
            return format
    has_images = any(name in columns for name in ("image", "images", "image_0"))
    has_texts = any(name in columns for name in ("text", "texts", "text_0"))
    return "plain" if has_images and has_texts else None


def drafter(layout: str, image_name: str | None, is_training: bool) -> Callable[[Row], Draft]:
    """The function that makes a draft of each row.

    Args:
        layout: a format of :data:`LAYOUTS`, or "plain".
        image_name: template of image file names; None is the layout's own.
        is_training: whether the file is the official training one, whose images are of another folder.
    """
    if layout == "comvg":
        template = image_name or "{}.jpg"
        return lambda row: _comvg(row, template)
    if layout == "vqa":
        template = image_name or f"COCO_{'train' if is_training else 'val'}2014_{{:012d}}.jpg"
        return lambda row: _vqa(row, template)
    if layout == "winoground":
        return lambda row: _winoground(row, image_name)
    return _plain


def file_name(template: str, value: str, place: str) -> str:
    """A template filled with an id, as a number where it is one.

    Raises:
        ValueError: an id that the template cannot hold.
    """
    try:
        return template.format(int(value) if value.isascii() and value.isdigit() else value)
    except (ValueError, LookupError, AttributeError):
        raise ValueError(f"{place}: the image id {value[:80]!r} does not fit the file name {template!r}") from None


def _comvg(row: Row, template: str) -> Draft:
    names = [file_name(template, _id(row, column), row.place) for column in ("pos_image_id", "neg_image_id")]
    return Draft(row.place, [*names], [row.text("sentence")], 0, row.name("neg_value"), row.name("id"))


def _vqa(row: Row, template: str) -> Draft:
    negatives = [row.text(f"neg_sentence_{i}") for i in range(1, _VQA_NEGATIVES + 1)]
    name = file_name(template, _id(row, "pos_image_id"), row.place)
    return Draft(row.place, [name], [row.text("sentence"), *negatives], 0, row.name("category"), row.name("id"))


def _winoground(row: Row, template: str | None) -> Draft:
    images = [_image(row, column, row.value(column)) for column in ("image_0", "image_1")]
    for i, image in enumerate(images):
        # The official JSON lines name images without the ending that their files have.
        if isinstance(image, str) and (template or "." not in image):
            images[i] = file_name(template or "{}.png", image, row.place)
    texts = [row.text("caption_0"), row.text("caption_1")]
    return Draft(row.place, images, texts, 0, row.name("collapsed_tag") or row.name("tag"), row.name("id"))


def _plain(row: Row) -> Draft:
    images = [_image(row, column, value) for column, value in _values(row, "image")]
    texts: list[str] = []
    for column, value in _values(row, "text"):
        if not is_text(value):
            raise row.wrong(column, "texts")
        texts.append(value)
    is_paired = len(images) > 1 and len(texts) > 1
    label = 0 if is_paired and not row.has("label") else row.integer("label")
    return Draft(row.place, images, texts, label, row.name("category"), row.name("id"))


def _values(row: Row, name: str) -> list[tuple[str, Any]]:
    """(column, value) of each item of ``name``, ``name``s, or ``name``_0, ``name``_1, …: of the one that has values."""
    numbered: list[str] = []
    while f"{name}_{len(numbered)}" in row.values:
        numbered.append(f"{name}_{len(numbered)}")
    given = [column for column in (name, f"{name}s") if row.has(column)]
    if any(row.has(column) for column in numbered):
        given.append(numbered[0])
    if not given:
        there = ", ".join(row.values) or "none"
        raise ValueError(f"{row.place}: no value in {name}, {name}s or {name}_0; its columns are {there}")
    if len(given) > 1:
        raise ValueError(f"{row.place}: got both {given[0]} and {given[1]}, expected one of them")
    if given[0] == name:
        return [(name, row.values[name])]
    if given[0] == f"{name}s":
        return [(f"{name}s", value) for value in row.items(f"{name}s")]
    # A row with fewer candidates than there are columns leaves the last ones empty.
    while not row.has(numbered[-1]):
        numbered.pop()
    return [(column, row.value(column)) for column in numbered]


def _image(row: Row, column: str, value: Any) -> str | bytes:
    """A name, or the bytes of an embedded image, as Hugging Face data sets write it: {"bytes": …, "path": …}."""
    if isinstance(value, dict):
        data = value.get("bytes")
        value = data if isinstance(data, bytes) and data else value.get("path")
    if is_text(value):
        return str(value)
    if isinstance(value, bytes) and value:
        return value
    raise row.wrong(column, "an image's file name, or its bytes in a Parquet file")


def _id(row: Row, column: str) -> str:
    row.value(column)
    return row.name(column)
