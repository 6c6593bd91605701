"""Compiles a kernel for a GPU that need not be there, and reads what it uses: registers, stack and shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from dsd_fast.kernels.common.build import Build

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory of a block, bytes, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

_USAGE = re.compile(r"Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+)")


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel uses.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread, in memory: more than 0 means that registers did not suffice.
        shared: bytes of shared memory.
    """

    registers: int
    stack: int
    shared: int


def measure(build: Build, capability: int) -> Resources:
    """Compiles ``build`` for the compute capability 80, 90 or 100, with the assembler that Triton brings.

    Raises:
        RuntimeError: Triton interprets kernels instead of compiling them, or the assembler's report is not understood.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, there is nothing to compile")
    names = build.kernel.arg_names
    source = ASTSource(
        fn=build.kernel,
        signature={name: "constexpr" if name in build.constants else build.signature[name] for name in names},
        constexprs=dict(build.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(build.divisible)},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = usage(compiled.asm["cubin"])
    return Resources(registers, stack, int(compiled.metadata.shared))


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, of the kernel of a compiled binary.

    Raises:
        RuntimeError: the assembler's report is not understood.
    """
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # LOCAL is 0 in this report even where registers are spilled: spills lie in STACK.
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = _USAGE.search(report)
    if match is None:
        raise RuntimeError(f"no register count in cuobjdump's report: {report.strip()}")
    return int(match["registers"]), int(match["stack"])
