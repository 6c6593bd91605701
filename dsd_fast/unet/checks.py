"""The arguments of a plan's calls, checked on the host: a wrong one is a ValueError by name, never a device's fault."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsd_fast.kernels.common.host import as_tensor
from dsd_fast.kernels.common.library import traced
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.architecture import TIME_IDS
from dsd_fast.unet.cut import Cut
from dsd_fast.unet.network import Network
from dsd_fast.unet.text import TextKV

Index = Sequence[int] | Tensor
Residuals = tuple[Sequence[Tensor], Tensor]


def index(name: str, value: Index, count: int | None, limit: int, device: torch.device) -> Tensor:
    """(count,) int64 on ``device``, every value from 0 to limit − 1."""
    given = as_tensor(value)
    if not given.numel():
        given = given.long()
    if given.ndim != 1 or given.dtype.is_floating_point or given.dtype == torch.bool:
        raise ValueError(f"{name}: got {tuple(given.shape)} {given.dtype}, expected a list of integers")
    if count is not None and len(given) != count:
        raise ValueError(f"{name}: got {len(given)} entries, expected {count}")
    if not traced() and len(given):
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name}: values from {low} to {high}, expected 0 to {limit - 1}")
    return upload(given.long(), device)


def timesteps(value: Tensor | Sequence[int] | int, count: int, device: torch.device) -> Tensor:
    """(count,) on ``device``."""
    times = upload(as_tensor(value), device)
    if times.ndim > 1 or (times.ndim == 1 and len(times) != count):
        raise ValueError(f"timesteps: got {tuple(times.shape)}, expected one or ({count},)")
    return times.expand(count)


def time_ids(cut: Cut, value: Tensor | None, count: int, device: torch.device) -> Tensor | None:
    """(count, 6) on ``device`` for a network that reads image sizes, else None."""
    if not cut.network.reads_pooled_text or not cut.reads_text:
        return None
    given = None if value is None else as_tensor(value)
    if given is None or given.shape not in ((TIME_IDS,), (count, TIME_IDS)):
        got = None if given is None else tuple(given.shape)
        raise ValueError(
            f"time_ids: got {got}, expected ({TIME_IDS},) or ({count}, {TIME_IDS}): this network reads image sizes"
        )
    return upload(given, device).expand(count, TIME_IDS)


def timestep_cond(cut: Cut, value: Tensor | None, count: int, device: torch.device) -> Tensor | None:
    """(count, E) on ``device`` in the network's type; None where none is given or no step reads the time."""
    if value is None:
        return None
    width = cut.network.guidance_width
    if not width:
        raise ValueError("timestep_cond: given, expected None: this network reads no guidance embedding")
    given = as_tensor(value)
    if given.shape not in ((width,), (count, width)) or not given.dtype.is_floating_point:
        raise ValueError(
            f"timestep_cond: got {tuple(given.shape)} {given.dtype}, expected ({width},) or ({count}, {width}) float"
        )
    if not cut.reads_time:
        return None
    return upload(given.to(cut.network.dtype), device).expand(count, width)


def latents(network: Network, value: Tensor, device: torch.device) -> None:
    channels = network.latent_channels
    if value.ndim != 4 or value.shape[1] != channels:
        raise ValueError(f"latents: got {tuple(value.shape)}, expected (P, {channels}, h, w)")
    _type(network, "latents", value, device)


