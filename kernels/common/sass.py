"""What the hot loop of a compiled kernel issues, read from its machine code.

A kernel's hot loop is its largest; of a kernel without loops all of it. Counts are of instructions of a warp, a turn of
the loop; a slot is one of any kind, and takes a scheduler a clock.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z]\w*(?:\.\w+)*)(?P<operands>[^;]*);")
_LABEL = re.compile(r"^(?P<label>\.L\w+):")
_TARGET = re.compile(r"`\((?P<label>\.L\w+)\)")

_GLOBAL = {"LDG", "STG", "LDGSTS"}
_LOCAL = {"LDL", "STL"}
_WARPGROUP = {"HGMMA", "UTCHMMA"}


@dataclass(frozen=True)
class HotLoop:
    """What a warp issues.

    Attributes:
        slots: instructions.
        barriers: of a program's warps.
        warpgroup: products of the matrix unit that four warps start together (Hopper's and Blackwell's).
        warp: products of the matrix unit that each warp starts for itself.
        wide, narrow: loads and stores of global memory, of 16 bytes a thread and of fewer.
        local: loads and stores of the stack, also outside of the loop.
    """

    slots: int
    barriers: int
    warpgroup: int
    warp: int
    wide: int
    narrow: int
    local: int


def hot_loop(cubin: bytes) -> HotLoop:
    """Of the one kernel of a compiled binary, with the disassembler that Triton brings.

    Raises:
        RuntimeError: what the disassembler says is not understood.
    """
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return read(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read(text: str) -> HotLoop:
    """As :func:`hot_loop`, of the disassembler's text."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match["label"]] = len(code)
        elif match := _INSTRUCTION.match(line):
            code.append((match["name"], match["operands"]))
    if not code:
        raise RuntimeError(f"no instructions in the disassembler's text: {text[:200].strip()}")
    loops = [
        (labels[target["label"]], place + 1)
        for place, (name, operands) in enumerate(code)
        # What ends a kernel, and fills it up, is a jump to itself.
        if name.startswith("BRA") and (target := _TARGET.search(operands)) and labels[target["label"]] < place
    ]
    first, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(code)))
    body = [name for name, _ in code[first:end]]
    kinds = Counter(name.partition(".")[0] for name in body)
    access = [name for name in body if name.partition(".")[0] in _GLOBAL]
    wide = sum("128" in name.split(".") for name in access)
    return HotLoop(
        slots=len(body),
        barriers=kinds["BAR"],
        warpgroup=sum(kinds[kind] for kind in _WARPGROUP),
        warp=kinds["HMMA"],
        wide=wide,
        narrow=len(access) - wide,
        local=sum(name.partition(".")[0] in _LOCAL for name, _ in code),
    )
