"""Images from texts: any number, each of them again from its row."""

from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.rows import GenerateRow

__all__ = ["GenerateConfig", "GenerateRow"]
