"""The suites. A new one is a module with a ``suite``, and its line in :data:`SUITES`.

Those of speed are modules here; experiments are in the repository's ``benchmarks/suites``, outside the wheel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from dsd_fast.bench.case import Suite
from dsd_fast.bench.checkout import experiment


def _speed(module: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{module}")


def _suite(module: str, find: Callable[[str], ModuleType] = _speed) -> Callable[[], Suite]:
    def load() -> Suite:
        found: Suite = find(module).suite
        return found

    return load


SUITES: dict[str, Callable[[], Suite]] = {
    "class-tokens": _suite("class_tokens", experiment),
    "feature-quality": _suite("feature_quality", experiment),
    "features": _suite("features"),
    "fit": _suite("fit"),
    "generate": _suite("generate"),
    "generate-quality": _suite("generate_quality", experiment),
    "image-prompts": _suite("image_prompts", experiment),
    "match": _suite("match"),
    "mini-card": _suite("mini_card", experiment),
    "ops": _suite("ops"),
    "prompts": _suite("prompts"),
    "tokens": _suite("tokens"),
    "unet": _suite("unet"),
    "zsl": _suite("zsl", experiment),
}
"""Name of a suite → what gives it. Its module, and with it what it measures, is imported by that call.

The call raises UnavailableError for an experiment where the package runs from no checkout.
"""
