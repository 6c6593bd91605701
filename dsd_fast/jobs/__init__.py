"""What writes results in a way that a killed process, or a full disk, cannot spoil."""

from dsd_fast.jobs.errors import JobError, LockedError, ManifestError
from dsd_fast.jobs.files import remove_stale, replacing, sync_folder
from dsd_fast.jobs.filling import Exported, fill
from dsd_fast.jobs.ids import config_hash, file_digest, row_id, tensors_hash, weights_hash, worker_of
from dsd_fast.jobs.index import index_shards, read_index, read_shard
from dsd_fast.jobs.job import Counts, Job, Write
from dsd_fast.jobs.lock import all_ended, locked, waiting
from dsd_fast.jobs.manifest import open_manifest, read_manifest
from dsd_fast.jobs.store import Row, ShardFiles, parquet_bytes, storable
from dsd_fast.jobs.tensors import read_tensors, stream_tensors, write_tensors
from dsd_fast.jobs.timeline import Timeline
from dsd_fast.jobs.writer import Writer

__all__ = [
    "Counts",
    "Exported",
    "Job",
    "JobError",
    "LockedError",
    "ManifestError",
    "Row",
    "ShardFiles",
    "Timeline",
    "Write",
    "Writer",
    "all_ended",
    "config_hash",
    "file_digest",
    "fill",
    "index_shards",
    "locked",
    "open_manifest",
    "parquet_bytes",
    "read_index",
    "read_manifest",
    "read_shard",
    "read_tensors",
    "remove_stale",
    "replacing",
    "row_id",
    "storable",
    "stream_tensors",
    "sync_folder",
    "tensors_hash",
    "waiting",
    "weights_hash",
    "worker_of",
    "write_tensors",
]
