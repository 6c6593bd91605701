"""Zero-shot learning by class tokens, stage by stage."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsd_fast.class_tokens.zsl.classifiers import check_installed
from dsd_fast.class_tokens.zsl.config import ZslConfig
from dsd_fast.class_tokens.zsl.data import ZslData, read_folders
from dsd_fast.class_tokens.zsl.figures import counts_up_to, curve, figures, plain, tsne
from dsd_fast.class_tokens.zsl.proposed import read_proposed
from dsd_fast.class_tokens.zsl.task import Report, Run, Task
from dsd_fast.engine.tokens import LearnedTokens
from dsd_fast.generation.grids import read_classes
from dsd_fast.jobs import locked, remove_stale, replacing, storable
from dsd_fast.metrics import best_penalty, zero_shot

if TYPE_CHECKING:
    from dsd_fast.models import Model

RESULTS = "results.json"
TOKEN = "token"
"""The method, among its baselines."""


def run_zsl(config: ZslConfig, *, model: Model | None = None, report: Report | None = None) -> dict[str, Any]:
    """Learn tokens for unseen classes, make images of these, and tell how well seen and unseen classes are told apart.

    Fu et al. 2024, "DIG-ZSL". Two tasks are done in the same way: on the seen classes alone, some of which stand for
    unseen ones, λ and γ are chosen; with these the data set's own task is measured. In each a category discrimination
    model is fitted to the seen classes' images, the tokens are learned by it, images of the unseen classes are made
    with and without them, and classifiers are fitted to features of real seen and generated unseen images.

    ``config.out`` has ``validation`` and ``test``, each with ``cdm``, ``tokens-γ``, and folders of generated images;
    ``features``; and ``results.json``, which is what is returned. A call that was stopped, in whatever way, goes on
    when it is made again. Of one with other settings what does not depend on them is taken as it is; tokens or images
    that do are refused.

    Args:
        model: in the place of the configuration's.
        report: called with a stage, how much of it is done, and how much there is.

    Returns:
        "table": of each method and classifier "t1", "u", "s", "h" at the "penalty" λ that the validation classes
        choose, see :func:`~dsd_fast.class_tokens.zsl.figures.figures`; "choice": γ, and what it was chosen by;
        "sensitivity" to λ and to the number of images; "tokens"; "tsne"; "images" (folders by method); "sheets", see
        :meth:`~dsd_fast.class_tokens.zsl.task.Task.sheets`; "data"; "errors" (images that could not be used); and
        "settings".

    Raises:
        ValueError: data or settings that do not fit, by name; a class of which no image was accepted; tokens of other
            settings in ``config.out``.
        JobError: generated images of other settings there, or another process that writes.
        ImportError: scikit-learn, or scipy for the proposed splits, is not installed.
    """
    check_installed()
    data = read_data(config)
    with locked(config.out):
        remove_stale(config.out / RESULTS)
        if model is None:
            from dsd_fast.models import load

            names = ("device", "dtype", "revision", "local_files_only", "clip")
            model = load(config.model, **{name: getattr(config, name) for name in names})
        found = _results(Run(config, data, model, report or (lambda stage, done, total: None)))
        content = storable(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False, default=str))
        with replacing(config.out / RESULTS) as file:
            file.write(content.encode() + b"\n")
    results: dict[str, Any] = json.loads(content)
    return results


def read_data(config: ZslConfig) -> ZslData:
    """Read the data set of a configuration, and draw its validation classes.

    Raises:
        ValueError: it does not hold what it should, see :mod:`dsd_fast.class_tokens.zsl.data`.
    """
    if config.proposed is not None:
        data = read_proposed(config.proposed, config.images, config.names)
    else:
        # It would be a class the next time.
        if config.unseen is not None and config.images.resolve() in config.out.resolve().parents:
            raise ValueError(f"out: {config.out} is in images, whose folders are classes; expected another place")
        data = read_folders(config.images, config.unseen, config.names, share=config.test_share, seed=config.seed)
    if config.validation == 0:
        return replace(data, validation=())
    chosen = config.validation
    data = data.validated(read_classes(chosen) if isinstance(chosen, Path) else chosen, config.seed)
    # Refuses classes of which nothing could be held out, before anything is computed.
    data.held_out(config.test_share, config.seed)
    return data


def _results(run: Run) -> dict[str, Any]:
    """All that is told."""
    config = run.config
    gamma, penalties, tried = _chosen(run)
    task = Task(run, "test", run.data)
    made = task.generated(TOKEN, gamma)
    scores = {**task.scores(TOKEN, made), **task.baselines()}
    table = [
        {"method": method, "classifier": kind, **figures(each, task.labels, run.data.seen, penalty)}
        for (method, kind), each in scores.items()
        # Of a method that the validation classes have too few images for no λ is known.
        if not penalties or (method, kind) in penalties
        for penalty in [penalties.get((method, kind), 0.0)]
    ]
    first = TOKEN, config.classifiers[0]
    growth = []
    for count in counts_up_to(config.counts, config.per_class):
        few = task.scores(TOKEN, made, count)[first]
        growth.append({"images": count, **plain(zero_shot(few, task.labels, run.data.seen, penalties.get(first, 0)))})
    tokens = LearnedTokens.load(task.folder_of_tokens(gamma))
    counts = np.bincount(made.labels, minlength=len(run.data.names)).tolist()
    return {
        "table": table,
        "choice": {"gamma": gamma, "tried": tried},
        "sensitivity": {"penalty": curve(scores[first], task.labels, run.data.seen), "images": growth},
        "tokens": {
            name: {"token": token, "images": counts[run.data.names.index(name)], **tokens.about[token]}
            for token, name in tokens.classes.items()
        },
        "tsne": tsne(tokens, run.model, config.seed),
        "images": {
            method: task.folder_of_images(method, own).relative_to(config.out).as_posix()
            for method, own in {TOKEN: gamma, "plain": None, "ensemble": None}.items()
            if method == TOKEN or method in config.baselines
        },
        "sheets": task.sheets(gamma),
        "data": {**_about(run.data), "test_images_learned_from": run.repeated},
        "errors": run.errors,
        "settings": asdict(config),
    }


def _chosen(run: Run) -> tuple[float, dict[tuple[str, str], float], list[dict[str, Any]]]:
    """γ, each method's λ, and what γ was chosen by, of the validation classes."""
    config = run.config
    gammas = config.gammas or (config.tokens.gamma,)
    if not run.data.validation:
        return gammas[0], {}, []
    task = Task(run, "validation", run.data.held_out(config.test_share, config.seed))
    tried, penalties = [], []
    for gamma in gammas:
        scores = task.scores(TOKEN, task.generated(TOKEN, gamma))
        own = {key: best_penalty(each, task.labels, task.data.seen) for key, each in scores.items()}
        first = TOKEN, config.classifiers[0]
        found = zero_shot(scores[first], task.labels, task.data.seen, own[first])
        tried.append({"gamma": gamma, "penalty": own[first], **plain(found)})
        penalties.append(own)
    best = int(np.argmax([each["h"] for each in tried]))
    others = {key: best_penalty(each, task.labels, task.data.seen) for key, each in task.baselines().items()}
    return gammas[best], {**penalties[best], **others}, tried


def _about(data: ZslData) -> dict[str, Any]:
    """What of the data was used."""
    of_seen = data.seen[data.labels]
    return {
        "classes": list(data.names),
        "seen": [data.names[c] for c in np.flatnonzero(data.seen)],
        "unseen": data.unseen_names,
        "validation": [data.names[c] for c in data.validation],
        "train_images": int(data.train.sum()),
        "test_images_of_seen": int((~data.train & of_seen).sum()),
        "test_images_of_unseen": int((~of_seen).sum()),
    }
