"""A fitted matcher in a folder.

matcher.json                          the configuration, what was learned, and of which model; written last
pytorch_lora_weights.safetensors      the LoRA, as stock diffusers' ``pipe.load_lora_weights(folder)`` reads it
prompt.safetensors                    "prompt", (n, E) float32: the learned vectors
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsd_fast.engine.fingerprint import adapters_identity, check_same_adapters, check_same_model, model_identity
from dsd_fast.engine.lora import own_model, put_lora
from dsd_fast.jobs import read_tensors, remove_stale, replacing, write_tensors
from dsd_fast.kernels.common.host import ordinary
from dsd_fast.matching.config import MatchConfig
from dsd_fast.matching.score import PairScorer
from dsd_fast.training import as_json

if TYPE_CHECKING:
    from dsd_fast.models import Model

MATCHER = "matcher.json"
LORA = "pytorch_lora_weights.safetensors"
PROMPT = "prompt.safetensors"

_KEYS = ("model", "adapter", "strengths", "lora", "prompt", "config")

Adapter = str | tuple[str, ...] | None


def save(folder: Path, scorer: PairScorer, lora: str | None, adapter: Adapter) -> None:
    """See :meth:`dsd_fast.matching.Matcher.save`; the caller has the folder's lock or is its only writer."""
    from dsd_fast.models.lora import save_lora

    model = scorer.model
    # Until the last file is in place nothing vouches for the others.
    (folder / MATCHER).unlink(missing_ok=True)
    for name in (MATCHER, LORA, PROMPT):
        remove_stale(folder / name)
    for name, there in ((LORA, lora is not None), (PROMPT, scorer.prompt is not None)):
        if not there:
            (folder / name).unlink(missing_ok=True)
    if lora is not None:
        save_lora(model.unet, lora, folder / LORA)
    if scorer.prompt is not None:
        write_tensors(folder / PROMPT, {"prompt": scorer.prompt})
    about = {
        "format": 1,
        "model": model_identity(model),
        "adapter": adapter,
        **adapters_identity(scorer.engine, lora),
        "lora": lora is not None,
        "prompt": scorer.prompt is not None,
        # The budget is of the device that scores.
        "config": {key: value for key, value in asdict(scorer.config).items() if key != "memory_budget"},
    }
    with replacing(folder / MATCHER) as file:
        file.write(json.dumps(as_json(about), indent=2, allow_nan=False).encode() + b"\n")


@ordinary()
def load(
    folder: str | os.PathLike[str], model: Model, memory_budget: int | None = None
) -> tuple[PairScorer, str | None, Adapter]:
    """See :meth:`dsd_fast.matching.Matcher.load`: the scorer, the name of its LoRA, and the adapters asked for."""
    path = Path(folder)
    about = read_matcher(path)
    check_same_model(path, about["model"], model)
    adapter = about["adapter"]
    adapter = tuple(adapter) if isinstance(adapter, list) else adapter
    base = PairScorer.of(model, replace(_config(about["config"]), memory_budget=memory_budget), adapter)
    check_same_adapters(path, about, base.engine)
    prompt = None
    if about["prompt"]:
        prompt, width = (
            _tensors(path / PROMPT).get("prompt", torch.empty(0, dtype=torch.float32, device="cpu")),
            model.text_width,
        )
        if prompt.ndim != 2 or prompt.shape[1] != width:
            raise ValueError(f"folder: {path / PROMPT} has shape {tuple(prompt.shape)}, expected (n, {width})")
    if about["lora"]:
        own, name = put_lora(base.engine, _tensors(path / LORA, "unet."), f"LoRA {str(path / LORA)!r}")
        return PairScorer(base.engine.with_unet(own), base.config, prompt), name, adapter
    if prompt is not None:
        base = PairScorer(base.engine.with_unet(own_model(base.engine)), base.config, prompt)
    return base, None, adapter


def read_matcher(folder: Path) -> dict[str, Any]:
    """What :func:`save` has written about a matcher, for which no model is needed.

    Raises:
        ValueError: there is no such file, or one of another format.
    """
    try:
        about = json.loads((folder / MATCHER).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"folder: {folder} has no {MATCHER}, expected one that Matcher.save wrote") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"folder: {folder / MATCHER} is no JSON: {error}") from error
    if not isinstance(about, dict) or about.get("format") != 1 or any(key not in about for key in _KEYS):
        raise ValueError(f"folder: {folder / MATCHER} is of another format, expected 1")
    return about


def _tensors(file: Path, prefix: str = "") -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        return read_tensors(file, prefix)[0]
    except FileNotFoundError:
        raise ValueError(f"folder: {file} is missing, expected the file that Matcher.save wrote") from None
    except SafetensorError as error:
        raise ValueError(f"folder: {file} is no safetensors file: {error}") from error


def _config(values: Mapping[str, Any]) -> MatchConfig:
    """JSON has no tuples."""
    unknown = sorted(values.keys() - {each.name for each in fields(MatchConfig)})
    if unknown:
        raise ValueError(f"folder: {MATCHER} has unknown settings: {', '.join(unknown)}")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return MatchConfig(**given)
