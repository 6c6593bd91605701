"""Files of a model: in a folder, or from the hub into its cache, safetensors and JSON only."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dsd_fast.models.errors import ModelError, reason


def find_folder(
    source: str | os.PathLike[str],
    patterns: Sequence[str],
    *,
    what: str,
    shipped: str | None = None,
    revision: str | None = None,
    local_files_only: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> tuple[Path, str | None]:
    """Find the folder that a path, a hub id or "mini" stands for, and the commit of one from the hub.

    Args:
        patterns: of the files that are downloaded of a hub repository.
        what: is looked for, in errors.
        shipped: folder of the embedded model that "mini" stands for; None: no more than another hub id.

    Raises:
        ModelError: a path that does not exist, or a file; a revision of a folder; no such repository or revision, no
            permission, or not in the cache while offline.
    """
    from dsd_fast.models import mini

    name = os.fspath(source)
    folder = mini.path() / shipped if shipped is not None and source == "mini" else local_folder(source, what)
    if folder is not None:
        if revision is not None:
            raise ModelError(f"revision is {revision!r}, but {what} {name!r} is a folder; expected a hub id")
        return folder, None
    import huggingface_hub

    with _downloading(f"{what} {name!r}" + (f" at revision {revision!r}" if revision else "")):
        folder = Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=local_files_only,
                cache_dir=_path(cache_dir),
            )
        )
    return folder, folder.name


def local_folder(source: str | os.PathLike[str], what: str) -> Path | None:
    """The folder that `source` names, or None when it can only be a hub id.

    Raises:
        ModelError: a path that does not exist, or a file.
    """
    text = os.fspath(source)
    if not text:
        raise ModelError(f"{what} is an empty string, expected a folder or a hub id")
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{what} {str(source)!r} is a file, expected a folder in diffusers' layout or a hub id")
    # A hub id is a str of the form "owner/name" (a few old ones: "name"); anything else was meant as a path.
    is_file = text.endswith(".safetensors")
    looks_local = not isinstance(source, str) or text.count("/") > 1 or text.startswith((".", "/", "~")) or "\\" in text
    if looks_local or is_file:
        raise ModelError(f"{what} {text!r} is a {'file' if is_file else 'folder'} that does not exist")
    return None


def _path(folder: str | os.PathLike[str] | None) -> Path | None:
    return None if folder is None else Path(folder)


@contextmanager
def _downloading(given: str) -> Iterator[None]:
    """Says in one sentence why the hub does not give what was asked for."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:
        offline = "neither a folder nor in the hub cache, and the hub was not asked or not reached"
        # The kinds before those that they are of.
        reasons = {
            errors.HFValidationError: " is neither a folder nor a valid hub id",
            errors.GatedRepoError: " is gated: its terms must be accepted on the hub, and a login is needed",
            errors.RepositoryNotFoundError: " is neither a folder nor a repository on the hub (a private one needs a "
            "login)",
            errors.RevisionNotFoundError: ": the repository has no such revision; expected a branch, tag or commit",
            errors.LocalEntryNotFoundError: f" is {offline} (local_files_only, HF_HUB_OFFLINE, or no connection)",
            errors.OfflineModeIsEnabled: f" is {offline} (local_files_only, HF_HUB_OFFLINE, or no connection)",
            # Whatever the network and the disk may do; the hub's own messages have several lines.
            Exception: f" cannot be downloaded: {reason(error)}",
        }
        raise ModelError(given + next(text for kind, text in reasons.items() if isinstance(error, kind))) from error
