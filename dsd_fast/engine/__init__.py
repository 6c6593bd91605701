"""What stands between any method and the network: sizes, budgets, adapters, texts, latents, rows."""

from dsd_fast.engine.encoding import Prompt
from dsd_fast.engine.engine import Engine
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.engine.latents import Noised, draw_noise, noised
from dsd_fast.engine.texts import Texts
from dsd_fast.engine.tokens import LearnedTokens

__all__ = ["Engine", "ImagePrompt", "LearnedTokens", "Noised", "Prompt", "Texts", "draw_noise", "noised"]
