"""A fit run: groups through Matcher.fit into a folder, and history.json beside what it writes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dsd_fast.cli.files import writing
from dsd_fast.cli.fit.options import FitRequest
from dsd_fast.cli.results import settings_of, versions, write_json
from dsd_fast.cli.steps import finite, history_of, showing_steps
from dsd_fast.cli.terminal import CommandError
from dsd_fast.jobs import LockedError, locked, remove_stale, replacing
from dsd_fast.matching import Group, MatchConfig, Matcher
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.run import check_patience
from dsd_fast.matching.pairs import image_key
from dsd_fast.metrics import wilson
from dsd_fast.training import FitHistory, FitRecord

HISTORY = "history.json"
OFFICIAL = "official"
"""Folder, in the matcher's, of the LoRA as the official code reads it."""


def run(
    request: FitRequest,
    groups: Sequence[Group],
    held_out: Sequence[Group] | None,
    score: MatchConfig,
    config: FitConfig,
    methods: Sequence[str],
) -> dict[str, Any]:
    """Fits a matcher; what an earlier run of the same settings has left in the folder is gone on from.

    The model is loaded once the folder is known to be writable.

    Args:
        groups: to learn from.
        held_out: to choose the best parameters by, or None.
        methods, config: as for :meth:`dsd_fast.Matcher.fit`.

    Returns:
        The content of history.json.

    Raises:
        CommandError: `out` cannot be written, or another process writes to it.
        KeyboardInterrupt: after Ctrl-C; the checkpoint is in `out`.
        ValueError: groups or settings that are not allowed, or a folder of another fit.
    """
    out = request.out
    request.source.check()
    request.memory.check(request.source.device)
    check_patience(config, held_out)
    try:
        with writing(out):
            # Before a model is loaded for nothing.
            with locked(out):
                remove_stale(out / HISTORY)
            matcher = request.memory.compiled(Matcher(request.source.load(), score))
            settings = {
                **settings_of(matcher),
                **request.data.settings(),
                "adapter": request.source.adapter,
                "runtime": request.memory.runtime,
                "methods": list(methods),
                "fit": asdict(config),
            }
            start = time.perf_counter()
            with showing_steps("fitting", config.steps) as report:
                history = matcher.fit(
                    groups, methods, validation=held_out, config=config, out=out, callback=report, progress=False
                )
            if request.official_lora:
                matcher.save_attn_procs(out / OFFICIAL)
            summary = {
                "command": "fit",
                "settings": settings,
                "versions": versions(),
                "counts": {"groups": len(groups), "held_out": _questions(held_out or ())},
                "seconds": time.perf_counter() - start,
                **history_of(history),
                "before": None if held_out is None else _quality(history.records[0], held_out),
                "after": None if held_out is None else _quality(_best(history), held_out),
            }
            with locked(out), replacing(out / HISTORY) as file:
                write_json(file, summary)
    except LockedError as error:
        raise CommandError(f"--out: {error}") from error
    return summary


def hold_out(groups: Sequence[Group], share: float, seed: int) -> tuple[list[Group], list[Group]]:
    """Parts groups into those to learn from and a share of them to look at, each in their order.

    Groups whose right image is the same (of a paired group the first image) stay together, so that no held-out one is
    about an image that was learned from. Images are drawn until the share is reached.

    Raises:
        ValueError: a share that is not between 0 and 1, or one that leaves a side without a group.
    """
    if not 0 < share < 1:
        raise ValueError(f"validation_split: got {share}, expected a share between 0 and 1")
    keys = [image_key(group.right_image) for group in groups]
    sizes = Counter(keys)
    images = list(sizes)
    wanted, count = max(1, round(share * len(groups))), 0
    chosen: set[Any] = set()
    for place in np.random.default_rng(seed).permutation(len(images)).tolist():
        if count >= wanted:
            break
        chosen.add(images[place])
        count += sizes[images[place]]
    learned, held = (
        [group for group, key in zip(groups, keys, strict=True) if (key in chosen) is out] for out in (False, True)
    )
    if not learned:
        raise ValueError(
            f"validation_split: {share} of {len(groups)} groups on {len(images)} images leaves no group to learn from"
        )
    return learned, held


def _questions(groups: Sequence[Group]) -> int:
    return sum(len(group.queries()) for group in groups)


def _best(history: FitHistory) -> FitRecord:
    return next(record for record in history.records if record.step == history.best_step)


def _quality(record: FitRecord, held_out: Sequence[Group]) -> dict[str, Any]:
    """The validation on the held-out groups, with the 95 % Wilson interval of its accuracy."""
    questions = _questions(held_out)
    assert record.accuracy is not None
    interval = wilson(round(record.accuracy * questions), questions)
    return {
        "step": record.step,
        "accuracy": record.accuracy,
        "interval": list(interval),
        "loss": finite(record.validation_loss),
    }
