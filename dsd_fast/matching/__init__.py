"""Image–text matching by diffusion models (DSD)."""

from dsd_fast.matching.config import MatchConfig
from dsd_fast.matching.layers import official_layers
from dsd_fast.matching.matcher import Matcher

__all__ = ["MatchConfig", "Matcher", "official_layers"]
