"""RefCOCOg, google split (Mao et al., arXiv 1511.02283): each sentence with nine of other images (eric-ai-lab/DSD).

Two kinds of JSON are read:

- The content of ``refs(google).p``, a list of {"ref_id", "image_id", "split", "sentences": [{"raw", "sent"}, …]}, other
  keys left out. A sentence's text is its ``raw``, as in the official code, or ``sent`` where it has no ``raw``; the
  category is the split. The official code draws each negative from a random ref, even of the same image, without seed.
  Here it is drawn likewise, by the seed, the image and the sentence, but all ten are different, and the nine are of
  other images and not also said of this one.
- The content of ``refcoco_train_data.pkl``, the official training part with its negatives, a list of
  [sentence id, text, image id, 1 or 0], each 1 followed by its nine 0.

Images get their names from ``instances.json`` beside the file (its "images": {"id", "file_name"}), or from the template
``image_name``; their folder is COCO's ``train2014``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsd_fast.jobs.tables import is_text, read_json
from dsd_fast.matching.datasets.drafts import Draft
from dsd_fast.matching.datasets.layouts import file_name
from dsd_fast.matching.datasets.negatives import NEGATIVES, Draws

REFS, INSTANCES = "refs(google).json", "instances.json"

_REF = "an object with ref_id, image_id and sentences"


def refcocog_drafts(file: Path, image_name: str | None, seed: int) -> Iterator[Draft]:
    """One draft a sentence: its image, the sentence, then nine of other images.

    Raises:
        ValueError: a file cannot be read, or an item is wrong.
    """
    items = read_json(file)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{file}: got {repr(items)[:80]}, expected a list of refs, the content of refs(google).p")
    name = _names(file, image_name)
    if isinstance(items[0], list):
        yield from _from_pairs(file, items, name)
    else:
        yield from _from_refs(file, items, name, seed)


def _names(file: Path, image_name: str | None) -> Callable[[int, str], str]:
    if image_name is not None:
        return lambda image_id, place: file_name(image_name, str(image_id), place)
    instances = file.with_name(INSTANCES)
    if not instances.is_file():
        raise ValueError(
            f"{file}: {INSTANCES}, which names the images, is not beside it; "
            "or give image_name='COCO_train2014_{:012d}.jpg'"
        )
    content = read_json(instances)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise ValueError(f"{instances}: expected an object with a list of images")
    names: dict[Any, str] = {}
    for number, image in enumerate(images, start=1):
        if not isinstance(image, dict) or not _is_id(image.get("id")) or not is_text(image.get("file_name")):
            raise ValueError(f"{instances}, image {number}: got {repr(image)[:80]}, expected id and file_name")
        names[image["id"]] = image["file_name"]

    def name(image_id: int, place: str) -> str:
        if image_id not in names:
            raise ValueError(f"{place}: {instances} has no image {image_id}")
        return names[image_id]

    return name


def _from_refs(file: Path, refs: list[Any], name: Callable[[int, str], str], seed: int) -> Iterator[Draft]:
    of_ref: dict[int, list[str]] = {}
    of_image: dict[int, set[str]] = {}
    for number, ref in enumerate(refs, start=1):
        place = f"{file}, item {number}"
        if not isinstance(ref, dict) or not all(_is_id(ref.get(key)) for key in ("ref_id", "image_id")):
            raise ValueError(f"{place}: got {repr(ref)[:80]}, expected {_REF}")
        if ref["ref_id"] in of_ref:
            raise ValueError(f"{place}: the ref_id {ref['ref_id']} is there more than once")
        texts = _sentences(ref, place)
        of_ref[ref["ref_id"]] = texts
        of_image.setdefault(ref["image_id"], set()).update(texts)
    # Sorted, so that the order of the refs does not change what is drawn.
    pool = [of_ref[ref_id] for ref_id in sorted(of_ref)]
    for number, ref in enumerate(refs, start=1):
        place, image_id, split = f"{file}, item {number}", ref["image_id"], ref.get("split")
        image, category = name(image_id, place), split if isinstance(split, str) else ""
        for text in of_ref[ref["ref_id"]]:
            draws = Draws(seed, str(image_id), text)
            yield Draft(place, [image], [text, *_others(pool, of_image[image_id], draws, place)], 0, category)


def _sentences(ref: dict[str, Any], place: str) -> list[str]:
    sentences = ref.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise ValueError(f"{place}: got sentences {repr(sentences)[:80]}, expected a list of at least one")
    texts = []
    for sentence in sentences:
        text = sentence.get("raw", sentence.get("sent")) if isinstance(sentence, dict) else None
        if not is_text(text):
            raise ValueError(f"{place}: got the sentence {repr(sentence)[:80]}, expected an object with raw or sent")
        texts.append(str(text))
    return texts


def _others(pool: list[list[str]], said: set[str], draws: Draws, place: str) -> list[str]:
    def draw() -> str | None:
        other = draws.choice(draws.choice(pool))
        return None if other in said else other

    return draws.different(draw, place, "sentences of other images")


def _from_pairs(file: Path, pairs: list[Any], name: Callable[[int, str], str]) -> Iterator[Draft]:
    size = NEGATIVES + 1
    for number, pair in enumerate(pairs, start=1):
        place = f"{file}, item {number}"
        is_pair = isinstance(pair, list) and len(pair) == 4 and is_text(pair[1]) and _is_id(pair[2])
        if not is_pair or pair[3] != int(number % size == 1):
            wanted = "1" if number % size == 1 else "0"
            raise ValueError(f"{place}: got {repr(pair)[:80]}, expected [sentence id, text, image id, {wanted}]")
    if len(pairs) % size:
        raise ValueError(f"{file}: got {len(pairs)} pairs, expected a multiple of {size}")
    for start in range(0, len(pairs), size):
        place = f"{file}, item {start + 1}"
        if len({pair[2] for pair in pairs[start : start + size]}) > 1:
            raise ValueError(f"{place}: the {size} pairs from here have several images, expected one")
        yield Draft(place, [name(pairs[start][2], place)], [pair[1] for pair in pairs[start : start + size]])


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
