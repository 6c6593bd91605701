"""The demo's run: held-out scenes through the Matcher, some of them through the reference too, into files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from dsd_fast.cli.demo.options import DemoRequest
from dsd_fast.cli.demo.report import render
from dsd_fast.cli.files import writing
from dsd_fast.cli.options import ModelOptions
from dsd_fast.cli.results import ScoreFile, metadata, ranked, settings_of, versions, write_json
from dsd_fast.cli.terminal import progress
from dsd_fast.jobs import replacing
from dsd_fast.matching import MatchConfig, Matcher
from dsd_fast.matching.heatmaps import Heatmap
from dsd_fast.matching.localisation import pointing
from dsd_fast.matching.words import words
from dsd_fast.metrics import wilson
from dsd_fast.models.mini.scenes import EVAL_SEED, NEGATIVE_KINDS, Scene, scene
from dsd_fast.reference import matching as reference

TOLERANCE = 1e-4
"""How far float32 scores may be from the reference's."""

SHOWN = 16
"""Scenes that the report shows."""

# Words of a scene's caption that say little by themselves.
_FUNCTION_WORDS = ("a",)

# Scenes scored between two steps of the progress display.
_SCENES_AT_ONCE = 10

Scores = list[NDArray[np.float32]]


def run(request: DemoRequest, timesteps: int | Sequence[int]) -> dict[str, Any]:
    """Scores the scenes, maps their captions' words, and writes report and results; returns the results.

    Raises:
        CommandError: `out` cannot be written.
        ValueError: settings that do not fit the model.
    """
    out, seed, count = request.out, request.seed, request.scenes
    scenes = [scene(EVAL_SEED + i) for i in range(count)]
    captions = [{"true": each.caption, **each.negatives()} for each in scenes]
    with (
        writing(out),
        replacing(out / "results.json") as results,
        replacing(out / "scores.parquet") as table,
        replacing(out / "report.html") as page,
    ):
        model = ModelOptions(device=request.device, dtype=request.dtype, local_files_only=True).load()
        matcher = Matcher(model, MatchConfig(timesteps=timesteps, seed=seed, official=True))
        noise_matcher = Matcher(model, MatchConfig(timesteps=timesteps, seed=seed, attention_weight=0))
        maps: list[list[Heatmap]] = []
        with progress("pairs") as display:
            scores = _score(display, "official score", matcher, scenes, captions)
            noise_scores = _score(display, "noise term", noise_matcher, scenes, captions)
            points = pointing(scenes, _maps(display, matcher, scenes, maps))
        compared = min(request.reference_scenes, count)
        judge = model
        if model.dtype != torch.float32:
            # What the type costs is told beside what float32 gives.
            judge = ModelOptions(device=request.device, local_files_only=True).load()
        wanted, comparison = _compare(matcher, judge.to_pipeline(), scenes[:compared], captions[:compared])
        summary = {
            "command": "demo",
            "settings": settings_of(matcher),
            "versions": versions(),
            "first_seed": EVAL_SEED,
            "counts": {"images": count, "pairs": sum(len(each) for each in captions)},
            "accuracy": {"official": _accuracy(captions, scores), "noise": _accuracy(captions, noise_scores)},
            "pointing": [
                {"word": kind, **_figures(point.right, point.n, point.chance)} for kind, point in points.items()
            ],
            "reference": comparison,
            "images": _entries(scenes, captions, scores),
        }
        _save_pictures(out, scenes)
        _save_scores(table, captions, scores, noise_scores, wanted, summary)
        page.write(render(summary, [each.image for each in scenes[:SHOWN]], maps))
        write_json(results, summary)
    return summary


def _maps(
    display: Progress, matcher: Matcher, scenes: Sequence[Scene], kept: list[list[Heatmap]]
) -> Iterator[list[Heatmap]]:
    """The maps of each scene's caption; those of the scenes that the report shows are kept."""
    task = display.add_task("heat maps", total=len(scenes), units=0)
    for number, each in enumerate(scenes):
        wanted = [span for span in words(each.caption) if each.caption[slice(*span)] not in _FUNCTION_WORDS]
        maps = matcher.heatmap(each.image, each.caption, spans=wanted)
        if number < SHOWN:
            kept.append(maps)
        display.update(task, advance=1, units=number + 1)
        yield maps


def _score(
    display: Progress, name: str, matcher: Matcher, scenes: Sequence[Scene], captions: Sequence[dict[str, str]]
) -> Scores:
    """Each scene's scores, in the order of its captions."""
    scores: Scores = []
    task = display.add_task(name, total=len(scenes), units=0)
    for start in range(0, len(scenes), _SCENES_AT_ONCE):
        some = slice(start, start + _SCENES_AT_ONCE)
        scores += _predict(matcher, scenes[some], captions[some])
        display.update(task, completed=len(scores), units=sum(len(each) for each in scores))
    return scores


