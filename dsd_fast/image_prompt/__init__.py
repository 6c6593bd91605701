"""Images as prompts (SD-IPC)."""

from dsd_fast.image_prompt.config import ImagePromptConfig
from dsd_fast.image_prompt.converter import ImagePromptConverter

__all__ = ["ImagePromptConfig", "ImagePromptConverter"]
