"""Compiles a kernel for a GPU that need not be there, and reads what it uses: registers, memory, and its hot loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from dsd_fast.kernels.common.build import Build
from dsd_fast.kernels.common.sass import HotLoop, hot_loop

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory of a block, bytes, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

REGISTERS = 64 * 1024
SHARED_OF_PROCESSOR = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
WARPS = 64
TENSOR_COLUMNS = 512
"""What a multiprocessor has: registers, bytes of shared memory, warps, and on Blackwell columns of tensor memory."""

_USAGE = re.compile(r"Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+)")


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel uses.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread, in memory: more than 0 means that registers did not suffice.
        shared: bytes of shared memory.
        programs: that a multiprocessor holds at once.
        loop: what its hot loop issues.
    """

    registers: int
    stack: int
    shared: int
    programs: int
    loop: HotLoop


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
    options = {"num_warps": build.warps, "num_stages": build.stages, "maxnreg": build.registers.get(capability)}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = usage(compiled.asm["cubin"])
    shared, columns = int(compiled.metadata.shared), int(getattr(compiled.metadata, "tmem_size", 0) or 0)
    programs = resident(registers, shared, build.warps, capability, columns)
    return Resources(registers, stack, shared, programs, hot_loop(compiled.asm["cubin"]))


def resident(registers: int, shared: int, warps: int, capability: int, columns: int = 0) -> int:
    """The programs that a multiprocessor holds at once (CUDA C++ Programming Guide, technical specifications).

    Args:
        registers: of a thread.
        shared: bytes of shared memory of a program.
        warps: of a program.
        capability: 80, 90 or 100.
        columns: of tensor memory of a program.
    """
    # Warps get registers by 256, programs a KiB of shared memory that is not theirs.
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_memory = SHARED_OF_PROCESSOR[capability] // (shared + 1024)
    return min(by_registers, by_memory, WARPS // warps, TENSOR_COLUMNS // columns if columns else WARPS)


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
