"""Images from texts: any number, each of them again from its row."""

from dsd_fast.generation.accept import AcceptClip, Verdict
from dsd_fast.generation.batches import GenerateBatch
from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.generate import generate
from dsd_fast.generation.grids import grid
from dsd_fast.generation.guides import AcceptClassifier, AcceptZeroShot
from dsd_fast.generation.reading import read_rows
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.generation.sampler import Sampler, to_uint8

__all__ = [
    "AcceptClassifier",
    "AcceptClip",
    "AcceptZeroShot",
    "GenerateBatch",
    "GenerateConfig",
    "GenerateRow",
    "Sampler",
    "Verdict",
    "generate",
    "grid",
    "read_rows",
    "to_uint8",
]
