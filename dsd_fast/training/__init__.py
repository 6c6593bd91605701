"""Training that can be killed at any moment and goes on as if it had not been."""

from dsd_fast.training.loop import CHECKPOINT, Loop, seed_of, seeded

__all__ = ["CHECKPOINT", "Loop", "seed_of", "seeded"]
