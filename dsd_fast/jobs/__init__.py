"""What writes results in a way that a killed process, or a full disk, cannot spoil."""

from dsd_fast.jobs.files import remove_stale, replacing, sync_folder
from dsd_fast.jobs.lock import LockedError, locked
from dsd_fast.jobs.tensors import read_tensors, write_tensors

__all__ = [
    "LockedError",
    "locked",
    "read_tensors",
    "remove_stale",
    "replacing",
    "sync_folder",
    "write_tensors",
]
