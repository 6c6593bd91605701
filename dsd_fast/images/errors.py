"""The one error every unreadable image raises."""

from pathlib import Path


class ImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        source: the path, or a few words on an image given as an object (the object itself is not kept alive).
        reason: one of

            ================== =============================================================
            missing            no such file
            is-directory       a folder
            not-a-file         a pipe, a socket or a device
            unreadable         the system refuses to read it (permission, I/O error)
            empty              no bytes, or no pixels
            unsupported-format its content is not JPEG, PNG or WebP
            too-large          more pixels than the limit, by its header, or more bytes
            truncated          it ends early
            corrupt            its header, checksums or pixel stream are wrong
            unsupported-type   an object of a type, shape, dtype, mode or range not accepted
            ================== =============================================================
    """

    def __init__(self, source: Path | str, reason: str, message: str) -> None:
        # All three are arguments, so that the error survives the way back from a worker process.
        super().__init__(source, reason, message)
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[2])
