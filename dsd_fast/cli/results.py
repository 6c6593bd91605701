"""The files a command leaves: scores.parquet, a row per image and caption, and results.json."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from textwrap import indent
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dsd_fast import __version__
from dsd_fast.jobs import storable

if TYPE_CHECKING:
    from dsd_fast.matching import Matcher

# Rows held until they are written as one row group.
_GROUP_ROWS = 1 << 16


class ScoreFile:
    """Scores to a Parquet file, a row group at a time, so that memory does not grow with the number of images.

    Columns: image_index, image, caption_index, caption, score (float32), rank (1 is the best of its image), and
    `extra`.

    Args:
        file: opened for writing; it is not closed.
        metadata: of the schema, by :func:`metadata`.
        extra: further columns by name.
    """

    def __init__(
        self, file: BinaryIO, metadata: Mapping[str, str], extra: Mapping[str, pa.DataType] | None = None
    ) -> None:
        self.schema = pa.schema(
            [
                ("image_index", pa.int32()),
                ("image", pa.string()),
                ("caption_index", pa.int32()),
                ("caption", pa.string()),
                ("score", pa.float32()),
                ("rank", pa.int32()),
                *(extra or {}).items(),
            ],
            metadata=metadata,
        )
        self._writer = pq.ParquetWriter(file, self.schema)
        self._batches: list[pa.RecordBatch] = []
        self._rows = 0

    def add(
        self,
        image_index: int,
        image: str,
        captions: pa.Array,
        scores: NDArray[np.float32],
        **extra: Any,
    ) -> NDArray[np.intp]:
        """Adds an image with its captions; returns the captions' positions, best first, equal scores in their order."""
        count = len(captions)
        order = np.argsort(-scores, kind="stable")
        rank = np.empty(count, np.int32)
        rank[order] = np.arange(1, count + 1, dtype=np.int32)
        columns = {
            "image_index": pa.repeat(pa.scalar(image_index, pa.int32()), count),
            "image": pa.repeat(image, count),
            "caption_index": np.arange(count, dtype=np.int32),
            "caption": captions,
            "score": scores,
            "rank": rank,
            **extra,
        }
        arrays = [pa.array(columns[field.name], field.type) for field in self.schema]
        self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        self._rows += count
        if self._rows >= _GROUP_ROWS:
            self._flush()
        return order

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Left open, the writer would try again when it is collected, on a file that is closed by then.
        with contextlib.suppress(OSError, ValueError):
            self._writer.close()

    def close(self, complete: bool) -> None:
        """Writes what is left, and whether that is all, as "dsd_fast.complete" in the file's metadata."""
        self._flush()
        self._writer.add_key_value_metadata({"dsd_fast.complete": str(complete).lower()})
        self._writer.close()

    def _flush(self) -> None:
        if self._batches:
            self._writer.write_table(pa.Table.from_batches(self._batches))
            self._batches, self._rows = [], 0


def ranked(
    order: NDArray[np.intp], captions: Sequence[str], scores: NDArray[np.float32], top_k: int
) -> list[dict[str, Any]]:
    """Lists the first `top_k` captions of an image, best first, for results.json."""
    return [
        {"caption_index": int(i), "caption": captions[i], "score": float(scores[i])} for i in order[:top_k].tolist()
    ]


def settings_of(matcher: Matcher) -> dict[str, Any]:
    """Tells everything that the scores depend on, with what the configuration leaves to the model filled in."""
    model, config = matcher.model, matcher.config
    return {
        "model": model.name,
        "revision": model.revision,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        **asdict(config),
        "timesteps": matcher.timesteps[:: config.draws],
        "layers": {name: weights.tolist() for name, weights in matcher.layers.items()},
        "image_size": list(config.image_size or model.image_size),
    }


def metadata(settings: Mapping[str, Any], **more: str) -> dict[str, str]:
    """Tells a Parquet file's schema what its scores depend on; all keys start with "dsd_fast."."""
    about = {
        "model": settings["model"],
        "revision": settings["revision"] or "",
        "config": json.dumps(settings),
        "versions": json.dumps(versions()),
        **more,
    }
    return {f"dsd_fast.{key}": value for key, value in about.items()}


def versions() -> dict[str, str]:
    """Tells the versions of what computes the scores."""
    import diffusers
    import torch
    import transformers

    return {
        "dsd_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def write_json(file: BinaryIO, content: Mapping[str, Any]) -> None:
    """Writes indented UTF-8 JSON; bytes of a path that are none are JSON's own escapes."""
    file.write(storable(_json(content)).encode() + b"\n")
    file.flush()


def stream_json(
    file: BinaryIO,
    head: Mapping[str, Any],
    name: str,
    items: Iterable[Mapping[str, Any]],
    end: Callable[[], Mapping[str, Any]],
) -> Mapping[str, Any]:
    """Writes what :func:`write_json` writes of {**head, name: [*items], **end()}, with one item at a time in memory.

    Returns:
        What `end` gave, which is called after the last item and has at least one entry.
    """
    file.write(storable(_json(head).removesuffix("\n}") + f",\n  {json.dumps(name)}: [").encode())
    between = "\n"
    for item in items:
        file.write(storable(between + indent(_json(item), "    ")).encode())
        between = ",\n"
    tail = end()
    file.write(storable(("],\n" if between == "\n" else "\n  ],\n") + _json(tail).removeprefix("{\n") + "\n").encode())
    file.flush()
    return tail


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
