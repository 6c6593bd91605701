"""Image–text matching by diffusion models (DSD)."""

from dsd_fast.matching.batches import ScoreBatch
from dsd_fast.matching.config import MatchConfig
from dsd_fast.matching.datasets import official_split, read_groups
from dsd_fast.matching.evaluation import Evaluation, evaluate
from dsd_fast.matching.export import score_to
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.groups import Group
from dsd_fast.matching.layers import official_layers
from dsd_fast.matching.matcher import Matcher
from dsd_fast.training import FitHistory, FitRecord

__all__ = [
    "Evaluation",
    "FitConfig",
    "FitHistory",
    "FitRecord",
    "Group",
    "MatchConfig",
    "Matcher",
    "ScoreBatch",
    "evaluate",
    "official_layers",
    "official_split",
    "read_groups",
    "score_to",
]
