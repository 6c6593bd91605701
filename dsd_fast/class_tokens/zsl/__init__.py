"""Zero-shot learning by class tokens (Fu et al. 2024, "DIG-ZSL"): a whole run, from a data set to figures."""

from dsd_fast.class_tokens.zsl.config import ZslConfig
from dsd_fast.class_tokens.zsl.data import ZslData, read_folders
from dsd_fast.class_tokens.zsl.proposed import read_proposed
from dsd_fast.class_tokens.zsl.run import run_zsl

__all__ = ["ZslConfig", "ZslData", "read_folders", "read_proposed", "run_zsl"]
