"""Who did what, when."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsd_fast.jobs.files import replacing

_RESOLUTION = 0.001


class Timeline:
    """Spans of time in seconds from its making, collected from any thread.

    Spans of one name that follow each other within a millisecond are kept as one, so that a long run stays small.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._spans: dict[str, list[list[float]]] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """The time inside the block, also when it raises; spans of one name come from one thread."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, start - self._start, time.perf_counter() - self._start)

    def add(self, name: str, start: float, end: float) -> None:
        """A span that begins no earlier than those of its name before."""
        spans = self._spans.setdefault(name, [])
        if spans and start - spans[-1][1] < _RESOLUTION:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])

    @property
    def spans(self) -> list[tuple[str, float, float]]:
        """(name, start, end), by start."""
        found = [(name, start, end) for name, spans in list(self._spans.items()) for start, end in list(spans)]
        return sorted(found, key=lambda span: span[1])

    def seconds(self, name: str) -> float:
        """In all spans of the name, and of "<name>-0", "<name>-1", …, as threads that do the same are called."""
        return sum(end - start for spans in self._lanes(name) for start, end in spans)

    def overlap(self, name: str, during: str) -> float:
        """What share of :meth:`seconds` of ``name`` lies inside spans of ``during``; 0 where there is no time."""
        total, shared = self.seconds(name), 0.0
        others = self._spans.get(during, [])
        for spans in self._lanes(name):
            first = 0
            for start, end in spans:
                while first < len(others) and others[first][1] <= start:
                    first += 1
                for other in range(first, len(others)):
                    if others[other][0] >= end:
                        break
                    shared += min(end, others[other][1]) - max(start, others[other][0])
        return shared / total if total else 0.0

    def _lanes(self, name: str) -> list[list[list[float]]]:
        spans = list(self._spans.items())
        return [found for each, found in spans if each == name or re.fullmatch(rf"{re.escape(name)}-\d+", each)]

    def save(self, file: Path) -> None:
        """Writes {"unit": "seconds", "spans": [{"name", "start", "end"}, …]}.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        spans = [{"name": name, "start": round(start, 6), "end": round(end, 6)} for name, start, end in self.spans]
        with replacing(file) as stream:
            stream.write(json.dumps({"unit": "seconds", "spans": spans}).encode() + b"\n")
