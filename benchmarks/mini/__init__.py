"""The training of the mini model."""
