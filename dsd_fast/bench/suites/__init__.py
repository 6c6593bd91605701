"""The suites. A new one is a module with a ``suite``, and its line in :data:`SUITES`.

Those of speed are modules here; experiments are in the repository's ``benchmarks/suites``, outside the wheel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsd_fast.bench.case import Suite


def _of(module: str) -> Callable[[], Suite]:
    """Of a module here."""

    def load() -> Suite:
        found: Suite = importlib.import_module(f"{__name__}.{module}").suite
        return found

    return load


def _experiment(module: str) -> Callable[[], Suite]:
    """Of a module of the repository's ``benchmarks/suites``."""

    def load() -> Suite:
        from dsd_fast.bench.checkout import experiment

        found: Suite = experiment(module).suite
        return found

    return load


SUITES: dict[str, Callable[[], Suite]] = {
    "feature-quality": _experiment("feature_quality"),
    "features": _of("features"),
    "fit": _of("fit"),
    "match": _of("match"),
    "mini-card": _experiment("mini_card"),
    "ops": _of("ops"),
    "unet": _of("unet"),
}
"""Name of a suite → what gives it. Its module, and with it what it measures, is imported by that call.

The call raises UnavailableError for an experiment where the package runs from no checkout.
"""
