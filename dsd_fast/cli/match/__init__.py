"""``dsd-fast match``: every image against every caption."""
