"""What a folder of generated images is given at the end, from its index and manifest alone.

webdataset, parquet  00000.tar (or .parquet) …: the shards by hard link; 00000.parquet: the index's rows of a tar;
                     00000_stats.json; shards.txt: the names in their order
folder               images/metadata.jsonl, as datasets' imagefolder reads it
all                  dataset_card.md; near_duplicates.parquet, where the index has CLIP vectors and the job a threshold
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dsd_fast.generation.card import CARD, card
from dsd_fast.generation.encoding import described, json_bytes
from dsd_fast.generation.files import IMAGES, LAYOUTS, VECTOR, image_path, read_settings
from dsd_fast.generation.near_duplicates import near_duplicates
from dsd_fast.jobs import JobError, index_shards, parquet_bytes, sync_folder, waiting
from dsd_fast.jobs.files import renaming
from dsd_fast.jobs.store import SHARDS

NEAR_DUPLICATES = "near_duplicates.parquet"
SHARDS_FILE = "shards.txt"

_OURS = re.compile(r"\d{5,}(\.tar|\.parquet|_stats\.json)")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_OF = b"dsd_fast.of"
# Of the index's own columns what says nothing of an image in a folder.
_OF_THE_INDEX = {"status", "reason", "message", "shard", "row"}


def close(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes what a folder of generated images is given at the end, and removes what an earlier end left otherwise.

    It may be called at any time and again: files whose content stands are left alone, but for metadata.jsonl, each
    appears whole or not at all, and one that was killed is made good by the next. Of several workers that end at once
    one waits for the other; the last of them sees all shards. Where the file system has no hard links, shards.txt names
    the files in shards/ instead of copies, which would take as much room again.

    Memory: 16 bytes a row and a shard's rows; where near-duplicates are marked, the CLIP vectors, two bytes a value,
    twice over while they are put together.

    Returns:
        {"rows", "images", "errors": reason → rows, "rejected": reason → tries, "classes": [{"cls", "label", "images",
        "errors"}], "near_duplicates": marked images or None, "shards": names of the files that readers are given}.

    Raises:
        ManifestError: it is no folder of generated images.
        JobError: it cannot be written; says that the images are safe.
    """
    path = Path(folder)
    settings = read_settings(path)
    try:
        with waiting(path, "close"):
            return _Closing(path, settings).run()
    except OSError as error:
        raise JobError(
            f"{path} cannot be closed: {error.strerror or error}; its images are safe, and the same command goes on"
        ) from error


