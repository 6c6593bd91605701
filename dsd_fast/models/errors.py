"""The one error of everything that names, holds or becomes a model."""

_LONGEST = 1000


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message names what was given and what was expected."""


def reason(error: BaseException) -> str:
    """Give what an error of another library says as one line, of at most 1000 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
