"""A run of zero-shot learning, with its progress, into report.html."""

from __future__ import annotations

from typing import Any

from dsd_fast.class_tokens.zsl import ZslConfig, run_zsl
from dsd_fast.cli.files import check_folder, writing
from dsd_fast.cli.options import exact_products, quiet_transformers
from dsd_fast.cli.results import versions
from dsd_fast.cli.terminal import CommandError, progress
from dsd_fast.cli.zsl.report import render
from dsd_fast.jobs import JobError, replacing


def run(config: ZslConfig) -> dict[str, Any]:
    """Does all stages that are not done, and writes the page.

    Raises:
        CommandError: the folder cannot be written, or has other results; a package that is not installed.
        ValueError: data or settings that do not fit.
        KeyboardInterrupt: after Ctrl-C.
    """
    check_folder(config.out)
    quiet_transformers()
    exact_products()
    stages: dict[str, Any] = {}
    with writing(config.out), progress("items") as display:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = display.add_task(stage, total=total, units=0)
            display.update(stages[stage], completed=done, units=done)

        try:
            results = run_zsl(config, report=report)
        except (JobError, ImportError) as error:
            raise CommandError(str(error)) from error
        with replacing(config.out / "report.html") as file:
            file.write(render({**results, "versions": versions()}, config.out))
    return results
