"""What of a model a job's results depend on, by which a folder knows its own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_fast.diffusion import changed_in_place
from dsd_fast.engine.changes import FLEETING, changes
from dsd_fast.engine.engine import Engine
from dsd_fast.jobs import config_hash, row_id, tensors_hash, weights_hash
from dsd_fast.kernels.common.host import as_tensor
from dsd_fast.unet.adapters import acting_tensors, strengths_by_layer, strengths_summary

if TYPE_CHECKING:
    from dsd_fast.models import Model

# Spelt as no vocabulary tells: case, accents, spaces, signs, other scripts, and a word of many pieces.
_PROBE = "A Photo of  the\tdigit 3, naïve CAFÉ—日本 🙂 !?…don't, uncharacteristically\n"


def model_settings(engine: Engine, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Tell all of a model that changes results, as JSON: networks, adapters, ControlNets, tokenizers, schedule.

    Args:
        others: networks that count as well, by name.

    Raises:
        ValueError: a ControlNet's condition, a hook or a replaced function that has no lasting name; an adapter that is
            fused into the weights.
    """
    model = engine.model
    for number, control in enumerate(engine.controls):
        condition = control.settings()["condition"]
        if condition is not None and any(mark in condition for mark in FLEETING):
            raise ValueError(
                f"controls[{number}]: condition is {condition}, which a later run could not tell from another; "
                "expected a function of a module, or functools.partial of one"
            )
    networks = {"unet": model.unet, "vae": model.vae, **(others or {})}
    networks |= {f"control_{number}": control.net for number, control in enumerate(engine.controls)}
    return {
        "revision": model.revision,
        **text_settings(engine, networks),
        "absent_prompt_is_zeros": model.absent_prompt_is_zeros,
        "prediction_type": model.schedule.prediction_type,
        "noise_schedule": tensors_hash({"alphas_cumprod": model.schedule.alphas_cumprod}),
    }


def text_settings(engine: Engine, others: Mapping[str, Any]) -> dict[str, Any]:
    """Tell all of a model's text encoders that changes their states, and the same of other networks, as JSON.

    Args:
        others: by name.

    Raises:
        ValueError: see :func:`model_settings`.
    """
    model = engine.model
    networks = {**others, **{f"text_encoder_{number}": each for number, each in enumerate(model.text_encoders)}}
    with engine.adapters.active():
        strengths = {name: strengths_by_layer(network) for name, network in networks.items()}
        weights = weights_hash(networks, acting_tensors)
    return {
        "model": model.name,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights,
        "changes": {name: _hash(changed) for name, network in networks.items() if (changed := changes(network))},
        "configs": {name: config_hash(network) for name, network in networks.items()},
        "tokenizers": [_tokenizer_hash(tokenizer) for tokenizer in model.tokenizers],
        "adapters": {name: told for name, layers in strengths.items() if (told := strengths_summary(layers))},
        "adapter_strengths": _hash(strengths),
    }


def model_identity(model: Model) -> dict[str, Any]:
    """Tell which model something that is saved belongs to, see :func:`check_same_model`."""
    return {"name": model.name, "revision": model.revision, "family": model.family}


def check_same_model(folder: Path, saved: Mapping[str, Any], model: Model) -> None:
    """Warn where what is in a folder belongs to another model than this one.

    Args:
        saved: by :func:`model_identity`.

    Raises:
        ValueError: the model is of another family.
    """
    if saved["family"] != model.family:
        raise ValueError(f"folder: {folder} was fitted to a model of family {saved['family']}, got {model.family}")
    now = model_identity(model)
    if other := [f"{key} {saved[key]!r}, now {now[key]!r}" for key in ("name", "revision") if saved[key] != now[key]]:
        warnings.warn(f"{folder} was fitted to another model: {'; '.join(other)}", stacklevel=5)


def adapters_identity(engine: Engine, own: str | None) -> dict[str, Any]:
    """Tell under which adapters something that is saved was made, see :func:`check_same_adapters`.

    Args:
        own: the UNet's that is saved with it, and does not count.
    """
    parts = []
    for layers in engine.adapters.strengths():
        kept = {path: [each for each in layers[path] if each[0] != own] for path in sorted(layers)}
        parts.append({path: strengths for path, strengths in kept.items() if strengths})
    return {
        "strengths": [strengths_summary(layers) for layers in parts],
        "strengths_by_layer": row_id(json.dumps(parts)),
    }


def check_same_adapters(folder: Path, saved: Mapping[str, Any], engine: Engine) -> None:
    """Warn where other adapters act than those that what is in a folder was made under, elsewhere or less strongly.

    Args:
        saved: by :func:`adapters_identity`.
    """
    own = adapters_identity(engine, None)
    was, now = saved["strengths"], own["strengths"]
    if own["strengths_by_layer"] != saved.get("strengths_by_layer") and any((*was, *now)):
        where = ", in other layers" if now == was else ""
        warnings.warn(f"{folder} was fitted under the adapters {was}, now {now}{where}", stacklevel=5)


def scheduler_settings(model: Model) -> dict[str, Any]:
    """Tell what of a model's scheduler changes its own steps, as JSON: class, config, what was changed in place."""
    scheduler = model.new_scheduler()
    kind = type(scheduler)
    # DPM++ has an infinite number in its config, which JSON has no number for.
    settings: dict[str, Any] = json.loads(json.dumps(model.scheduler_config, default=str), parse_constant=str)
    # Which of the values are defaults, in the order of a set, which is another one in another process.
    settings.pop("_use_default_values", None)
    if not kind.__module__.startswith("diffusers."):
        settings["_class_name"] = f"{kind.__module__}.{kind.__qualname__}"
    changed = {name: _number(value) for name, value in sorted(changed_in_place(scheduler).items())}
    return {**settings, "changed_in_place": changed} if changed else settings


def _number(value: Any) -> str:
    if hasattr(value, "__array__"):
        return tensors_hash({"": as_tensor(value)})
    return (
        repr(value) if isinstance(value, bool | int | float | str | list | tuple | dict) else type(value).__qualname__
    )


def _tokenizer_hash(tokenizer: Any) -> str:
    return _hash(
        {
            "vocabulary": tokenizer.get_vocab(),
            "limit": tokenizer.model_max_length,
            "special": tokenizer.special_tokens_map,
            "padding": [tokenizer.pad_token_id, tokenizer.padding_side],
            "probe": tokenizer(_PROBE, verbose=False)["input_ids"],
        }
    )


def _hash(values: Any) -> str:
    return row_id(json.dumps(values, sort_keys=True, default=str))
