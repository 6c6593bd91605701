"""A matching run: images through a Matcher into scores.parquet, results.json, heat maps and report.html."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dsd_fast.cli.captions import check_lengths
from dsd_fast.cli.files import replacing, writing
from dsd_fast.cli.match_report import MatchReport
from dsd_fast.cli.results import ScoreFile, ranked, settings_of, versions, write_json
from dsd_fast.cli.terminal import Interrupt, progress, storable
from dsd_fast.images import ImageError
from dsd_fast.matching import MatchConfig, Matcher

if TYPE_CHECKING:
    from dsd_fast.models import Model


def run(
    load: Callable[[], Model],
    config: MatchConfig,
    images: Sequence[Path],
    captions: Sequence[str],
    out: Path,
    top_k: int,
    settings: Mapping[str, Any],
    heatmaps: int = 0,
    report: bool = False,
) -> dict[str, Any]:
    """Scores every image with every caption; Ctrl-C ends it early, with what has been scored.

    Args:
        load: gives the model; called once the folder is known to be writable.
        out: folder of the results, made if missing.
        top_k: captions per image in results.json.
        settings: what results.json says besides the model's and the configuration's settings.
        heatmaps: of how many of each image's best captions heat maps are written, at most `top_k`.
        report: whether report.html is written; `heatmaps` implies it.

    Returns:
        The content of results.json.

    Raises:
        CommandError: `out` cannot be written.
        ValueError: settings, captions or a memory budget that do not fit the model.
    """
    # results.json opens first, so that it takes its name last: it vouches for the scores.
    with (
        Interrupt() as interrupt,
        writing(out),
        replacing(out / "results.json") as results,
        replacing(out / "scores.parquet") as table,
        ExitStack() as stack,
    ):
        page = stack.enter_context(replacing(out / "report.html")) if report or heatmaps else None
        model = load()
        check_lengths(model, captions)
        matcher = Matcher(model, config)
        settings = {**settings_of(matcher), **settings, "top_k": top_k, "heatmaps": heatmaps}
        metadata = {
            "model": model.name,
            "revision": model.revision or "",
            "config": json.dumps(settings),
            "versions": json.dumps(versions()),
        }
        gallery = None if page is None else MatchReport(out, matcher, heatmaps)
        start = time.perf_counter()
        with ScoreFile(table, metadata) as scores:
            entries = _score(matcher, images, captions, scores, top_k, interrupt, gallery)
            complete = len(entries) == len(images)
            scores.close(complete)
        summary = {
            "command": "match",
            "complete": complete,
            "settings": settings,
            "versions": versions(),
            "counts": _counts(entries, len(images), len(captions)),
            "seconds": time.perf_counter() - start,
            "captions": list(captions),
            "images": entries,
        }
        if page is not None and gallery is not None:
            page.write(gallery.page(summary))
        write_json(results, summary)
    return summary


def _score(
    matcher: Matcher,
    images: Sequence[Path],
    captions: Sequence[str],
    file: ScoreFile,
    top_k: int,
    interrupt: Interrupt,
    gallery: MatchReport | None,
) -> list[dict[str, Any]]:
    """One entry per image, in order, the scores into the file, and the images to the report."""
    entries: list[dict[str, Any]] = []
    column = pa.array(captions, pa.string())
    pairs = 0
    with progress("pairs") as display:
        task = display.add_task("matching", total=len(images), units=0)
        for index, result in interrupt.until(matcher.score_iter(images, captions)):
            path = storable(str(images[index]))
            if isinstance(result, ImageError):
                entries.append(_error(path, result.reason, str(result)))
            elif bad := int((~result.isfinite()).sum()):
                message = f"{path} has {bad} scores that are no finite numbers, which --dtype float32 may avoid"
                entries.append(_error(path, "not-finite", message))
            else:
                values = result.numpy()
                order = file.add(index, path, column, values)
                rows = ranked(order, captions, values, top_k)
                if gallery is not None:
                    gallery.add(index, images[index], path, rows, float(values.min()), float(values.max()))
                entries.append({"path": path, "ranked": rows})
                pairs += len(captions)
            display.update(task, advance=1, units=pairs)
    return entries


def _error(path: str, reason: str, message: str) -> dict[str, Any]:
    return {"path": path, "error": {"reason": reason, "message": storable(message)}}


def _counts(entries: Sequence[Mapping[str, Any]], images: int, captions: int) -> dict[str, int]:
    errors = sum("error" in entry for entry in entries)
    return {
        "images": images,
        "captions": captions,
        "scored": len(entries) - errors,
        "errors": errors,
        "not_reached": images - len(entries),
    }
