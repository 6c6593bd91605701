"""Images of a class that nearly repeat another one, by the cosine of their CLIP vectors."""

from __future__ import annotations

import itertools

import numpy as np

# Of the products that are in memory at once: 2048² float32 are 16 MiB.
_BLOCK = 2048


def near_duplicates(
    rows: np.ndarray, vectors: np.ndarray, classes: np.ndarray, threshold: float
) -> list[tuple[str, str, float]]:
    """Name each row that is nearly an earlier one of its class; without all of them no two near rows are left.

    Rows are ordered by id, so that neither workers nor the order in which they were made count. A class of n rows with
    vectors of d values costs about n² · d floating-point operations: 10^6 rows in 1000 classes with d = 768 are
    8·10^11, in one class 8·10^14. Memory beside the vectors is that of a block.

    Args:
        rows: (N,) ids, S32.
        vectors: (N, d) float16, of any length above 0; rows that are not finite are near none.
        classes: (N,) integers; rows are compared with those of the same one.
        threshold: cosine from which on two rows are near.

    Returns:
        (id, the earlier row's id that is nearest to it, their cosine), by id.
    """
    order = np.lexsort((rows, classes))
    bounds = [0, *(np.flatnonzero(np.diff(classes[order])) + 1), len(order)]
    marks: list[tuple[str, str, float]] = []
    for start, end in itertools.pairwise(bounds):
        members = order[start:end]
        for first in range(0, len(members), _BLOCK):
            here = _directions(vectors[members[first : first + _BLOCK]])
            best = np.full(len(here), -np.inf, np.float32)
            nearest = np.zeros(len(here), np.int64)
            for other in range(0, first + 1, _BLOCK):
                cosines = here @ _directions(vectors[members[other : other + _BLOCK]]).T  # (rows here, rows there)
                if other == first:
                    cosines[np.triu_indices(len(here))] = -np.inf
                position = cosines.argmax(axis=1)
                cosine = np.take_along_axis(cosines, position[:, None], axis=1)[:, 0]
                nearest = np.where(cosine > best, position + other, nearest)
                best = np.maximum(best, cosine)
            for row in np.flatnonzero(best >= threshold):
                pair = rows[members[first + row]], rows[members[nearest[row]]]
                marks.append((pair[0].decode(), pair[1].decode(), float(best[row])))
    return sorted(marks)


def _directions(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1 in float32; zeros for what has no direction."""
    values = vectors.astype(np.float32)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    usable = np.isfinite(lengths) & (lengths > 0)
    return np.where(usable, values / np.where(usable, lengths, 1), 0).astype(np.float32)
