"""Which timesteps and which cross-attention layers an official call asks for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsd_fast.diffusion import official_timesteps, resolve_timesteps

Index = int | str | None
LayerMask = Sequence[str] | Sequence[bool] | Tensor | None

PARTS = ("down", "mid", "up")
_ID = re.compile(r"(down|mid|up)(?:-level(\d+)-repeat(\d+))?-vit-block(\d+)-cross")


def timestep_grid(
    num_train_timesteps: int,
    sampling_steps: int,
    strength: float,
    num_inference_steps: int,
    sampled_timestep: int | Sequence[int] | None,
) -> list[int]:
    """The timesteps of a call, ascending on the official grid, or as given by ``sampled_timestep``.

    Source: `sampled_timesteps` of the official `pipeline_dsd.py`, where `strength` and `num_inference_steps` do no more
    than set how many timesteps are left out at either end of the schedule: 10 by default.

    Raises:
        ValueError: an argument outside its range, by name.
    """
    if sampled_timestep is not None:
        one = isinstance(sampled_timestep, int) or (isinstance(sampled_timestep, Tensor) and sampled_timestep.ndim == 0)
        try:
            return resolve_timesteps([sampled_timestep] if one else sampled_timestep, num_train_timesteps)  # type: ignore[list-item]
        except ValueError as error:
            raise ValueError(f"sampled_timestep: {error}") from error
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: got {strength!r}, expected 0 to 1")
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: got {num_inference_steps!r}, expected an integer of at least 1")
    margin = max(num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps), 0)
    if 2 * margin >= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps, strength: leave out {margin} timesteps at either end, which is all "
            f"{num_train_timesteps}"
        )
    return official_timesteps(sampling_steps, num_train_timesteps, margin=margin)


def select_layers(
    score_ids: Callable[[], Sequence[str]],
    *,
    ublock: str | None,
    level: Index,
    block: Index,
    attn: Index,
    tfblock: Index,
    layer_mask: LayerMask,
) -> str | list[str]:
    """The score ids a call selects, or "official" where it selects none.

    The ids read `up-level1-repeat2-vit-block0-cross`: part, block of that part, transformer of that block, transformer
    block of that transformer. In the official dictionary of scores these are the keys "up", "block_1", "attn_2" and
    "tfblock_0". What is not given is chosen as the official code does when it chooses everything: of a part the last
    block with cross-attention, of a block all transformers, of a transformer the last transformer block.

    Raises:
        ValueError: an argument that names no layer, or arguments that contradict each other.
    """
    chain = {"level": level, "block": block, "attn": attn, "tfblock": tfblock}
    if layer_mask is not None:
        if ublock is not None or any(value is not None for value in chain.values()):
            raise ValueError("layer_mask: give either this or ublock with level, block, attn, tfblock")
        return _masked(layer_mask, list(score_ids()))
    if ublock is None:
        for name, value in chain.items():
            if value is not None:
                raise ValueError(f"{name}: got {value!r} without ublock, expected ublock='down', 'mid' or 'up' with it")
        return "official"
    if ublock not in PARTS:
        raise ValueError(f"ublock: got {ublock!r}, expected 'down', 'mid' or 'up'")
    found = [(name, match) for name in score_ids() if (match := _ID.fullmatch(name)) and match[1] == ublock]
    if not found:
        raise ValueError(f"ublock: got {ublock!r}, a part in which this UNet has no cross-attention")
    # (id, block, transformer, transformer block); the middle part has one of the first two.
    rows = [(name, int(match[2] or 0), int(match[3] or 0), int(match[4])) for name, match in found]
    wanted = _same_block(ublock, level, block)
    name = "level" if level is not None else "block"
    rows = _keep(rows, 1, name, chain[name], max(row[1] for row in rows) if wanted is None else wanted, ublock)
    if attn is not None:
        rows = _keep(rows, 2, "attn", attn, _number("attn", attn, ("attn",)), ublock)
    if tfblock is not None:
        rows = _keep(rows, 3, "tfblock", tfblock, _number("tfblock", tfblock, ("tfblock",)), ublock)
        return [row[0] for row in rows]
    last = {row[2]: row[0] for row in rows}
    return list(last.values())


def _same_block(part: str, level: Index, block: Index) -> int | None:
    """The block that `level` and `block` name; the official dictionary has one key for the two of them."""
    numbers = {
        name: 0 if part == "mid" and value == "block" else _number(name, value, ("level", "block"))
        for name, value in (("level", level), ("block", block))
        if value is not None
    }
    if len(set(numbers.values())) > 1:
        raise ValueError(f"level, block: got {level!r} and {block!r}, which name two blocks; expected one")
    return next(iter(numbers.values()), None)


def _number(name: str, value: Any, words: tuple[str, ...]) -> int:
    """2 from 2, "2", "block_2" or "block2"."""
    match = re.fullmatch(rf"(?:(?:{'|'.join(words)})_?)?(\d+)", str(value))
    if match is None or isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected a number, or one as in '{words[-1]}_0'")
    return int(match[1])


def _keep(
    rows: list[tuple[str, int, int, int]], column: int, name: str, given: Index, wanted: int, part: str
) -> list[tuple[str, int, int, int]]:
    kept = [row for row in rows if row[column] == wanted]
    if not kept:
        there = ", ".join(str(number) for number in sorted({int(row[column]) for row in rows}))
        raise ValueError(f"{name}: got {given!r}, but cross-attention in the {part} part is at {there}")
    return kept


def _masked(mask: LayerMask, ids: list[str]) -> list[str]:
    """Score ids as they are, or a bool for each of the model's cross-attentions."""
    values = mask.tolist() if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 1 else mask
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"layer_mask: got {mask!r}, expected score ids, or a bool for each of {len(ids)} layers")
    if all(isinstance(value, str) for value in values):
        for value in values:
            if value not in ids:
                raise ValueError(f"layer_mask: got {value!r}, expected ids out of {', '.join(ids)}")
        return [str(value) for value in dict.fromkeys(values)]
    if len(values) != len(ids) or not all(isinstance(value, bool) for value in values):
        raise ValueError(f"layer_mask: got {len(values)} values, expected score ids, or a bool for each of {len(ids)}")
    if not any(values):
        raise ValueError("layer_mask: selects no layer")
    return [name for name, chosen in zip(ids, values, strict=True) if chosen]
