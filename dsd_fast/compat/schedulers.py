"""Schedulers under which the score is the official one."""

from __future__ import annotations

from typing import Any

from dsd_fast.models import Model


def under_scheduler(model: Model, scheduler: Any) -> Model:
    """The model with a diffusers scheduler's noise schedule.

    Raises:
        ValueError: not a scheduler, one of another process (flow matching), one of a higher order, which lists more
            timesteps, or one whose list `set_timesteps` has shortened.
    """
    kind = type(scheduler).__name__
    if getattr(scheduler, "config", None) is None or not hasattr(scheduler, "order"):
        raise ValueError(f"scheduler: got {kind}, expected a diffusers scheduler")
    try:
        result = model.with_scheduler(scheduler)
    except ValueError as error:
        raise ValueError(f"scheduler: {error}") from error
    if scheduler.order != 1:
        raise ValueError(f"scheduler: {kind} has order {scheduler.order}, expected 1, with one entry per timestep")
    steps, total = getattr(scheduler, "num_inference_steps", None), result.schedule.num_train_timesteps
    if steps not in (None, total):
        raise ValueError(
            f"scheduler: set_timesteps({steps}) was called on it, expected all {total} timesteps; give "
            f"{kind}.from_config(scheduler.config)"
        )
    return result


def comparing_with_v(model: Model) -> Model:
    """A v-prediction model as if its output were ε.

    Raises:
        ValueError: another model.
    """
    kind = model.schedule.prediction_type
    if kind != "v_prediction":
        raise ValueError(f"compare_noise_with_v: the model's prediction_type is {kind!r}, expected 'v_prediction'")
    scheduler = model.new_scheduler()
    scheduler.register_to_config(prediction_type="epsilon")
    return model.with_scheduler(scheduler)
