"""A fit from its examples to what was learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsd_fast.images import ImageError, decode
from dsd_fast.jobs import locked, remove_stale
from dsd_fast.matching.config import MatchConfig
from dsd_fast.matching.evaluation import evaluate_iter
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.examples import Examples
from dsd_fast.matching.fitting.files import LORA, MATCHER, PROMPT, Adapter, plain, save
from dsd_fast.matching.fitting.learned import Adaptation, Learned
from dsd_fast.matching.fitting.loop import CHECKPOINT, FitHistory, FitRecord, Look, Training
from dsd_fast.matching.fitting.objective import group_loss
from dsd_fast.matching.groups import Group
from dsd_fast.matching.pairs import PairScorer
from dsd_fast.unet.adapters import active_names

if TYPE_CHECKING:
    from dsd_fast.matching.matcher import Matcher

Report = Callable[[int, float | None, FitRecord | None], None]


def fit(
    matcher: Matcher,
    adaptation: Adaptation,
    adapter: Adapter,
    examples: Iterable[Any],
    methods: tuple[str, ...],
    validation: Iterable[Any] | None,
    config: FitConfig,
    out: Path | None,
    report: Report,
) -> tuple[Adaptation, MatchConfig, FitHistory]:
    """See :meth:`dsd_fast.matching.Matcher.fit`; the matcher itself is not changed."""
    groups = [Group.of(example) for example in examples]
    held_out = None if validation is None else [query for each in validation for query in Group.of(each).queries()]
    if held_out is not None and not held_out:
        raise ValueError("validation: got no groups, expected at least one")
    if config.patience is not None and held_out is None:
        raise ValueError("patience: needs validation, the held-out groups that it looks at")
    steps = matcher.model.schedule.num_train_timesteps
    if config.timestep_range is not None and config.timestep_range[1] > steps:
        raise ValueError(f"timestep_range: got {config.timestep_range}, expected at most (0, {steps})")
    with nullcontext() if out is None else locked(out):
        if out is not None:
            for name in (CHECKPOINT, LORA, PROMPT, MATCHER):
                remove_stale(out / name)
        learned = Learned(adaptation, matcher.config, adapter, methods, config)
        if matcher.runtime is not None:
            learned.scorer.plan.compile(matcher.runtime)
        prepared = Examples(learned.scorer, groups)
        fingerprint = {}
        if out is not None:
            fingerprint = _fingerprint(matcher, adaptation, adapter, methods, config, prepared, held_out)

        def look(scorer: PairScorer) -> Look:
            assert held_out is not None
            return _look(matcher.using(scorer), held_out, config)

        training = Training(learned, prepared, config, None if held_out is None else look, fingerprint, out, report)
        history = training.run()
        adaptation, match_config = learned.finished()
        if out is not None:
            save(out, adaptation, match_config, adapter)
    return adaptation, match_config, history


def _look(matcher: Matcher, groups: list[Group], config: FitConfig) -> Look:
    right, losses = 0, []
    for group, result in zip(groups, evaluate_iter(matcher, groups), strict=True):
        if result.failure is not None or result.scores is None:
            why = "" if result.failure is None else result.failure.message
            raise ValueError(f"validation: group {result.id or result.index} cannot be scored: {why}")
        right += result.rank == 1
        losses.append(float(group_loss(torch.from_numpy(result.scores), group.label, config)))
    return right / len(groups), sum(losses) / len(losses)


def _fingerprint(
    matcher: Matcher,
    adaptation: Adaptation,
    adapter: Adapter,
    methods: tuple[str, ...],
    config: FitConfig,
    examples: Examples,
    held_out: list[Group] | None,
) -> dict[str, Any]:
    """All that changes the result; not the device, nor what only changes memory or time."""
    model = matcher.model
    settings = {key: value for key, value in asdict(config).items() if key not in ("save_every", "micro_batch")}
    scoring = {key: value for key, value in asdict(matcher.config).items() if key != "memory_budget"}
    before = [] if adaptation.prompt is None else [adaptation.prompt]
    networks = (adaptation.model.unet, model.vae, *model.text_encoders)
    found = {
        "model": [model.name, model.revision, str(model.dtype)],
        "weights": _digest([*before, *(p for network in networks for p in network.parameters())]),
        "noise_schedule": [model.schedule.prediction_type, _digest([model.schedule.alphas_cumprod])],
        "adapter": adapter,
        "active": active_names(adaptation.model.unet) if adapter is None else (),
        "methods": methods,
        "examples": examples.digest,
        "validation": None if held_out is None else _shown(held_out, matcher.image_size),
        **settings,
        **{f"config.{key}": value for key, value in scoring.items()},
    }
    return {key: _plain(value) for key, value in found.items()}


def _shown(groups: list[Group], size: tuple[int, int]) -> str:
    """A digest of the groups' pixels, texts and labels."""
    digest = hashlib.sha256(repr([(group.texts, group.label, len(group.images)) for group in groups]).encode())
    for _, image in decode([image for group in groups for image in group.images], size):
        digest.update(str(image).encode() if isinstance(image, ImageError) else image.numpy().tobytes())
    return digest.hexdigest()


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=plain))
