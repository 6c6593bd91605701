"""``dsd-fast demo``: the mini model tells true captions from nearly true ones, beside the reference."""
