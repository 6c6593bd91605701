"""Records: one JSON object a line, checked when they are written and when they are read."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsd_fast.jobs import remove_stale, replacing

SCHEMA = 1

Record = dict[str, Any]

# A type, several of them, a dictionary with exactly these keys, or a dictionary of names to values of one type.
_NUMBER = (int, float)
_SIZES = ("sizes",)
_TARGETS = ("targets",)
_SIDE = {
    "name": str,
    "batch": int,
    "sizes": _SIZES,
    "median": _NUMBER,
    "p20": _NUMBER,
    "p80": _NUMBER,
    "repeats": int,
    "flops": int,
    "bytes": (int, None),
    "memory": (int, None),
    "matmul_share": _NUMBER,
    "copy_share": (*_NUMBER, None),
}
_TARGET = {"least": _NUMBER, "value": _NUMBER, "met": bool}
_COMMON: dict[str, Any] = {
    "schema": int,
    "kind": str,
    "suite": str,
    "case": str,
    "name": str,
    "group": str,
    "ok": bool,
    "reason": (str, None),
    "command": str,
    "date": str,
    "machine": {
        "kind": str,
        "name": str,
        "cores": int,
        "threads": int,
        "driver": (str, None),
        "load": _NUMBER,
    },
    "versions": {
        "python": str,
        "torch": str,
        "triton": (str, None),
        "diffusers": (str, None),
        "dsd_fast": str,
        "mini": str,
    },
    "environment": str,
    "commit": (str, None),
    "dirty": (bool, None),
}
_KINDS: dict[str, dict[str, Any]] = {
    "speed": {
        "unit": str,
        "item": str,
        "items": int,
        "accuracy": {"measure": str, "value": _NUMBER, "tolerance": _NUMBER, "oracle": str},
        "subject": _SIDE,
        "baseline": _SIDE,
        "ratio": {"median": _NUMBER, "low": _NUMBER, "high": _NUMBER, "coverage": _NUMBER},
        "peaks": {"dtype": str, "matmul_flops": _NUMBER, "copy_bytes": _NUMBER},
    },
    "quality": {
        "value": _NUMBER,
        "low": _NUMBER,
        "high": _NUMBER,
        "n": int,
        "unit": str,
        "chance": (*_NUMBER, None),
        "floor": (*_NUMBER, None),
        "sizes": _SIZES,
        "seconds": (*_NUMBER, None),
        "item": str,
    },
    # A case that gave nothing to report: its result was wrong, or it ended with an error.
    "refused": {},
}
# Fields that a record may lack.
_OPTIONAL: dict[str, Any] = {"targets": _TARGETS}


class RecordError(ValueError):
    """A record that is none, with the file, the line and what is wrong with it."""


def append(path: Path, *records: Record) -> None:
    """Adds records to a file, which holds either all its lines or all of them and the new ones, whenever it is killed.

    The new content goes to another name in the same folder, is forced to the disk and renamed. Processes that append
    to files of one folder wait for each other, so what a killed one has left beside the file is removed.

    Raises:
        RecordError: a record that does not fit the schema.
        OSError: the folder cannot be written, or the disk is full; the file is as it was.
    """
    for record in records:
        check(record, "record")
    lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        remove_stale(path)
        before = path.read_bytes() if path.exists() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        with replacing(path) as file:
            file.write(before + lines)


def load(path: Path) -> list[Record]:
    """The records of a file, in order.

    Raises:
        RecordError: names the first line that is no record, and why.
        OSError: the file cannot be read.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RecordError(f"{where}: not JSON ({error})") from error
        check(record, where)
        records.append(record)
    return records


def latest(records: list[Record]) -> dict[tuple[str, ...], Record]:
    """The last record with a result of each name on each machine, in the order in which the names first appear.

    A figure below its floor is a result too; otherwise its floor would choose which figures are shown.
    """
    found: dict[tuple[str, ...], Record] = {}
    for record in records:
        if record["ok"] or record["kind"] == "quality":
            found[(record["name"], *machine_key(record))] = record
    return found


def machine_key(record: Record) -> tuple[str, str, str, str]:
    """What two records must share for their ratios to be compared: the device, by name, the threads, and what
    environment variables asked for."""
    machine = record["machine"]
    return machine["kind"], machine["name"], str(machine["threads"]), record["environment"]


def check(record: Any, where: str) -> None:
    """Refuses what is not a record of this schema.

    Raises:
        RecordError: starts with ``where`` and names the field.
    """
    if not isinstance(record, dict):
        raise RecordError(f"{where}: got {type(record).__name__}, expected an object")
    if record.get("schema") != SCHEMA:
        raise RecordError(f"{where}: schema is {record.get('schema')!r}, expected {SCHEMA}")
    kind = record.get("kind")
    if kind not in _KINDS:
        raise RecordError(f"{where}: kind is {kind!r}, expected one of {', '.join(_KINDS)}")
    optional = {key: part for key, part in _OPTIONAL.items() if key in record and kind == "speed"}
    _check(record, {**_COMMON, **_KINDS[kind], **optional}, where, "")
    if record["ok"] == (record["reason"] is not None):
        raise RecordError(f"{where}: ok is {record['ok']} and reason is {record['reason']!r}, which do not fit")
    if kind == "refused" and record["ok"]:
        raise RecordError(f"{where}: ok is True in a record of kind 'refused'")


def _check(value: Any, expected: Any, where: str, name: str) -> None:
    if isinstance(expected, dict):
        if not isinstance(value, dict):
            raise RecordError(f"{where}: {name} is {value!r}, expected an object")
        prefix = f"{name}." if name else ""
        for key in [*(key for key in expected if key not in value), *(key for key in value if key not in expected)]:
            raise RecordError(f"{where}: {prefix}{key} is {'missing' if key in expected else 'unknown'}")
        for key, part in expected.items():
            _check(value[key], part, where, prefix + key)
    elif expected is _SIZES:
        if not isinstance(value, dict) or not all(type(size) is int for size in value.values()):
            raise RecordError(f"{where}: {name} is {value!r}, expected whole numbers by name")
    elif expected is _TARGETS:
        if not isinstance(value, dict) or not value:
            raise RecordError(f"{where}: {name} is {value!r}, expected what is to be reached, by measure")
        _check(value, dict.fromkeys(value, _TARGET), where, name)
    else:
        kinds = expected if isinstance(expected, tuple) else (expected,)
        # Not isinstance, for which True is a number.
        if not (value is None and None in kinds) and type(value) not in kinds:
            names = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
            raise RecordError(f"{where}: {name} is {value!r}, expected {names}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RecordError(f"{where}: {name} is {value}, expected a finite number")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the system frees a dead one's lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A record's fields as one level, nested names joined by dots."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and key != "sizes":
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found
