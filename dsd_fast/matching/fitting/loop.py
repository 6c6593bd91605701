"""The training of a fit: what a step learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.examples import Examples
from dsd_fast.matching.fitting.learned import Learned
from dsd_fast.matching.fitting.objective import draw, losses, scores
from dsd_fast.matching.fitting.validation import validate
from dsd_fast.training import Descent, Report, seed_of, seeded
from dsd_fast.training.order import batch_of


def training(
    learned: Learned,
    examples: Examples,
    fit: FitConfig,
    validation: Examples | None,
    fingerprint: Mapping[str, Any],
    folder: Path | None,
    report: Report,
) -> Descent:
    """Prepare a fit's training.

    Args:
        learned: the parameters.
        examples: to learn from.
        fit: the settings.
        validation: held-out examples to choose the best parameters by, or None.
        fingerprint, folder, report: see :class:`~dsd_fast.training.Descent`.
    """

    scorer = learned.scorer

    def step_losses(step: int, backward: Callable[[Tensor], None]) -> None:
        chosen = batch_of(len(examples.queries), fit.batch_size, step, fit.seed)
        each = fit.micro_batch or len(chosen)
        learned.dropout(True)
        # Dropout draws from torch's own generators, which a step seeds and gives back as they were.
        with seeded(seed_of(fit.seed, step, 0, 2), scorer.plan.program.device) if fit.lora_dropout else nullcontext():
            for start in range(0, len(chosen), each):
                numbers = chosen[start : start + each]
                batch = draw(
                    [examples.queries[number] for number in numbers],
                    [(fit.seed, step, start + place) for place in range(len(numbers))],
                    examples.latents.shape[1:],
                    fit,
                    scorer.model.schedule.num_train_timesteps,
                    scorer.needs_unconditional,
                )
                values = scores(
                    scorer,
                    learned.weights(),
                    examples,
                    batch,
                    through_network=learned.learns_network,
                    checkpoint=fit.checkpointing,
                    autocast=None if fit.autocast is None else getattr(torch, fit.autocast),
                )
                backward(losses(values, batch, fit).sum() / len(chosen))
        learned.dropout(False)

    return Descent(
        learned.parameters,
        step_losses,
        lambda name: name.split(".")[0],
        fit.rate,
        lambda method: fit.weight_decay if method == "lora" else 0.0,
        steps=fit.steps,
        clip_norm=fit.clip_norm,
        scaled=fit.autocast == "float16",
        validate=None if validation is None else lambda: validate(learned.current(), validation, fit),
        validate_every=fit.validate_every,
        patience=fit.patience,
        folder=folder,
        fingerprint=fingerprint,
        save_every=fit.save_every,
        report=report,
    )