def _predict(matcher: Matcher, scenes: Sequence[Scene], captions: Sequence[dict[str, str]]) -> Scores:
    pairs = [(each.image, text) for each, texts in zip(scenes, captions, strict=True) for text in texts.values()]
    flat = matcher.predict(pairs)
    return [part.numpy() for part in torch.split(flat, [len(texts) for texts in captions])]


def tolerance(dtype: torch.dtype) -> float:
    """How far scores, which reach 16, may be from the float32 reference's: in 16 bits, as far as they are rounded."""
    return max(TOLERANCE, 16 * torch.finfo(dtype).eps)


def _compare(
    matcher: Matcher, pipe: Any, scenes: Sequence[Scene], captions: Sequence[dict[str, str]]
) -> tuple[Scores, dict[str, Any]]:
    """The reference's scores of the scenes by a float32 pipeline, and both sides' seconds for the same pairs."""
    options: dict[str, Any] = {"timesteps": matcher.timesteps, "seed": matcher.config.seed}
    # The first calls of either side pay for what later ones do not.
    _predict(matcher, scenes[:1], captions[:1])
    reference.score(pipe, [scenes[0].image], [scenes[0].caption], **options)
    start = time.perf_counter()
    found = _predict(matcher, scenes, captions)
    seconds = time.perf_counter() - start
    wanted: Scores = []
    start = time.perf_counter()
    with progress("pairs") as display:
        task = display.add_task("reference", total=len(scenes), units=0)
        for each, texts in zip(scenes, captions, strict=True):
            wanted.append(reference.score(pipe, [each.image], list(texts.values()), **options)[0].numpy())
            display.update(task, advance=1, units=sum(len(row) for row in wanted))
    return wanted, {
        "scenes": len(scenes),
        "pairs": sum(len(texts) for texts in captions),
        "max_difference": float(np.abs(np.concatenate(found) - np.concatenate(wanted)).max()),
        "tolerance": tolerance(matcher.model.dtype),
        "seconds": seconds,
        "reference_seconds": time.perf_counter() - start,
        "threads": torch.get_num_threads(),
    }


def _accuracy(captions: Sequence[dict[str, str]], scores: Scores) -> list[dict[str, Any]]:
    """How often the true caption scores higher than each kind of wrong one, and than all of its scene ("all")."""
    wins: dict[str, list[bool]] = {kind: [] for kind in (*NEGATIVE_KINDS, "all")}
    chances: dict[str, list[float]] = {kind: [] for kind in wins}
    for texts, values in zip(captions, scores, strict=True):
        won = {kind: bool(values[0] > value) for kind, value in zip(texts, values, strict=True) if kind != "true"}
        for kind, win in won.items():
            wins[kind].append(win)
            chances[kind].append(1 / 2)
        wins["all"].append(all(won.values()))
        chances["all"].append(1 / len(texts))
    table = []
    for kind, results in wins.items():
        right, n = sum(results), len(results)
        if n:
            table.append({"against": kind, **_figures(right, n, sum(chances[kind]) / n)})
    return table


def _figures(right: int, n: int, chance: float) -> dict[str, Any]:
    return {"right": right, "n": n, "accuracy": right / n, "interval": wilson(right, n), "chance": chance}


def _entries(scenes: Sequence[Scene], captions: Sequence[dict[str, str]], scores: Scores) -> list[dict[str, Any]]:
    entries = []
    for number, (each, texts, values) in enumerate(zip(scenes, captions, scores, strict=True)):
        kinds = list(texts)
        rows = ranked(np.argsort(-values, kind="stable"), list(texts.values()), values, len(texts))
        for row in rows:
            row["kind"] = kinds[row["caption_index"]]
        entries.append({"path": _picture(number), "seed": each.seed, "caption": each.caption, "ranked": rows})
    return entries


def _save_scores(
    file: BinaryIO,
    captions: Sequence[dict[str, str]],
    scores: Scores,
    noise_scores: Scores,
    wanted: Scores,
    summary: dict[str, Any],
) -> None:
    """All official scores, beside them the noise term alone and, where there is one, the reference's."""
    about = metadata(summary["settings"])
    # The shipped model has none.
    del about["dsd_fast.revision"]
    kinds = {"kind": pa.string(), "noise_score": pa.float32(), "reference_score": pa.float32()}
    with ScoreFile(file, about, kinds) as table:
        for number, (texts, values) in enumerate(zip(captions, scores, strict=True)):
            columns = {
                "kind": list(texts),
                "noise_score": noise_scores[number],
                "reference_score": wanted[number] if number < len(wanted) else [None] * len(texts),
            }
            table.add(number, _picture(number), pa.array(texts.values(), pa.string()), values, **columns)
        table.close(complete=True)


def _save_pictures(out: Path, scenes: Sequence[Scene]) -> None:
    (out / _picture(0)).parent.mkdir(exist_ok=True)
    for number, each in enumerate(scenes):
        with replacing(out / _picture(number)) as file:
            Image.fromarray(each.image).save(file, "PNG")


def _picture(number: int) -> str:
    """The file of a scene, relative to the results."""
    return f"scenes/{number:04d}.png"
