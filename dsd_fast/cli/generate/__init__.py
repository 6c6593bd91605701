"""``dsd-fast generate``: images from texts, as files."""
