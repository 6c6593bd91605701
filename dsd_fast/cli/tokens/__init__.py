"""``dsd-fast tokens``: learns class tokens, shows what was learned, and exports it for other programs."""
