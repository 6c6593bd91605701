"""Images as prompts (SD-IPC)."""

from dsd_fast.image_prompt.config import ImagePromptConfig
from dsd_fast.image_prompt.tunable import ImagePromptConverter
from dsd_fast.image_prompt.tune_config import TuneConfig
from dsd_fast.image_prompt.tuning import Tuning

__all__ = ["ImagePromptConfig", "ImagePromptConverter", "TuneConfig", "Tuning"]
