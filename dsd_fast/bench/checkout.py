"""The repository that this package runs from, where it does, and what is there alone: the suites of experiments."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from dsd_fast.bench.case import UnavailableError

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository; what holds the package, where it is installed without one."""

_EXPERIMENTS = "benchmarks.suites"


def experiment(name: str) -> ModuleType:
    """Imports a module of the repository's ``benchmarks/suites``, by its name there.

    The folder becomes importable under that name alone: other packages named ``benchmarks`` are neither hidden nor
    taken for it.

    Raises:
        UnavailableError: the package runs from no checkout.
    """
    folder = ROOT.joinpath(*_EXPERIMENTS.split("."))
    if _EXPERIMENTS not in sys.modules:
        spec = importlib.util.spec_from_file_location(_EXPERIMENTS, folder / "__init__.py")
        if spec is None or spec.loader is None or not folder.is_dir():
            raise UnavailableError(
                "experiments are in the folder benchmarks/suites of the repository, and the package does not run from a"
                " checkout of it (pip install -e .)"
            )
        sys.modules[_EXPERIMENTS] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_EXPERIMENTS])
    return importlib.import_module(f"{_EXPERIMENTS}.{name}")
