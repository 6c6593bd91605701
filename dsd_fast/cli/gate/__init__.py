"""``dsd-fast gate``: which techniques keep features true to the images."""
