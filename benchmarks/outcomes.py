"""A plugin of pytest: how each test ended, a line as it ends, so that a run that is cut has told what it found.

python -m pytest -p benchmarks.outcomes --outcomes FILE
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    """The file of the lines."""
    parser.addoption("--outcomes", type=Path, help="append a line of JSON for each test that ends")


def pytest_configure(config: Any) -> None:
    """Only where all reports come together: the workers of pytest-xdist tell the process that started them."""
    if config.option.outcomes is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Lines(config.option.outcomes))


class _Lines:
    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A test has passed once it was called; it fails, or is skipped, in any of its phases.
        if not (report.when == "call" or report.outcome != "passed"):
            return
        self._tell(report.nodeid, report.outcome, report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._tell(report.nodeid, report.outcome, report)

    def _tell(self, test: str, outcome: str, report: Any) -> None:
        why = getattr(getattr(report.longrepr, "reprcrash", None), "message", None)
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            why = report.longrepr[2]
        line = {"test": test, "outcome": outcome, "why": (why or "").partition("\n")[0]}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
