"""Groups from files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from dsd_fast.jobs.tables import SUFFIXES, read_json, read_rows
from dsd_fast.matching.datasets.drafts import Draft, ImageFinder
from dsd_fast.matching.datasets.layouts import LAYOUTS, PLAIN, drafter, layout_of
from dsd_fast.matching.datasets.refcocog import REFS, refcocog_drafts
from dsd_fast.matching.datasets.vqa_binary import vqa_binary_drafts
from dsd_fast.matching.groups import Group

FORMATS = ("comvg", "vqa", "vqa-binary", "refcocog", "winoground", "jsonl", "csv", "parquet")

_PLAIN_FORMATS = ("jsonl", "csv", "parquet")
_PICKLES = (".p", ".pkl", ".pickle")
_CONVERSION = """loading a pickle can run any code, so none is loaded. If you trust the file, convert it yourself:
    import json, pickle
    with open({name!r}, "rb") as pickled, open({json!r}, "w") as converted:
        json.dump(pickle.load(pickled), converted)"""


def read_groups(
    source: str | os.PathLike[str],
    format: str | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    image_name: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    check: bool = False,
    extract: str | os.PathLike[str] | None = None,
) -> list[Group]:
    """The groups of a data file, in its order.

    ============ ======================================================================================================
    format       file
    ============ ======================================================================================================
    comvg        table: sentence, pos_image_id, neg_image_id; neg_value is the category. Images ``<id>.jpg``
    vqa          table: sentence, pos_image_id, neg_sentence_1 to 9. Images ``COCO_val2014_<id, 12 digits>.jpg``, of a
                 file whose name ends in ``_train``: ``COCO_train2014_…``
    vqa-binary   text list or JSON, see :mod:`dsd_fast.matching.datasets.vqa_binary`
    refcocog     JSON, or the folder with ``refs(google).json`` and ``instances.json``, see
                 :mod:`dsd_fast.matching.datasets.refcocog`
    winoground   table: caption_0, caption_1, image_0, image_1; the category is collapsed_tag, else tag; names without
                 an ending get ``.png``
    jsonl, csv,  table: ``image`` with ``texts`` (a list) or ``text_0``, ``text_1``, …; or ``images`` or ``image_0``, …
    parquet      with ``text``; or as many of both. ``label``: position of the right candidate from 0, as a number (1,
                 1.0), true, false or the text of one; not needed with as many of both. A row with fewer candidates
                 leaves the last columns empty
    ============ ======================================================================================================

    A table is CSV (UTF-8, a list in a cell as JSON), JSON lines (``.jsonl``, ``.ndjson``) or Parquet (``.parquet``); in
    all, ``id`` names the group and ``category`` is its category, and other columns are left out. Lists in Parquet may
    be of strings, or of images as Hugging Face writes them, {bytes, path}.

    Image names are relative to ``images`` and cannot leave that folder by ".."; absolute names stand as they are; a URL
    is an error, nothing is downloaded. Files are not looked at unless ``check`` is set: a missing one is an ImageError
    when it is used.

    A group without an id in the file gets 16 hex digits of the SHA-256 of its image names, texts and label, so order
    and folders do not change it; the second of equal groups gets "-2" behind it, and so on. Negatives that are drawn
    (vqa-binary, refcocog) come from the whole file, whatever the limit.

    Args:
        source: the file.
        format: one of the table; None: told by the name's ending and the columns.
        images: folder of the images; None: the data file's.
        image_name: template of image file names from ids, as ``"COCO_val2014_{:012d}.jpg"``; None: the format's own.
            Of comvg, vqa, refcocog and winoground only.
        seed: of the negatives that are drawn.
        limit: as many groups from the start; None: all.
        check: whether all image files must be there.
        extract: folder in which images embedded in a Parquet file are written, under names from their content; None:
            they are decoded at once and held in memory, three bytes a pixel.

    Raises:
        ValueError: an argument is wrong, or the file is, by line (row in Parquet, item in JSON) and column; two groups
            have the same id; the file is a pickle, with the words on how to convert it.
        OSError: the folder ``extract`` cannot be written.
    """
    _check_arguments(format, image_name, seed, limit)
    given = Path(source)
    file = _refcocog_file(given) if given.is_dir() and format in (None, "refcocog") else given
    _refuse_pickle(file)
    if not file.is_file():
        raise ValueError(f"source: {file} is not a file")
    finder = ImageFinder(file.parent if images is None else Path(images), None if extract is None else Path(extract))
    groups: list[Group] = []
    places: dict[str, str] = {}
    repeats: dict[str, int] = {}
    missing: list[str] = []
    for draft in islice(_drafts(file, format, image_name, seed), limit):
        sources = [finder.find(image, draft.place) for image in draft.images]
        if check:
            missing += [
                f"{draft.place}: {image}" for image in sources if isinstance(image, Path) and not image.is_file()
            ]
        identity = draft.id
        if not identity:
            digest = draft.digest()
            repeats[digest] = repeats.get(digest, 0) + 1
            identity = digest if repeats[digest] == 1 else f"{digest}-{repeats[digest]}"
        if identity in places:
            raise ValueError(f"{draft.place}: the id {identity!r} is also that of {places[identity]}")
        places[identity] = draft.place
        try:
            groups.append(Group(tuple(sources), tuple(draft.texts), draft.label, draft.category, identity))
        except ValueError as error:
            raise ValueError(f"{draft.place}: {error}") from None
    if missing:
        raise ValueError(f"{file}: {len(missing)} images are not files, the first: {missing[0]}")
    return groups


def _check_arguments(format: str | None, image_name: str | None, seed: int, limit: int | None) -> None:
    if format is not None and format not in FORMATS:
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(FORMATS)}")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed: got {seed!r}, expected an integer of at least 0")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit: got {limit!r}, expected an integer of at least 1")
    if image_name is None:
        return
    try:
        is_template = image_name.format(1) != image_name.format(2)
    except (ValueError, LookupError, AttributeError):
        is_template = False
    if not is_template:
        raise ValueError(f"image_name: got {image_name!r}, expected a template such as 'COCO_val2014_{{:012d}}.jpg'")


def _drafts(file: Path, format: str | None, image_name: str | None, seed: int) -> Iterator[Draft]:
    if format is None and file.suffix not in SUFFIXES:
        format = _guess_untabled(file)
    if format in ("vqa-binary", *_PLAIN_FORMATS):
        _refuse_image_name(format, image_name)
    if format == "vqa-binary":
        return vqa_binary_drafts(file, seed)
    if format == "refcocog":
        return refcocog_drafts(file, image_name, seed)
    return _table_drafts(file, format, image_name)


def _table_drafts(file: Path, format: str | None, image_name: str | None) -> Iterator[Draft]:
    container = format if format in _PLAIN_FORMATS else SUFFIXES.get(file.suffix)
    if container is None:
        raise ValueError(f"source: {file} ends in {file.suffix!r}, expected one of {', '.join(SUFFIXES)} for {format}")
    rows = read_rows(file, container)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{file} has no rows")
    layout = "plain" if format in _PLAIN_FORMATS else format or layout_of(first.values)
    if layout is None:
        raise ValueError(
            f"format: {file} is a {container} table with the columns {', '.join(first.values) or 'none'}, none of "
            + "; ".join(f"{name} ({', '.join(columns)})" for name, columns in LAYOUTS.items())
            + f"; {container} ({PLAIN})"
        )
    if layout == "plain":
        _refuse_image_name(container, image_name)
    draft = drafter(layout, image_name, is_training=file.stem.endswith("_train"))
    return map(draft, chain([first], rows))


def _guess_untabled(file: Path) -> str:
    if file.suffix == ".txt":
        return "vqa-binary"
    if file.suffix != ".json":
        raise ValueError(
            f"format: not told by the ending {file.suffix!r} of {file}; expected one of {', '.join(FORMATS)}"
        )
    items = read_json(file)
    first = items[0] if isinstance(items, list) and items else None
    if (isinstance(first, dict) and "ref_id" in first) or (isinstance(first, list) and len(first) == 4):
        return "refcocog"
    if isinstance(first, list) and len(first) == 3:
        return "vqa-binary"
    raise ValueError(
        f"format: {file} is JSON and begins with {repr(first)[:80]}; "
        "expected a list of refs or pairs (refcocog), or of [image, [images], text] (vqa-binary)"
    )


def _refcocog_file(folder: Path) -> Path:
    """The refs of a folder; their pickle, which is refused with good advice, where there is only that."""
    refs = folder / REFS
    if not refs.is_file() and (folder / REFS).with_suffix(".p").is_file():
        return refs.with_suffix(".p")
    if not refs.is_file():
        raise ValueError(
            f"source: {folder} is a folder without {REFS}; expected a data file, or the folder of RefCOCOg"
        )
    return refs


def _refuse_pickle(file: Path) -> None:
    if file.suffix in _PICKLES:
        advice = _CONVERSION.format(name=file.name, json=file.with_suffix(".json").name)
        raise ValueError(f"source: {file} is a pickle; {advice}")


def _refuse_image_name(format: str, image_name: str | None) -> None:
    if image_name is not None:
        raise ValueError(f"image_name: got {image_name!r}, but {format} files name their images themselves")
