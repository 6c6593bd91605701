"""Image–text matching by diffusion models (DSD)."""

from dsd_fast.matching.config import MatchConfig
from dsd_fast.matching.datasets import official_split, read_groups
from dsd_fast.matching.groups import Group
from dsd_fast.matching.layers import official_layers
from dsd_fast.matching.matcher import Matcher

__all__ = ["Group", "MatchConfig", "Matcher", "official_layers", "official_split", "read_groups"]
