"""The suites. A new one is a module here with a ``suite``, and its line in :data:`SUITES`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsd_fast.bench.case import Suite


def _of(module: str) -> Callable[[], Suite]:
    def load() -> Suite:
        found: Suite = importlib.import_module(f"{__name__}.{module}").suite
        return found

    return load


SUITES: dict[str, Callable[[], Suite]] = {
    "feature-quality": _of("feature_quality"),
    "features": _of("features"),
    "fit": _of("fit"),
    "match": _of("match"),
    "mini-card": _of("mini_card"),
    "ops": _of("ops"),
    "unet": _of("unet"),
}
"""Name of a suite → what gives it. Its module, and with it what it measures, is imported by that call."""
