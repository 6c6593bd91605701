"""``dsd-fast prompt``: makes prompts of images, and tunes a model to them."""
