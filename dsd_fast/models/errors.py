"""The one error of everything that names, holds or becomes a model."""


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message names what was given and what was expected."""


def first_line(error: BaseException) -> str:
    """Give the first line of what an error of another library says; only that is for a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
