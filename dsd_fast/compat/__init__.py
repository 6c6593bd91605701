"""The official entry points, with their own names and arguments, on this package's engine."""

from dsd_fast.compat.class_tokens import RunConfig, run
from dsd_fast.compat.feature_extractor import FeatureExtractor
from dsd_fast.compat.image_prompt import Image2TextEmbedder, InferenceConfig, infer
from dsd_fast.compat.pipeline import DSDPipeline

__all__ = ["DSDPipeline", "FeatureExtractor", "Image2TextEmbedder", "InferenceConfig", "RunConfig", "infer", "run"]
