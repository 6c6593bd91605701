"""UNet activations as features, kept true to the image."""

from dsd_fast.features.amalgamation import Amalgamation
from dsd_fast.features.attention import AttentionTap
from dsd_fast.features.batches import ExtractBatch
from dsd_fast.features.config import FeatureConfig
from dsd_fast.features.export import extract_to
from dsd_fast.features.extraction import Extracted
from dsd_fast.features.extractor import FeatureExtractor
from dsd_fast.features.layers import SETS, layer_set
from dsd_fast.features.pca import PCA, Moments
from dsd_fast.features.technique import Technique
from dsd_fast.jobs import Exported

__all__ = [
    "PCA",
    "SETS",
    "Amalgamation",
    "AttentionTap",
    "Exported",
    "ExtractBatch",
    "Extracted",
    "FeatureConfig",
    "FeatureExtractor",
    "Moments",
    "Technique",
    "extract_to",
    "layer_set",
]
