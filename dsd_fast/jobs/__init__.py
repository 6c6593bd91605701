"""What writes results in a way that a killed process, or a full disk, cannot spoil."""

from dsd_fast.jobs.files import remove_stale, replacing, sync_folder

__all__ = ["remove_stale", "replacing", "sync_folder"]
