"""What is said of a type that the processor has no arithmetic for."""

import pytest
import torch

from dsd_fast.models.processor import slow_on

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "dtype", "said"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, "bfloat16", True),
        ({"avx2": True}, "bfloat16", True),
        ({"neon": True, "bf16": False}, "bfloat16", True),
        ({"avx512_bf16": True}, "bfloat16", False),
        ({"amx_tile": True, "amx_bf16": True}, "bfloat16", False),
        ({"neon": True, "bf16": True}, "bfloat16", False),
        ({"avx512_bf16": True}, "float16", True),
        ({"avx512_bf16": True, "avx512_fp16": True}, "float16", False),
        ({}, "float32", False),
        ({}, "float64", False),
    ],
)
def test_a_type_without_units_is_told(monkeypatch, found, dtype, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    sentence = slow_on(getattr(torch, dtype), CPU)
    assert (sentence is not None) == said
    assert sentence is None or sentence.startswith(f"this processor has no {dtype} units: float32 is faster")


def test_other_devices_are_not_judged_by_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert slow_on(torch.bfloat16, torch.device("cuda")) is None


@pytest.mark.newest
def test_torch_tells_what_this_processor_has():
    found = torch.cpu.get_capabilities()
    assert "avx512_bf16" in found or "bf16" in found
