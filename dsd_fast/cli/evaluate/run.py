"""An evaluation run: groups through a matcher into results.json and groups.parquet."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dsd_fast.cli.evaluate.options import EvaluateRequest
from dsd_fast.cli.files import writing
from dsd_fast.cli.results import metadata, settings_of, versions, write_json
from dsd_fast.cli.terminal import Interrupt, progress
from dsd_fast.jobs import replacing, storable
from dsd_fast.matching import Group, MatchConfig, Matcher
from dsd_fast.matching.evaluation import Evaluation, Figures, evaluate_iter
from dsd_fast.matching.fitting.files import read_matcher
from dsd_fast.matching.group_results import GroupResult, check_conventions


def run(request: EvaluateRequest, groups: Sequence[Group], config: MatchConfig) -> dict[str, Any]:
    """Scores every group; Ctrl-C ends it early, with what has been scored.

    The model is loaded once the folder is known to be writable.

    Returns:
        The content of results.json.

    Raises:
        CommandError: `out` cannot be written.
        ValueError: conventions that the groups do not allow, settings or a memory budget that do not fit the model.
    """
    out, how = request.out, request.conventions
    check_conventions(groups, how.batch_mean, how.ties)
    request.source.check()
    request.memory.check(request.source.device)
    if request.matcher is not None:
        read_matcher(request.matcher)
    # results.json opens first, so that it takes its name last: it vouches for the groups.
    with (
        Interrupt() as interrupt,
        writing(out),
        replacing(out / "results.json") as results,
        replacing(out / "groups.parquet") as table,
    ):
        matcher = _load(request, config)
        settings = {
            **settings_of(matcher),
            **request.data.settings(),
            "matcher": None if request.matcher is None else str(request.matcher),
            "adapter": request.source.adapter,
            "runtime": request.memory.runtime,
            **asdict(how),
        }
        graded: list[GroupResult] = []
        pairs, start = 0, time.perf_counter()
        with progress("pairs") as display:
            task = display.add_task("evaluating", total=len(groups), units=0)
            for result in interrupt.until(
                evaluate_iter(matcher, groups, batch_mean=how.batch_mean, ties=how.ties, parts=how.parts)
            ):
                graded.append(result)
                pairs += 0 if result.scores is None else result.scores.size
                display.update(task, advance=1, units=pairs)
        seconds = time.perf_counter() - start
        evaluation = Evaluation.of(graded, resamples=how.resamples)
        complete = len(graded) == len(groups)
        _write_groups(table, groups, evaluation, metadata(settings, complete=str(complete).lower()))
        summary = {
            "command": "evaluate",
            "complete": complete,
            "settings": settings,
            "versions": versions(),
            "counts": {**evaluation.counts, "groups": len(groups), "not_reached": len(groups) - len(graded)},
            "pairs": pairs,
            "seconds": seconds,
            **_figures(evaluation),
            "parts": {part: _figures(own) for part, own in evaluation.parts.items()},
            "errors": [
                {
                    "index": result.index,
                    "id": storable(result.id),
                    "reason": result.failure.reason,
                    "message": storable(result.failure.message),
                }
                for result in graded
                if result.failure is not None
            ],
        }
        write_json(results, summary)
    return summary


def _load(request: EvaluateRequest, config: MatchConfig) -> Matcher:
    model = request.source.load()
    if request.matcher is None:
        return request.memory.compiled(Matcher(model, config))
    return request.memory.compiled(Matcher.load(request.matcher, model, memory_budget=config.memory_budget))


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    def plain(figures: Figures) -> dict[str, Any]:
        return {name: asdict(figure) for name, figure in figures.items()}

    by_category = {storable(name): plain(figures) for name, figures in evaluation.by_category.items()}
    return {"figures": plain(evaluation.figures), "by_category": by_category}


def _write_groups(file: BinaryIO, groups: Sequence[Group], evaluation: Evaluation, about: Mapping[str, str]) -> None:
    """A row per group, scores of a paired one image by image."""
    schema = pa.schema(
        [
            ("index", pa.int32()),
            ("id", pa.string()),
            ("category", pa.string()),
            ("images", pa.int32()),
            ("texts", pa.int32()),
            ("label", pa.int32()),
            ("scores", pa.list_(pa.float32())),
            ("rank", pa.int32()),
            ("text_right", pa.bool_()),
            ("image_right", pa.bool_()),
            ("group_right", pa.bool_()),
            ("error", pa.string()),
            ("message", pa.string()),
            *((f"{part}_scores", pa.list_(pa.float32())) for part in evaluation.parts),
        ],
        metadata=about,
    )
    rows = [_row(groups[result.index], result) for result in evaluation.results]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)


def _row(group: Group, result: GroupResult) -> dict[str, Any]:
    right, failure = result.paired or {}, result.failure
    return {
        "index": result.index,
        "id": storable(result.id),
        "category": storable(result.category),
        "images": len(group.images),
        "texts": len(group.texts),
        "label": result.label,
        "scores": _flat(result),
        "rank": result.rank,
        **{f"{name}_right": right.get(name) for name in ("text", "image", "group")},
        "error": None if failure is None else failure.reason,
        "message": None if failure is None else storable(failure.message),
        **{f"{part}_scores": _flat(own) for part, own in result.parts.items()},
    }


def _flat(result: GroupResult) -> list[float] | None:
    return None if result.scores is None else result.scores.flatten().tolist()
