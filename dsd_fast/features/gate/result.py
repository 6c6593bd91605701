"""What the gate found: a ranked table, agreement of its two parts, and the files of it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsd_fast.features.gate.guide import GuideResult
from dsd_fast.features.gate.sheet import contact_sheet
from dsd_fast.features.shift_result import Floats, ShiftResult
from dsd_fast.jobs import replacing, storable
from dsd_fast.metrics import bootstrap

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class GateResult:
    """The gate's two parts, over the same N images and K techniques, the baseline first.

    Attributes:
        shift: content shift, the quantitative part.
        guide: img2img, the qualitative part; None if it was left out.
        settings: what was asked for, as JSON.
    """

    shift: ShiftResult
    guide: GuideResult | None
    settings: dict[str, Any]

    def rows(self, confidence: float = 0.95) -> list[dict[str, Any]]:
        """A row for each technique but the baseline, the largest gain in score first.

        "technique"; "score", the mean over layers, timesteps and images; "score_gain" over the baseline with "_low" and
        "_high", its bootstrap interval over images; for each space of the guide "vae_gain" and "clip_gain" with theirs
        (:meth:`GuideResult.gains`); "accepted" by the guide (:meth:`GuideResult.accepted`), None where it cannot tell
        or is left out; and "take": whether the score gains by its interval and the guide does not reject.
        """
        means = self.shift.scores.mean((1, 2))
        gains = means - means[:1]
        low, high = bootstrap(gains.T, lambda drawn: drawn.mean(0), confidence=confidence)
        rows = []
        accepted = [None] * len(means) if self.guide is None else self.guide.accepted(confidence)
        closer = None if self.guide is None else self.guide.gains(confidence)
        for k, technique in enumerate(self.shift.techniques):
            row: dict[str, Any] = {
                "technique": technique,
                "score": float(means[k].mean()),
                "score_gain": float(gains[k].mean()),
                "score_gain_low": float(low[k]),
                "score_gain_high": float(high[k]),
            }
            if self.guide is not None and closer is not None:
                for s, space in enumerate(self.guide.spaces):
                    values = (float(each[k, s]) for each in closer)
                    row |= dict(zip((f"{space}_gain", f"{space}_gain_low", f"{space}_gain_high"), values, strict=True))
            row["accepted"] = accepted[k]
            row["take"] = bool(low[k] > 0) and accepted[k] is not False
            rows.append(row)
        return sorted(rows[1:], key=lambda row: -row["score_gain"])

    def agreement(self) -> dict[str, float | None]:
        """Spearman's rank correlation between gains in score and gains of the guide, over techniques, for each space.

        The baseline counts, techniques that the guide cannot tell from it do not. None where fewer than three are left,
        or where all gains are equal.
        """
        if self.guide is None:
            return {}
        means = self.shift.scores.mean((1, 2, 3))
        kept = [k for k, same in enumerate(self.guide.unchanged) if k == 0 or not same]
        gains = self.guide.gains()[0]
        return {space: _spearman(means[kept], gains[kept, s]) for s, space in enumerate(self.guide.spaces)}

    def table(self) -> Table:
        """The rows as a rich table."""
        from rich.table import Table
        from rich.text import Text

        spaces = () if self.guide is None else self.guide.spaces
        table = Table("technique", "score", "gain", *(f"closer, {space}" for space in spaces), "guide", "take")
        for row in self.rows():
            told = {True: "accepts", False: "rejects", None: "cannot tell"}[row["accepted"]]
            cells = [row["technique"], f"{row['score']:.3f}", _interval(row, "score_gain", "+.3f")]
            cells += [_interval(row, f"{space}_gain", "+.1%") for space in spaces]
            cells += [told if self.guide is not None else "left out", "yes" if row["take"] else "no"]
            # Text, not markup: a name may have brackets.
            table.add_row(*map(Text, cells))
        return table

    def sheet(self) -> Image.Image | None:
        """The contact sheet of the first images, their distances below; None without the guide or pictures."""
        guide = self.guide
        if guide is None or not guide.inputs:
            return None
        chosen = [k for k, same in enumerate(guide.unchanged) if k == 0 or not same]
        columns: list[tuple[str, Sequence[Image.Image]]] = [("input", guide.inputs)]
        columns += [(guide.techniques[k], guide.outputs[k]) for k in chosen]
        captions = [[""] * len(guide.inputs)]
        for k in chosen:
            captions.append([_distances(guide, k, n) for n in range(len(guide.inputs))])
        return contact_sheet(columns, captions)

    def save(self, folder: Path | str) -> list[Path]:
        """Writes the files, each whole or not at all; those that are there are replaced.

        gate.json (settings, rows, agreement), ranking.csv, scores.parquet (a row for each technique, layer, timestep
        and image), with the guide distances.parquet (technique and image) and contact-sheet.png, and scores.png, which
        is left out where matplotlib is missing.

        Returns:
            The files.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"gate.json": self._json(), "ranking.csv": self._csv(), "scores.parquet": self._scores()}
        if self.guide is not None:
            files["distances.parquet"] = self._distances(self.guide)
        sheet = self.sheet()
        if sheet is not None:
            out = io.BytesIO()
            sheet.save(out, "PNG")
            files["contact-sheet.png"] = out.getvalue()
        with contextlib.suppress(ImportError):
            files["scores.png"] = self.shift.picture()
        for name, content in files.items():
            with replacing(folder / name) as file:
                file.write(content)
        return [folder / name for name in files]

    def _json(self) -> bytes:
        content = {
            "settings": self.settings,
            "images": self.shift.diffs.shape[-1],
            "techniques": self.rows(),
            "agreement": self.agreement(),
        }
        # JSON has no NaN.
        content = json.loads(json.dumps(content), parse_constant=lambda _: None)
        return storable(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    def _csv(self) -> bytes:
        rows = self.rows()
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]) if rows else ["technique"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()

    def _scores(self) -> bytes:
        shift = self.shift
        k, i, s, n = (each.ravel() for each in np.indices(shift.diffs.shape))
        columns = {
            "technique": np.asarray(shift.techniques, object)[k],
            "layer": np.asarray(shift.layers, object)[i],
            "timestep": np.asarray(shift.timesteps)[s],
            "image": n.astype(np.int32),
            "diff": shift.diffs.ravel(),
            "score": shift.scores.ravel(),
        }
        return _parquet(columns)

    def _distances(self, guide: GuideResult) -> bytes:
        k, n = (each.ravel() for each in np.indices((len(guide.techniques), guide.distances.shape[-1])))
        columns = {"technique": np.asarray(guide.techniques, object)[k], "image": n.astype(np.int32)}
        return _parquet(columns | {space: guide.distances[:, s].ravel() for s, space in enumerate(guide.spaces)})


def _parquet(columns: dict[str, NDArray[Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def _spearman(a: Floats, b: Floats) -> float | None:
    if len(a) < 3 or not np.isfinite([a, b]).all() or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Floats) -> Floats:
    """Ranks, the mean of them where values are equal."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def _interval(row: dict[str, Any], key: str, form: str) -> str:
    return f"{row[key]:{form}} [{row[f'{key}_low']:{form}}, {row[f'{key}_high']:{form}}]"


def _distances(guide: GuideResult, k: int, n: int) -> str:
    return ", ".join(f"{space} {guide.distances[k, s, n]:.2f}" for s, space in enumerate(guide.spaces))
