"""Captions from options or a file, and the check that the model can read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsd_fast.cli.match.options import MatchRequest
from dsd_fast.cli.terminal import CommandError
from dsd_fast.jobs import storable

if TYPE_CHECKING:
    from dsd_fast.models import Model


def captions_of(request: MatchRequest) -> list[str]:
    """Gives the captions that the options stand for.

    Raises:
        CommandError: not one of the two options, or text that is not UTF-8.
        ValueError: see :func:`read_captions`.
    """
    file, texts = request.captions, request.caption or []
    if (file is None) == (not texts):
        raise CommandError("give either --captions FILE or --caption TEXT, one or more times")
    if file is not None:
        return read_captions(file)
    for number, text in enumerate(texts, start=1):
        # Bytes that are no UTF-8 arrive as lone surrogates.
        if storable(text) != text:
            raise CommandError(f"--caption number {number} ({text!r}) is not UTF-8 text")
    return texts


def read_captions(file: Path) -> list[str]:
    """Reads the lines of a UTF-8 text file without the blank ones, white space around them removed.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or has no captions.
    """
    try:
        # utf-8-sig drops a byte order mark; the default newline handling takes LF, CRLF and CR.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--captions {file} is not UTF-8 text: byte {error.start} is wrong") from error
    except OSError as error:
        raise ValueError(f"--captions {file} cannot be read: {error.strerror}") from error
    # Not splitlines(), which also cuts at form feeds and at Unicode's line and paragraph separators.
    captions = [line.strip() for line in text.split("\n")]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise ValueError(f"--captions {file} has no captions, expected one per line")
    return captions


def check_lengths(model: Model, captions: Sequence[str]) -> None:
    """Refuses captions that the model's text encoders cannot hold.

    Raises:
        ValueError: the first that is too long.
    """
    from dsd_fast.models.prompts import token_limit

    limit = token_limit(model.tokenizers, model.text_encoders)
    for tokenizer in model.tokenizers:
        for number, ids in enumerate(tokenizer(list(captions), verbose=False)["input_ids"], start=1):
            if len(ids) > limit:
                start = captions[number - 1][:40]
                raise ValueError(
                    f"caption {number} ({start!r}…) has {len(ids)} tokens, expected at most {limit}, "
                    "the begin and end tokens included"
                )
