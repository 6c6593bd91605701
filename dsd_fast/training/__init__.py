"""Training that can be killed at any moment and goes on as if it had not been."""

from dsd_fast.training.descent import Descent, FitHistory, FitRecord, Report
from dsd_fast.training.loop import CHECKPOINT, Loop, as_json, seed_of, seeded
from dsd_fast.training.progress import reporting

__all__ = [
    "CHECKPOINT",
    "Descent",
    "FitHistory",
    "FitRecord",
    "Loop",
    "Report",
    "as_json",
    "reporting",
    "seed_of",
    "seeded",
]
