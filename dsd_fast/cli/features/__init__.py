"""``dsd-fast features``: what the network makes of images, as files."""
