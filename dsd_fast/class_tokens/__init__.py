"""Class tokens: a word for each class, learned by gradient through the images that it makes."""

from dsd_fast.class_tokens.config import TokenConfig
from dsd_fast.class_tokens.learner import ClassTokenLearner
from dsd_fast.class_tokens.progress import ClassHistory, TokenUpdate

__all__ = ["ClassHistory", "ClassTokenLearner", "TokenConfig", "TokenUpdate"]
