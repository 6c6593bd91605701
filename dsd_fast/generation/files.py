"""How generated images lie in a job's folder.

webdataset  shards/<shard>.tar: of each row <id>.png (or jpg, webp), <id>.txt, <id>.json and <id>.cls
parquet     shards/<shard>.parquet: image, text, cls, and the index's columns
folder      images/<class>/<id>.png, without a class images/<the id's first two digits>/<id>.png
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dsd_fast.generation.encoding import SAMPLE_NAMES
from dsd_fast.jobs import (
    ManifestError,
    Row,
    ShardFiles,
    Write,
    index_shards,
    parquet_bytes,
    read_manifest,
    read_shard,
    row_id,
)
from dsd_fast.jobs.store import OK, SHARDS

KIND = "generation"
LAYOUTS = {"webdataset": ".tar", "parquet": ".parquet", "folder": ""}
"""Layout → the ending of a shard's one file; "" where each image has its own."""
IMAGES = "images"
# Of the index, not of a sample: of the rows of a shard, not of its image.
VECTOR = "clip"

# Parquet readers fetch a row group at once; the hub's viewer shows its first rows by it.
_GROUP_ROWS = 100
# Bytes of a name in all usual file systems: 255.
_MOST_BYTES = 200
# Of datasets.data_files: SPLIT_KEYWORDS between NON_WORDS_CHARS; a folder's name that has one makes it a split, and
# leaves the other folders out. And the one file beside the folders.
_TAKEN = re.compile(
    r"(?<![^-._ 0-9])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?![^-._ 0-9])"
    r"|^metadata(?=\.jsonl$)"
)


def check_layout(layout: str) -> None:
    """Refuses a layout that there is not.

    Raises:
        ValueError: it is none.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a folder's images were made with.

    Raises:
        ManifestError: it is no folder of generated images.
    """
    manifest = read_manifest(folder)
    if manifest["kind"] != KIND:
        raise ManifestError(f"{folder} holds results of {manifest['kind']}, expected generated images")
    settings: dict[str, Any] = manifest["settings"]
    return settings