@dataclass
class _Totals:
    """Of all rows."""

    images: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    classes: dict[tuple[int, str], Counter[str]] = field(default_factory=dict)

    def add(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Counts the rows of a shard, and gives their statistics."""
        errors = Counter(row["reason"] for row in rows if row["status"] != "ok")
        rejected = Counter(each["reason"] for row in rows for each in json.loads(row.get("tries") or "[]"))
        done = len(rows) - errors.total()
        self.images += done
        self.errors += errors
        self.rejected += rejected
        for row in rows:
            if (group := _class(row)) != (-1, ""):
                self.classes.setdefault(group, Counter())["images" if row["status"] == "ok" else "errors"] += 1
        return {
            "count": len(rows),
            "successes": done,
            "failed": errors.total(),
            "status_dict": ({"success": done} if done else {}) | dict(sorted(errors.items())),
            "rejected": dict(sorted(rejected.items())),
        }

    def told(self) -> dict[str, Any]:
        classes = [
            {"cls": cls, "label": label, "images": counts["images"], "errors": counts["errors"]}
            for (cls, label), counts in sorted(self.classes.items())
        ]
        return {
            "rows": self.images + self.errors.total(),
            "images": self.images,
            "errors": dict(sorted(self.errors.items())),
            "rejected": dict(sorted(self.rejected.items())),
            "classes": classes,
        }


class _Closing:
    """One closing, under the lock.

    Its files are written in a folder of its own, so that what a killed one leaves there can be removed whole.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.layout, self.format = settings["layout"], settings["format"]
        self.threshold: float | None = settings.get("near_duplicates")
        self._work = folder / ".work-close"
        self._kept: set[str] = set()

    def run(self) -> dict[str, Any]:
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        totals, names = _Totals(), list[str]()
        vectors: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        groups: dict[tuple[int, str], int] = {}
        with ExitStack() as stack:
            lines = stack.enter_context(self._metadata()) if self.layout == "folder" else None
            for table in index_shards(self.folder):
                if VECTOR in table.column_names:
                    if self.threshold is not None and (those := _vectors(table, groups)) is not None:
                        vectors.append(those)
                    table = table.drop_columns([VECTOR])
                rows = table.to_pylist()
                statistics = totals.add(rows)
                if lines is not None:
                    for row in rows:
                        self._line(lines, row)
                elif statistics["successes"]:
                    names.append(self._shard(len(names), rows[0]["shard"], table, statistics))
        told = {**totals.told(), "near_duplicates": self._mark(vectors), "shards": names}
        if lines is None:
            for file in list(self.folder.iterdir()):
                if _OURS.fullmatch(file.name) and file.name not in self._kept:
                    file.unlink()
        self._write(CARD, card(self.settings, told).encode())
        if lines is None:
            self._write(SHARDS_FILE, "".join(f"{name}\n" for name in names).encode())
        sync_folder(self.folder)
        self._work.rmdir()
        return told

    def _shard(self, number: int, shard: str, table: Any, statistics: dict[str, Any]) -> str:
        """What a shard is given; the name by which readers find it."""
        ending = LAYOUTS[self.layout]
        source, name = f"{SHARDS}/{shard}{ending}", f"{number:05d}{ending}"
        if self.layout == "webdataset":
            self._write(f"{number:05d}.parquet", bytes(parquet_bytes(table)))
        self._write(f"{number:05d}_stats.json", json_bytes({"shard": shard, **statistics}) + b"\n")
        return name if self._link(source, name) else source

    def _link(self, source: str, name: str) -> bool:
        """Whether the file system has hard links; then ``name`` is one."""
        original, target = self.folder / source, self.folder / name
        if not (target.exists() and target.samefile(original)):
            temporary = self._work / "link.tmp"
            try:
                os.link(original, temporary)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return False
            os.replace(temporary, target)
        self._kept.add(name)
        return True

    def _metadata(self) -> AbstractContextManager[BinaryIO]:
        (self.folder / IMAGES).mkdir(exist_ok=True)
        return renaming(self._work / "metadata.tmp", self.folder / IMAGES / "metadata.jsonl")

    def _line(self, lines: BinaryIO, row: dict[str, Any]) -> None:
        if row["status"] == "ok":
            file = image_path(row["id"], row.get("label"), self.format)
            told = {name: value for name, value in described(row).items() if name not in _OF_THE_INDEX}
            lines.write(json_bytes({"file_name": file, "text": row["prompt"], **told}) + b"\n")

    def _mark(self, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> int | None:
        """How many images are marked; None where there is nothing to mark them by."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.folder / NEAR_DUPLICATES
        if not parts or self.threshold is None:
            file.unlink(missing_ok=True)
            return None
        ids, classes, vectors = (np.concatenate(each) for each in zip(*parts, strict=True))
        parts.clear()
        digest = hashlib.blake2b(repr(self.threshold).encode(), digest_size=16)
        for row in np.argsort(ids):
            digest.update(ids[row].tobytes() + vectors[row].tobytes())
        of = digest.hexdigest().encode()
        # Of the same images it would be the same, and it is the one part that takes long.
        with suppress(FileNotFoundError, pa.ArrowInvalid):
            before = pq.read_metadata(file)
            if (before.metadata or {}).get(_OF) == of:
                return int(before.num_rows)
        marks = near_duplicates(ids, vectors, classes, self.threshold)
        columns = list(zip(*marks, strict=True)) or [(), (), ()]
        kinds = {"id": pa.string(), "near": pa.string(), "cosine": pa.float32()}
        table = pa.table(
            {name: pa.array(values, kind) for (name, kind), values in zip(kinds.items(), columns, strict=True)},
            metadata={_OF: of},
        )
        self._write(NEAR_DUPLICATES, bytes(parquet_bytes(table)))
        return len(marks)

    def _write(self, name: str, content: bytes) -> None:
        self._kept.add(name)
        target = self.folder / name
        if not (target.exists() and target.read_bytes() == content):
            with renaming(self._work / "file.tmp", target) as stream:
                stream.write(content)


def _vectors(table: Any, groups: dict[tuple[int, str], int]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Of the images that have a CLIP vector: ids (n,), the number of their class (n,) and the vectors (n, d)."""
    rows = [row for row in table.to_pylist() if row["status"] == "ok" and row[VECTOR] is not None]
    if not rows:
        return None
    return (
        np.array([row["id"] for row in rows], "S32"),
        np.array([groups.setdefault(_class(row), len(groups)) for row in rows], np.int64),
        np.stack([np.frombuffer(row[VECTOR], np.float16) for row in rows]),
    )


def _class(row: Mapping[str, Any]) -> tuple[int, str]:
    cls = row.get("cls")
    return -1 if cls is None else cls, row.get("label") or ""
