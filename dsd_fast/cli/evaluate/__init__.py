"""``dsd-fast evaluate``: how often the right candidate of each group of a data set wins."""