def writer_of(layout: str, format: str, columns: Mapping[str, str]) -> Write:
    """What writes the rows of a shard, whose payloads are futures of :class:`dsd_fast.generation.encoding.Encoded`.

    The bytes are a function of the rows alone: no times, owners or names of machines are in them.

    Args:
        layout: see this module.
        format: of the images, their files' ending.
        columns: of the job's index: name → type.

    Raises:
        ValueError: a layout that there is not.
    """
    check_layout(layout)

    def tar(files: ShardFiles, rows: Sequence[Row]) -> None:
        # The standard library writes what webdataset's own writer would, and only readers need that package then.
        with (
            files.open(suffix=LAYOUTS[layout]) as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for row in rows:
                sample = row.payload.result()
                for ending, content in (
                    (format, sample.image),
                    ("txt", sample.text.encode()),
                    ("json", sample.json),
                    ("cls", sample.cls),
                ):
                    # The rest of a member is nobody's and of the epoch: mtime, uid and gid are 0.
                    member = tarfile.TarInfo(f"{row.id}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))

    def parquet(files: ShardFiles, rows: Sequence[Row]) -> None:
        content = parquet_bytes(_with_images(rows, format, columns), row_group_size=_GROUP_ROWS)
        with files.open(suffix=LAYOUTS[layout]) as stream:
            stream.write(content)

    def images(files: ShardFiles, rows: Sequence[Row]) -> None:
        for row in rows:
            content = row.payload.result().image
            with files.open(f"{IMAGES}/{image_path(row.id, row.columns.get('label'), format)}") as stream:
                stream.write(content)

    return {"webdataset": tar, "parquet": parquet, "folder": images}[layout]


def image_path(row: str, label: str | None, format: str) -> str:
    """Tell where the layout "folder" has a row's image, below :data:`IMAGES`: a folder per class.

    Labels that differ have folders that differ: what no file system or pattern takes is percent-encoded, so is a letter
    of words by which datasets makes splits of folders, as "train", and of a long label the end is a digest.
    """
    if not label:
        return f"{row[:2]}/{row}.{format}"
    name = quote(label, safe=" ,;'()+=@", errors="backslashreplace")
    name = _TAKEN.sub(lambda found: f"%{ord(found[0][0]):02X}{found[0][1:]}", name)
    if name[0] in "._ ":
        # Hidden, "..", or a folder that readers pass over, as "__pycache__".
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if name[-1] in ". ":
        name = f"{name[:-1]}%{ord(name[-1]):02X}"
    if len(name) > _MOST_BYTES:
        name = f"{name[:_MOST_BYTES]}-{row_id(label)[:16]}"
    return f"{name}/{row}.{format}"


def read_images(folder: str | os.PathLike[str], rows: Sequence[str]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Reads the image files of some rows, in whichever layout, and their columns of the index; which is read once.

    Raises:
        ValueError: the folder has no such row, or an error in its place.
        ManifestError: it is no folder of generated images.
        OSError: it cannot be read.
    """
    path, wanted = Path(folder), set(rows)
    settings = read_settings(path)
    shard_of: dict[str, str] = {}
    for table in index_shards(path, ["id", "shard"]):
        here = wanted.intersection(table["id"].to_pylist())
        shard_of |= dict.fromkeys(here, table["shard"][0].as_py())
        if len(shard_of) == len(wanted):
            break
    for row in rows:
        if row not in shard_of:
            raise ValueError(f"row: {folder} has no row {row!r}, expected the id of one")
    for row in rows:
        yield _read(path, settings["layout"], settings["format"], shard_of[row], row)


def _read(folder: Path, layout: str, format: str, shard: str, row: str) -> tuple[bytes, dict[str, Any]]:
    table = read_shard(folder, shard)
    if table is None:
        raise FileNotFoundError(f"{folder}: the files of shard {shard} have changed while they were read")
    columns = table.slice(table["id"].index(row).as_py(), 1).to_pylist()[0]
    if columns["status"] != OK:
        raise ValueError(f"row: {row} has no image: {columns['reason']}: {columns['message']}")
    if layout == "folder":
        return (folder / IMAGES / image_path(row, columns.get("label"), format)).read_bytes(), columns
    file = folder / SHARDS / f"{shard}{LAYOUTS[layout]}"
    return (_from_tar(file, f"{row}.{format}") if layout == "webdataset" else _from_parquet(file, row)), columns


def _from_tar(file: Path, name: str) -> bytes:
    with tarfile.open(file, "r:") as archive:
        member = archive.extractfile(name)
        if member is None:
            raise ValueError(f"{file} has a {name} that is no file")
        return member.read()


def _from_parquet(file: Path, row: str) -> bytes:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as stored:
        for group in range(stored.num_row_groups):
            position = stored.read_row_group(group, ["id"])["id"].index(row).as_py()
            if position >= 0:
                content: bytes = stored.read_row_group(group, ["image"])["image"][position].as_py()["bytes"]
                return content
    raise ValueError(f"{file} has no row {row}")


def _with_images(rows: Sequence[Row], format: str, columns: Mapping[str, str]) -> Any:
    """The rows as the library datasets reads them, its features among the schema's metadata."""
    import pyarrow as pa

    samples = [row.payload.result() for row in rows]
    images = [{"bytes": sample.image, "path": f"{row.id}.{format}"} for sample, row in zip(samples, rows, strict=True)]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "text": pa.array([sample.text for sample in samples], pa.string()),
            "cls": pa.array([int(sample.cls) for sample in samples], pa.int64()),
            "id": pa.array([row.id for row in rows], pa.string()),
            **{
                SAMPLE_NAMES.get(name, name): pa.array([row.columns.get(name) for row in rows], pa.type_for_alias(kind))
                for name, kind in columns.items()
                if name not in ("prompt", "cls", VECTOR)
            },
        }
    )
    features = {field.name: {"dtype": _dtype(field.type), "_type": "Value"} for field in table.schema}
    features["image"] = {"_type": "Image"}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _dtype(kind: Any) -> str:
    """An Arrow type as the library datasets names it."""
    return {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(kind), str(kind))
