"""Files of a model: in a folder, or from the hub into its cache, safetensors and JSON only."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsd_fast.models.errors import ModelError


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
    looks_local = not isinstance(source, str) or text.count("/") > 1 or text.startswith((".", "/", "~")) or "\\" in text
    if looks_local:
        raise ModelError(f"{what} {text!r} is a folder that does not exist")
    return None


def download(
    repo: str,
    patterns: Sequence[str],
    *,
    what: str,
    revision: str | None,
    local_files_only: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    """Folder of a hub repository's files that match the patterns; its name is the commit.

    Raises:
        ModelError: no such repository or revision, no permission, or not in the cache while offline.
    """
    import huggingface_hub

    return _wrapped(
        lambda: huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            local_files_only=local_files_only,
            cache_dir=_path(cache_dir),
        ),
        repo,
        what,
        revision,
    )


def download_file(
    repo: str,
    filename: str,
    *,
    what: str,
    local_files_only: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    """One file of a hub repository; errors as `download`, and ModelError when the repository lacks it."""
    import huggingface_hub

    return _wrapped(
        lambda: huggingface_hub.hf_hub_download(
            repo, filename, local_files_only=local_files_only, cache_dir=_path(cache_dir)
        ),
        f"{repo}/{filename}",
        what,
        None,
    )


def _path(folder: str | os.PathLike[str] | None) -> Path | None:
    return None if folder is None else Path(folder)


def _wrapped(fetch: Any, name: str, what: str, revision: str | None) -> Path:
    from huggingface_hub import errors

    given = f"{what} {name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(fetch())
    except errors.HFValidationError as error:
        raise ModelError(f"{given} is neither a folder nor a valid hub id") from error
    except errors.GatedRepoError as error:
        raise ModelError(f"{given} is gated: its terms must be accepted on the hub, and a login is needed") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{given} is neither a folder nor a repository on the hub (a private one needs a login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{given}: the repository has no such revision; expected a branch, tag or commit") from error
    except errors.RemoteEntryNotFoundError as error:
        raise ModelError(f"{given}: the repository has no such file") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{given} is neither a folder nor in the hub cache, and the hub was not asked or not reached "
            "(local_files_only, HF_HUB_OFFLINE, or no connection)"
        ) from error
    except Exception as error:
        # Whatever the network and the disk may do; the hub's own messages have several lines.
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{given} cannot be downloaded: {text}") from error
