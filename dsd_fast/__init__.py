"""Diffusion models as discriminative learners, fast: matching, features, class tokens, image prompts,
and images by the million.

Public names load on first use: importing this package imports neither torch nor Triton nor diffusers, compiles
nothing, and touches neither a GPU nor the network.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "ClassTokenLearner",
    "Control",
    "FeatureExtractor",
    "FitConfig",
    "GenerateConfig",
    "GenerateRow",
    "Group",
    "ImagePrompt",
    "ImagePromptConfig",
    "ImagePromptConverter",
    "LearnedTokens",
    "MatchConfig",
    "Matcher",
    "Sampler",
    "Technique",
    "TokenConfig",
    "TuneConfig",
    "ZslConfig",
    "__version__",
    "bench",
    "class_tokens",
    "compat",
    "diffusion",
    "engine",
    "features",
    "from_pipeline",
    "generate",
    "generation",
    "image_prompt",
    "images",
    "jobs",
    "kernels",
    "load",
    "load_controlnet",
    "matching",
    "metrics",
    "models",
    "read_groups",
    "reference",
    "run_zsl",
    "training",
    "unet",
]

if TYPE_CHECKING:
    from dsd_fast import (
        bench,
        class_tokens,
        compat,
        diffusion,
        engine,
        features,
        generation,
        image_prompt,
        images,
        jobs,
        kernels,
        matching,
        metrics,
        models,
        reference,
        training,
        unet,
    )
    from dsd_fast.class_tokens import ClassTokenLearner, TokenConfig
    from dsd_fast.class_tokens.zsl import ZslConfig, run_zsl
    from dsd_fast.engine import ImagePrompt, LearnedTokens
    from dsd_fast.features import FeatureExtractor, Technique
    from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler, generate
    from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter, TuneConfig
    from dsd_fast.matching import FitConfig, Group, MatchConfig, Matcher, read_groups
    from dsd_fast.models import Control, from_pipeline, load, load_controlnet
else:
    # Hidden from type checkers, for which a module with __getattr__ has every name.
    _HOMES = {
        "ClassTokenLearner": "dsd_fast.class_tokens",
        "Control": "dsd_fast.models",
        "FeatureExtractor": "dsd_fast.features",
        "FitConfig": "dsd_fast.matching",
        "GenerateConfig": "dsd_fast.generation",
        "GenerateRow": "dsd_fast.generation",
        "Group": "dsd_fast.matching",
        "ImagePrompt": "dsd_fast.engine",
        "ImagePromptConfig": "dsd_fast.image_prompt",
        "ImagePromptConverter": "dsd_fast.image_prompt",
        "LearnedTokens": "dsd_fast.engine",
        "MatchConfig": "dsd_fast.matching",
        "Matcher": "dsd_fast.matching",
        "Sampler": "dsd_fast.generation",
        "Technique": "dsd_fast.features",
        "TokenConfig": "dsd_fast.class_tokens",
        "TuneConfig": "dsd_fast.image_prompt",
        "ZslConfig": "dsd_fast.class_tokens.zsl",
        "from_pipeline": "dsd_fast.models",
        "generate": "dsd_fast.generation",
        "load": "dsd_fast.models",
        "load_controlnet": "dsd_fast.models",
        "read_groups": "dsd_fast.matching",
        "run_zsl": "dsd_fast.class_tokens.zsl",
    }

    def __getattr__(name: str) -> object:
        import importlib

        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        if name in __all__:
            return importlib.import_module(f"dsd_fast.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
