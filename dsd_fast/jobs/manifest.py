"""What a folder's results were made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsd_fast.jobs.errors import ManifestError
from dsd_fast.jobs.files import remove_stale, replacing
from dsd_fast.jobs.ids import row_id
from dsd_fast.jobs.lock import waiting

NAME = "manifest.json"
VERSION = 1
"""Of the folder's layout."""

_SHOWN = 80


def open_manifest(folder: Path, kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a folder, or compares the one that is there.

    Args:
        folder: exists; the caller has its lock.
        kind: of the job, as "features".
        settings: all that changes results, as JSON knows it: the model, its revision and its weights' hash, seeds. Not
            the device, batch sizes, memory budgets or the number of workers, which do not.

    Returns:
        {"kind", "version", "settings", "fingerprint"}, the fingerprint being 32 hexadecimal digits over the others.

    Raises:
        ManifestError: the folder is of another job; names each setting that differs, with both values.
        ValueError: ``settings`` holds what JSON does not know.
        OSError: the folder cannot be written.
    """
    try:
        content = json.loads(json.dumps({"kind": kind, "version": VERSION, "settings": settings}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: {error}, expected what JSON knows") from error
    content["fingerprint"] = row_id(json.dumps(content, sort_keys=True))
    file = folder / NAME
    # Workers that start at once must not each write their own.
    with waiting(folder):
        remove_stale(file)
        if not file.exists():
            with replacing(file) as stream:
                stream.write(json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            return dict(content)
    found = read_manifest(folder)
    if found["fingerprint"] != content["fingerprint"]:
        raise ManifestError(
            f"{folder} holds results made otherwise: {'; '.join(_differences(found, content))}; "
            "run with those settings, or choose another folder"
        )
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ManifestError: there is none, or what is there is none.
    """
    file = folder / NAME
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ManifestError(f"{folder} has no {NAME}, expected a folder that a job wrote") from None
    except ValueError as error:
        raise ManifestError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict) or not {"kind", "version", "settings", "fingerprint"} <= content.keys():
        raise ManifestError(f"{file} is no manifest, expected kind, version, settings and fingerprint")
    return content


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    before, now = (
        _flat({"kind": each["kind"], "version": each["version"]}) | _flat(each["settings"]) for each in (there, here)
    )
    return [
        f"{key} {_shown(before, key)} there, {_shown(now, key)} now"
        for key in sorted(before.keys() | now.keys())
        if _json(before, key) != _json(now, key)
    ] or ["its manifest was changed by hand"]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings under dotted keys."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def _json(values: Mapping[str, Any], key: str) -> str:
    # Not the values themselves: 1, 1.0 and true are equal.
    return json.dumps(values[key], ensure_ascii=False, sort_keys=True) if key in values else "not set"


def _shown(values: Mapping[str, Any], key: str) -> str:
    text = _json(values, key)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
