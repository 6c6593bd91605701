"""Figures of merit and how sure they are."""

from dsd_fast.metrics.intervals import wilson

__all__ = ["wilson"]
