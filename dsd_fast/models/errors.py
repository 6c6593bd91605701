"""The one error of everything that names, holds or becomes a model."""


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message names what was given and what was expected."""
