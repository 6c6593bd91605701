"""``dsd-fast fit``: adapts the score to the groups of a data set."""
