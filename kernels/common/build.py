"""What a Triton kernel is compiled with, so that each tuned configuration can be compiled and judged without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Build:
    """One configuration of a kernel, as a launch of it would be compiled.

    Attributes:
        name: what tells it from the others of its operator: "forward output+lse D40 T77 bf16".
        kernel: the jit function.
        signature: type of each argument that is no constant, by name: "*bf16", "*fp32", "i64", "fp32".
        constants: the constexpr arguments.
        divisible: names of the arguments that are multiples of 16, as a launch finds of pointers and strides.
        warps, stages: of the launch.
        registers: the most that a thread may have, by architecture; none: the compiler's choice.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: frozenset[str] = field(default_factory=frozenset)
    warps: int = 4
    stages: int = 2
    registers: Mapping[int, int] = field(default_factory=dict)
