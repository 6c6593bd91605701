"""Data sets of groups: the official files of DSD, Winoground, and plain tables."""

from dsd_fast.matching.datasets.reading import FORMATS, read_groups
from dsd_fast.matching.datasets.splits import official_split

__all__ = ["FORMATS", "official_split", "read_groups"]
