"""Which types the processor that this runs on has arithmetic for."""

from __future__ import annotations

import torch

_UNITS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""Type → what of :func:`torch.cpu.get_capabilities` multiplies and adds in it, on x86 and on ARM."""


def units(dtype: torch.dtype) -> list[str]:
    """Name the instructions of this processor that multiply and add in a type of 16 bits; none for other types."""
    found = torch.cpu.get_capabilities()
    return [unit for unit in _UNITS.get(dtype, ()) if found.get(unit, False)]


def slow_on(dtype: torch.dtype, device: torch.device) -> str | None:
    """Say in a sentence that a network of that type is slow on that device; None where nothing is to be said.

    A CPU without units for a type of 16 bits converts every number to float32 and back.
    """
    if device.type != "cpu" or dtype not in _UNITS or units(dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    return f"this processor has no {name} units: float32 is faster on it, and more exact"
