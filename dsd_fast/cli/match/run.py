"""A matching run: images through a Matcher into scores.parquet, results.json, heat maps and report.html."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from dsd_fast.cli.files import removing, replacing_files, writing
from dsd_fast.cli.heatmaps import FOLDER, NAMES
from dsd_fast.cli.match.captions import check_lengths
from dsd_fast.cli.match.options import MatchRequest
from dsd_fast.cli.match.report import MatchReport
from dsd_fast.cli.results import ScoreFile, metadata, ranked, settings_of, versions, write_json
from dsd_fast.cli.terminal import CommandError, Interrupt, progress
from dsd_fast.images import ImageError
from dsd_fast.jobs import replacing, storable
from dsd_fast.matching import MatchConfig, Matcher


def run(request: MatchRequest, captions: Sequence[str], config: MatchConfig) -> dict[str, Any]:
    """Scores every image with every caption; Ctrl-C ends it early, with what has been scored.

    When the results take their names, report.html and heat maps of an earlier run that are not among them are removed.
    The model is loaded once the folder is known to be writable.

    Returns:
        The content of results.json.

    Raises:
        CommandError: `out` cannot be written, or captions or a memory budget allow no heat maps.
        ValueError: settings, captions, a runtime or a memory budget that do not fit the model.
    """
    images, out, heatmaps = request.images, request.out, request.heatmaps
    request.source.check()
    request.memory.check(request.source.device)
    # results.json opens first, so that it takes its name last: it vouches for the scores.
    with (
        Interrupt() as interrupt,
        writing(out),
        # What an earlier run has left goes after that, since its own results.json names it.
        ExitStack() as afterwards,
        replacing(out / "results.json") as results,
        replacing(out / "scores.parquet") as table,
        ExitStack() as stack,
    ):
        page, folder = None, out / FOLDER
        if heatmaps or folder.is_dir():
            folder = afterwards.enter_context(replacing_files(folder, NAMES))
        if request.report or heatmaps:
            page = stack.enter_context(replacing(out / "report.html"))
        else:
            afterwards.enter_context(removing(out / "report.html"))
        model = request.source.load()
        check_lengths(model, captions)
        matcher = request.memory.compiled(Matcher(model, config))
        if heatmaps:
            _check_heatmaps(matcher, captions)
        settings = {
            **settings_of(matcher),
            "adapter": request.source.adapter,
            "top_k": request.top_k,
            "heatmaps": heatmaps,
        }
        gallery = None if page is None else MatchReport(folder, matcher, heatmaps)
        with ScoreFile(table, metadata(settings)) as scores:
            entries, scoring, drawing = _score(matcher, images, captions, scores, request.top_k, interrupt, gallery)
            complete = len(entries) == len(images)
            scores.close(complete)
        summary = {
            "command": "match",
            "complete": complete,
            "settings": settings,
            "versions": versions(),
            "counts": _counts(entries, len(images), len(captions)),
            "seconds": scoring,
            "heatmap_seconds": drawing if heatmaps else 0.0,
            "captions": list(captions),
            "images": entries,
        }
        if page is not None and gallery is not None:
            page.write(gallery.page(summary))
        write_json(results, summary)
    return summary


def _check_heatmaps(matcher: Matcher, captions: Sequence[str]) -> None:
    """What refuses heat maps is found here rather than after hours of scoring."""
    try:
        matcher.check_heatmaps(captions)
    except ValueError as error:
        raise CommandError(f"--heatmaps: {error}") from error


def _score(
    matcher: Matcher,
    images: Sequence[Path],
    captions: Sequence[str],
    file: ScoreFile,
    top_k: int,
    interrupt: Interrupt,
    gallery: MatchReport | None,
) -> tuple[list[dict[str, Any]], float, float]:
    """Puts the scores into the file and the images into the report.

    Returns:
        One entry per image, in order; seconds spent on scores, and on heat maps and the pictures of the page.
    """
    entries: list[dict[str, Any]] = []
    column = pa.array(captions, pa.string())
    pairs, scoring, drawing, start = 0, 0.0, 0.0, time.perf_counter()
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
                    before = time.perf_counter()
                    gallery.add(index, images[index], path, rows, float(values.min()), float(values.max()))
                    drawing += time.perf_counter() - before
                entries.append({"path": path, "ranked": rows})
                pairs += len(captions)
            scoring = time.perf_counter() - start - drawing
            display.update(task, advance=1, units=pairs, seconds=scoring)
    return entries, scoring, drawing


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
