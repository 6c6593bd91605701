"""A fit from its examples to what was learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsd_fast.engine.fingerprint import model_settings
from dsd_fast.engine.items import prompt_check
from dsd_fast.jobs import locked, remove_stale, tensors_hash
from dsd_fast.kernels.common.host import own_types
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.examples import Examples
from dsd_fast.matching.fitting.files import LORA, MATCHER, PROMPT, Adapter, save
from dsd_fast.matching.fitting.learned import Learned
from dsd_fast.matching.fitting.loop import training
from dsd_fast.matching.groups import Group, drawn_groups, wrong_text
from dsd_fast.matching.score import PairScorer
from dsd_fast.models.private import check_ordinary
from dsd_fast.training import FitHistory, Report

if TYPE_CHECKING:
    from dsd_fast.models import Model


def fit(
    base: PairScorer,
    lora: str | None,
    adapter: Adapter,
    examples: Iterable[Any],
    methods: tuple[str, ...],
    validation: Iterable[Any] | None,
    config: FitConfig,
    out: Path | None,
    report: Report,
    runtime: str | None = None,
) -> tuple[PairScorer, str | None, FitHistory]:
    """See :meth:`dsd_fast.matching.Matcher.fit`.

    Args:
        base: the matcher's scorer, which is not changed.
        lora: name of the adapter that it has learned, or None.
        adapter: the matcher's.
        examples, methods, validation, config, out: as there.
        report: see :data:`~dsd_fast.training.descent.Report`.
        runtime: that the network is compiled for.

    Returns:
        The scorer that the matcher then has, the name of its LoRA, and what the fit did.
    """
    groups = _groups("examples", examples, base.model)
    held_out = None if validation is None else _groups("validation", validation, base.model)
    check_patience(config, held_out)
    steps = base.model.schedule.num_train_timesteps
    if config.timestep_range is not None and config.timestep_range[1] > steps:
        raise ValueError(f"timestep_range: got {config.timestep_range}, expected at most (0, {steps})")
    parts = {"unet": base.model.unet}
    parts |= {f"text_encoder_{number}": encoder for number, encoder in enumerate(base.model.text_encoders)}
    check_ordinary("fit", parts)
    # The caller's program may be without gradients, or mix precisions; this is training, in the types of its settings.
    learning = (torch.inference_mode(False), torch.enable_grad(), own_types(base.model.device))
    with ExitStack() as stack:
        for context in (*learning, nullcontext() if out is None else locked(out)):
            stack.enter_context(context)
        if out is not None:
            for name in (LORA, PROMPT, MATCHER):
                remove_stale(out / name)
        learned = Learned(base, lora, methods, config)
        if runtime is not None:
            learned.scorer.plan.compile(runtime)
        prepared = Examples(learned.scorer, groups)
        checked = None if held_out is None else Examples(learned.scorer, held_out)
        fingerprint = {} if out is None else _fingerprint(base, adapter, methods, config, prepared, checked)
        history = training(learned, prepared, config, checked, fingerprint, out, report).fit()
        scorer = learned.finished()
        if out is not None:
            save(out, scorer, learned.lora, adapter)
    return scorer, learned.lora, history


def check_patience(config: FitConfig, held_out: Sequence[Group] | None) -> None:
    """Refuses patience without held-out groups.

    Raises:
        ValueError: there are none.
    """
    if config.patience is not None and held_out is None:
        raise ValueError("patience: needs validation, the held-out groups that it goes by")


def _groups(name: str, given: Iterable[Any], model: Model) -> list[Group]:
    groups = list(drawn_groups(given))
    if not groups:
        raise ValueError(f"{name}: got none, expected at least one group")
    check = prompt_check(model)
    for number, group in enumerate(groups):
        wrong = wrong_text(check, group)
        if wrong is not None:
            raise ValueError(f"{name}[{number}]{f' ({group.id})' if group.id else ''}: {wrong[1]}")
    return groups


def _fingerprint(
    base: PairScorer,
    adapter: Adapter,
    methods: tuple[str, ...],
    config: FitConfig,
    examples: Examples,
    validation: Examples | None,
) -> dict[str, Any]:
    """All that changes the result; not the device, nor what only changes memory or time."""
    neutral = {"save_every", "checkpointing"}
    # Dropout draws for one micro-batch after the other.
    neutral |= set() if config.lora_dropout else {"micro_batch"}
    settings = {key: value for key, value in asdict(config).items() if key not in neutral}
    scoring = {key: value for key, value in asdict(base.config).items() if key != "memory_budget"}
    return {
        **model_settings(base.engine),
        "prompt": None if base.prompt is None else tensors_hash({"prompt": base.prompt}),
        "adapter": adapter,
        "methods": methods,
        "examples": examples.digest,
        "validation": None if validation is None else validation.digest,
        **settings,
        **{f"config.{key}": value for key, value in scoring.items()},
    }
