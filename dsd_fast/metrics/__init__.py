"""Figures of merit and how sure they are.

Names that need numpy load on first use: the command line imports this room when it starts.
"""

from typing import TYPE_CHECKING

from dsd_fast.metrics.intervals import bootstrap, wilson

__all__ = [
    "Winoground",
    "bootstrap",
    "mean_reciprocal_rank",
    "median_rank",
    "ranks",
    "recall_at",
    "wilson",
    "winoground",
]

if TYPE_CHECKING:
    from dsd_fast.metrics.retrieval import Winoground, mean_reciprocal_rank, median_rank, ranks, recall_at, winoground
else:
    # Hidden from type checkers, for which a module with __getattr__ has every name.
    def __getattr__(name: str) -> object:
        if name in __all__:
            from dsd_fast.metrics import retrieval

            return getattr(retrieval, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
