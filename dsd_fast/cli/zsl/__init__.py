"""``dsd-fast zsl``: zero-shot learning by class tokens."""
