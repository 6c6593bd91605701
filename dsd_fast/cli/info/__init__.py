"""``dsd-fast info``: what a model is made of, and what asking it costs."""
