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
# Of the mini model, whose loop trains judges and guides, too.
_TRAINING = "benchmarks.mini"


def experiment(name: str) -> ModuleType:
    """Imports a module of the repository's ``benchmarks/suites``, by its name there.

    It and ``benchmarks/mini`` become importable under those names alone: other packages named ``benchmarks`` are
    neither hidden nor taken for it.

    Raises:
        UnavailableError: the package runs from no checkout.
    """
    for package in (_EXPERIMENTS, _TRAINING):
        if package not in sys.modules:
            folder = ROOT.joinpath(*package.split("."))
            spec = importlib.util.spec_from_file_location(package, folder / "__init__.py")
            if spec is None or spec.loader is None or not folder.is_dir():
                raise UnavailableError(
                    "experiments are in the folder benchmarks/suites of the repository, and the package does not run "
                    "from a checkout of it (pip install -e .)"
                )
            sys.modules[package] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{_EXPERIMENTS}.{name}")