def states(
    network: Network,
    value: Tensor,
    pooled: Tensor | None,
    key_bias: Tensor | None,
    score_mask: Tensor | None,
    lengths: Index | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The arguments of ``encode_text``; returns key bias, score mask and lengths as a TextKV holds them."""
    width = network.text_width
    if value.ndim != 3 or value.shape[2] != width:
        raise ValueError(f"states: got {tuple(value.shape)}, expected (M, T, {width})")
    _type(network, "states", value, network.device)
    count, tokens, device = value.shape[0], value.shape[1], value.device
    if network.reads_pooled_text:
        wanted = (count, network.pooled_width)
        if pooled is None or pooled.shape != wanted:
            got = None if pooled is None else tuple(pooled.shape)
            raise ValueError(f"pooled: got {got}, expected {wanted}: this network reads pooled text states")
    for name, given in (("key_bias", key_bias), ("score_mask", score_mask)):
        boolean = given is not None and given.dtype == torch.bool
        if given is not None and (given.shape != (count, tokens) or boolean != (name == "score_mask")):
            kind = "boolean" if name == "score_mask" else "float"
            raise ValueError(
                f"{name}: got {tuple(given.shape)} {given.dtype}, expected (M, T) = ({count}, {tokens}) {kind}"
            )
    real = torch.float64 if value.dtype == torch.float64 else torch.float32
    return (
        None if key_bias is None else upload(key_bias, device, real),
        None if score_mask is None else upload(score_mask, device),
        None if lengths is None else index("lengths", lengths, count, tokens + 1, device),
    )


def text(cut: Cut, value: TextKV | None) -> None:
    """Refuse texts that the cut cannot read, or that were encoded under other adapters than those active now."""
    if value is None:
        if cut.reads_text:
            raise ValueError(f"text: needed by step {next(step.name for step in cut.steps if step.reads_text)!r}")
        return
    missing = [name for name in cut.key_layers if name not in value.k]
    missing += [name for name in cut.value_layers if name not in value.v]
    if missing:
        raise ValueError(f"text: encoded by a plan that does not run {missing[0]!r}; use this plan's encode_text")
    if not traced():
        given = value.signature or {}
        if any(given.get(name, now) != now for name, now in cut.signatures().items()):
            raise ValueError(
                "text: encoded under another adapter than this call's; encode it again with this plan's encode_text"
            )
        _projected(cut, value)


def text_index(value: Index | None, texts: int, rows: int, device: torch.device) -> Tensor | None:
    """The text of each row, (rows,), or None where row b has text b."""
    if value is not None:
        return index("text_index", value, rows, texts, device)
    if texts != rows:
        raise ValueError(f"text_index: needed when there are {texts} texts for {rows} rows")
    return None


def residuals(network: Network, value: Residuals, rows: int, height: int, width: int) -> None:
    down, mid = value
    wanted = [(rows, *shape) for shape in network.residual_shapes(height, width)]
    if len(down) != len(wanted) - 1:
        raise ValueError(
            f"residuals: got {len(down)} down residuals, expected {len(wanted) - 1} and one for the middle"
        )
    for number, (residual, shape) in enumerate(zip((*down, mid), wanted, strict=True)):
        if residual.shape != shape:
            which = "the middle one" if number == len(down) else f"down residual {number}"
            raise ValueError(f"residuals: {which} is {tuple(residual.shape)}, expected {shape}, one per requested row")


def kept(cut: Cut, value: Tensor | None, rows: int, height: int, width: int, device: torch.device | None) -> None:
    """Refuse a kept activation that is not one for each row (on ``device``, or anywhere), or enters nowhere."""
    if cut.entry is None:
        if value is not None:
            raise ValueError("kept: given, expected None: this plan enters the network at its start; see enter of plan")
        return
    wanted = (rows, *cut.kept_shape(height, width))
    if value is None or value.shape != wanted:
        got = None if value is None else tuple(value.shape)
        raise ValueError(f"kept: got {got}, expected {wanted}: {cut.enter!r} of each requested row")
    _type(cut.network, "kept", value, value.device if device is None else device)


def positions(name: str, value: Tensor | Sequence[int] | None, rows: int, limit: int, device: torch.device) -> Tensor:
    """(rows, n) int64 on ``device``, every value from 0 to limit − 1, of (n,) or (rows, n)."""
    if value is None:
        raise ValueError(f"{name}: needed for a plan with maps of a cross-attention")
    chosen = as_tensor(value)
    if chosen.dtype.is_floating_point and chosen.numel():
        raise ValueError(f"{name}: got {chosen.dtype}, expected integers")
    if chosen.ndim not in (1, 2) or (chosen.ndim == 2 and len(chosen) != rows):
        raise ValueError(f"{name}: got {tuple(chosen.shape)}, expected (n,) or ({rows}, n)")
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < limit:
        raise ValueError(f"{name}: positions outside 0 to {limit - 1}")
    return upload(chosen.long(), device).expand(rows, -1)


def not_checkpointed(value: bool) -> None:
    """Refuse checkpointing while something else than the plan compiles the run."""
    if value:
        raise ValueError(
            "checkpoint: got True while torch.compile or torch.export traces the run, expected False; compile the plan "
            "with plan.compile('inductor'), which checkpoints"
        )


def _projected(cut: Cut, value: TextKV) -> None:
    """Refuse keys and values of another type than the queries will have."""
    dtype, device = cut.network.dtype, cut.network.device
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    wanted = (dtype, device)
    for given in (*(value.k[name] for name in cut.key_layers), *(value.v[name] for name in cut.value_layers)):
        if (given.dtype, given.device) != wanted:
            raise ValueError(
                f"text: got keys and values of {given.dtype} on {given.device}, expected {dtype} on {device}, which "
                f"this plan's encode_text makes under the same autocast"
            )


def _type(network: Network, name: str, value: Tensor, device: torch.device) -> None:
    dtype = network.dtype
    if value.dtype != dtype or value.device != device:
        raise ValueError(f"{name}: got {value.dtype} on {value.device}, expected the network's {dtype} on {device}")
