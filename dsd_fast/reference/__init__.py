"""Every method the plain way, as its official code computes it, on a stock diffusers pipeline.

The judge of the rest of the package and the baseline of its benchmarks: it imports torch, diffusers, transformers and
numpy alone and shares no code with what it judges. Nothing here is fast, and nothing is changed in the pipeline.
"""

import importlib
from typing import TYPE_CHECKING

__all__ = ["class_tokens", "features", "fitting", "generation", "heatmaps", "image_prompt", "inputs", "matching"]

if TYPE_CHECKING:
    from dsd_fast.reference import class_tokens, features, fitting, generation, heatmaps, image_prompt, inputs, matching
else:

    def __getattr__(name: str) -> object:
        if name in __all__:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
