"""Class tokens: a word for each class, learned by gradient through the images that it makes."""

from dsd_fast.class_tokens.config import TokenConfig

__all__ = ["TokenConfig"]
