"""The benchmark harness: cases, timers, records, comparisons, tables and plots.

A suite (:mod:`dsd_fast.bench.suites`) lists cases. A :class:`Case` measures ways of doing one job against each other,
interleaved in one process, after each has been checked against an oracle; a :class:`Quality` makes figures of merit.
Every run appends records to ``benchmarks/results/``, from which the tables and plots of the documents are made.
"""

from dsd_fast.bench.case import Case, Context, Figure, Group, Quality, Side, Suite, Target, UnavailableError, Work

__all__ = [
    "Case",
    "Context",
    "Figure",
    "Group",
    "Quality",
    "Side",
    "Suite",
    "Target",
    "UnavailableError",
    "Work",
]
