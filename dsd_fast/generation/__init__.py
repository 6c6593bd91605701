"""Images from texts: any number, each of them again from its row."""

from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.generate import generate
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.generation.sampler import Sampler, to_uint8

__all__ = ["GenerateConfig", "GenerateRow", "Sampler", "generate", "to_uint8"]
