"""Runs a kernel's PTX, as nvcc wrote it, for one block: the inline assembly included, operand by operand.

All threads of a block are one numpy array. The instruction executed next is the first, in the order of the text, at
which any thread stands, for the threads that stand there: threads that took different branches meet again, and an
instruction of a whole warp finds all its threads or is an error. Only the instructions that the kernels contain are
known; any other is an error. Approximations are computed exactly, sums of products in float64 and rounded once.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

import numpy as np

SHARED = 1 << 60
"""Where shared memory begins among generic addresses; as addresses of its own it begins at 0."""

TYPES = {"f32": np.dtype("f4")} | {
    f"{kind}{8 * size}": np.dtype(f"{'i' if kind == 's' else 'u'}{size}") for kind in "bus" for size in (1, 2, 4, 8)
}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNARY = {"ex2": np.exp2, "rcp": np.reciprocal, "abs": np.abs, "neg": np.negative, "not": np.invert}
BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "min": np.fmin,
    "max": np.fmax,
}


class Memory:
    """Allocations at addresses far from each other, so that no access beyond one finds another."""

    def __init__(self, shared_bytes: int) -> None:
        # NaN, in every type, until it is written.
        self.allocations = {SHARED >> 32: np.full(shared_bytes, 255, np.uint8)}

    def place(self, data: bytes | np.ndarray) -> int:
        number = len(self.allocations)
        self.allocations[number] = np.frombuffer(bytearray(data), np.uint8)
        return number << 32

    def at(self, address: int, size: int) -> np.ndarray:
        allocation = self.allocations.get(address >> 32)
        offset = address & 0xFFFFFFFF
        if allocation is None or offset + size > len(allocation):
            raise IndexError(f"{size} bytes at {address:#x} are in no allocation")
        if offset % size:
            raise IndexError(f"{size} bytes at {address:#x}: misaligned")
        return allocation[offset : offset + size]


class Kernel:
    """One entry of a PTX module."""

    def __init__(self, ptx: str, name: str) -> None:
        entry = re.search(rf"\.entry (\w*{name}\w*)\((.*?)\)\s*(?:\.\w+ [^\n]*\n)*\{{(.*?)\n\}}", ptx, re.DOTALL)
        if entry is None:
            raise ValueError(f"no entry {name}")
        body = re.sub(r"//[^\n]*|/\*.*?\*/", "", entry[3], flags=re.DOTALL)
        self.code: list[tuple[str, bool, str, list[str]]] = []
        self.labels: dict[str, int] = {}
        for text in (part.strip() for part in re.split(r";|(?<=:)\n", body)):
            while text.endswith(":") or text.startswith("$"):
                label, _, text = (part.strip() for part in text.partition(":"))
                self.labels[label] = len(self.code)
            if not text or text.startswith(".") or text in "{}":
                continue
            guard, opcode, rest = re.fullmatch(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", text, re.DOTALL).groups()
            operands = [x.strip() for x in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)]
            self.code.append(((guard or "").lstrip("!"), (guard or "").startswith("!"), opcode, operands))

    def run(self, memory: Memory, parameters: bytes, block: int, threads: int) -> None:
        Block(self, memory, parameters, block, threads).run()


class Block:
    def __init__(self, kernel: Kernel, memory: Memory, parameters: bytes, block: int, threads: int) -> None:
        self.kernel, self.memory, self.parameters, self.threads = kernel, memory, parameters, threads
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": np.arange(threads, dtype=np.uint64),
            "%ctaid.x": np.full(threads, block, np.uint64),
        }
        self.counter = np.zeros(threads, int)
        self.copies: list[list[tuple[np.ndarray, np.ndarray | None]]] = [[] for _ in range(threads)]

    def run(self) -> None:
        end = len(self.kernel.code)
        with np.errstate(all="ignore"):
            while (now := self.counter.min()) < end:
                here = self.counter == now
                guard, negated, opcode, operands = self.kernel.code[now]
                self.counter[here] += 1
                if guard:
                    here = here & (self.registers[guard].astype(bool) != negated)
                if opcode.startswith("bra"):
                    self.counter[here] = self.kernel.labels[operands[0]]
                elif opcode == "ret":
                    self.counter[here] = end
                elif here.any():
                    self.execute(opcode.split("."), operands, here)
        if any(self.copies):
            raise RuntimeError("a thread ended with copies that it did not wait for")

    # Operands

    def get(self, operand: str, kind: str) -> np.ndarray:
        """The operand of every thread in numpy's type for PTX's `kind`."""
        dtype = TYPES.get(kind, np.dtype("u8"))
        negative = operand.startswith("-%")
        operand = operand[1:] if negative else operand
        if operand in self.registers:
            raw = self.registers[operand]
        elif operand.startswith("0f"):
            raw = np.full(self.threads, int(operand[2:], 16), np.uint64)
        elif re.fullmatch(r"-?\d+", operand):
            raw = np.full(self.threads, int(operand) & 0xFFFFFFFFFFFFFFFF, np.uint64)
        elif operand.startswith("%"):
            raise ValueError(f"{operand} is read before it is written")
        elif operand.endswith(("memoryE", "_param_0")):
            # The addresses of shared memory and of the parameters are offsets in them.
            raw = np.zeros(self.threads, np.uint64)
        else:
            raise ValueError(f"unknown operand {operand}")
        values = raw.astype(f"u{dtype.itemsize}").view(dtype)
        return -values if negative else values

    def put(self, register: str, values: np.ndarray, here: np.ndarray) -> None:
        """Keeps the bits of `values`, which have the register's type."""
        values = np.broadcast_to(np.asarray(values), self.threads)
        raw = values.astype(np.uint64) if values.dtype == bool else values.copy().view(f"u{values.itemsize}")
        old = self.registers.get(register, np.zeros(self.threads, np.uint64))
        self.registers[register] = np.where(here, raw.astype(np.uint64), old)

    def addresses(self, operand: str) -> np.ndarray:
        name, _, offset = operand[1:-1].partition("+")
        return self.get(name, "u64") + np.uint64(int(offset or 0) & 0xFFFFFFFFFFFFFFFF)

    def lanes(self, here: np.ndarray) -> list[range]:
        """The warps that execute an instruction of whole warps."""
        warps = [range(start, start + 32) for start in range(0, self.threads, 32) if here[start : start + 32].any()]
        if not all(here[list(warp)].all() for warp in warps):
            raise RuntimeError("an instruction of a whole warp without some of its threads")
        return warps

    # Instructions

    def execute(self, opcode: list[str], operands: list[str], here: np.ndarray) -> None:
        name, kind = opcode[0], opcode[-1]
        if name == "ld" and opcode[1] == "param":
            self.load_parameter(opcode, operands, here)
        elif name in ("ld", "st"):
            self.access(opcode, operands, here)
        elif name == "cp":
            self.copy(opcode, operands, here)
        elif name in ("mma", "ldmatrix", "shfl"):
            getattr(self, name)(opcode, operands, here)
        elif name == "bar":
            if opcode[1] == "sync" and not here.all():
                raise RuntimeError("a barrier without some threads")
            self.lanes(here)
        elif name == "mov":
            self.move(operands, kind, here)
        elif name == "cvta":
            self.put(
                operands[0], self.get(operands[1], "u64") + np.uint64(SHARED if opcode[1] == "shared" else 0), here
            )
        elif name == "setp":
            a, b = self.get(operands[1], kind), self.get(operands[2], kind)
            unordered = kind == "f32" and opcode[1].endswith("u")
            result = COMPARISONS[opcode[1][:2]](a, b)
            ordered = ~(np.isnan(a) | np.isnan(b)) if kind == "f32" else np.True_
            self.put(operands[0], result | ~ordered if unordered else result & ordered, here)
        elif name == "selp":
            chosen = self.get(operands[3], "pred").astype(bool)
            self.put(operands[0], np.where(chosen, self.get(operands[1], kind), self.get(operands[2], kind)), here)
        else:
            self.put(operands[0], self.compute(opcode, operands[1:], kind), here)

    def compute(self, opcode: list[str], operands: list[str], kind: str) -> np.ndarray:
        name = opcode[0]
        if name == "cvt":
            return self.convert(opcode[1:], operands)
        values = [self.get(x, kind) for x in operands]
        if kind == "pred":
            values = [x.astype(bool) for x in values]
        if name in ("shl", "shr"):
            count = self.get(operands[1], "u32").astype(np.uint64)
            bits = np.uint64(8 * values[0].itemsize - 1)
            shifted = values[0] << np.minimum(count, bits).astype(values[0].dtype)
            if name == "shr":
                shifted = values[0] >> np.minimum(count, bits).astype(values[0].dtype)
            return np.where(count > bits, np.zeros_like(shifted), shifted)
        if name in ("mul", "mad") and "wide" in opcode:
            wide = np.dtype(f"{values[0].dtype.kind}{2 * values[0].itemsize}")
            return values[0].astype(wide) * values[1].astype(wide)
        if name in ("mad", "fma"):
            if kind == "f32":
                a, b, c = (x.astype(np.float64) for x in values)
                return (a * b + c).astype(np.float32)
            return values[0] * values[1] + values[2]
        if name == "bfi":
            insert, into, start, length = values
            mask = ((np.uint32(1) << length) - np.uint32(1)) << start
            return (into & ~mask) | (insert << start & mask)
        if name in UNARY:
            return UNARY[name](values[0])
        if name == "div":
            return values[0] / values[1] if kind == "f32" else values[0] // values[1]
        return BINARY[name](*values)

    def convert(self, kinds: list[str], operands: list[str]) -> np.ndarray:
        to, source = [x for x in kinds if x not in ("rn", "rz", "rzi", "rni")]
        values = self.get(operands[0], source)
        if to in ("f16x2", "bf16x2"):
            high, low = (_rounded(self.get(x, "f32"), to).astype(np.uint32) for x in operands)
            return high << np.uint32(16) | low
        return values.astype(TYPES[to])

    def move(self, operands: list[str], kind: str, here: np.ndarray) -> None:
        to, source = operands
        values = self.get(source, kind)
        self.put(to, values.astype(bool) if kind == "pred" else values, here)

    def load_parameter(self, opcode: list[str], operands: list[str], here: np.ndarray) -> None:
        dtype = TYPES[opcode[-1]]
        name, _, offset = operands[1][1:-1].partition("+")
        # A parameter's address is its offset.
        start = int(self.registers[name][0]) if name in self.registers else 0
        start = (start + int(offset or 0)) & 0xFFFFFFFFFFFFFFFF
        for i, register in enumerate(_parts(operands[0])):
            self.put(register, np.frombuffer(self.parameters, dtype, 1, start + i * dtype.itemsize)[0], here)

    def access(self, opcode: list[str], operands: list[str], here: np.ndarray) -> None:
        load = opcode[0] == "ld"
        memory, values = (operands[1], operands[0]) if load else (operands[0], operands[1])
        registers, dtype = _parts(values), TYPES[opcode[-1]]
        addresses = self.addresses(memory) + np.uint64(SHARED if "shared" in opcode else 0)
        size = dtype.itemsize * len(registers)
        if load:
            loaded = np.zeros((self.threads, len(registers)), dtype)
            for i in np.flatnonzero(here):
                loaded[i] = self.memory.at(int(addresses[i]), size).view(dtype)
            for column, register in enumerate(registers):
                self.put(register, loaded[:, column], here)
        else:
            stored = np.stack([self.get(x, opcode[-1]) for x in registers], 1)
            for i in np.flatnonzero(here):
                self.memory.at(int(addresses[i]), size)[:] = stored[i].view(np.uint8)

    def copy(self, opcode: list[str], operands: list[str], here: np.ndarray) -> None:
        if opcode[2] == "wait_all":
            for i in np.flatnonzero(here):
                for to, source in self.copies[i]:
                    to[:] = 0 if source is None else source
                self.copies[i].clear()
            return
        to, source = self.addresses(operands[0]), self.addresses(operands[1])
        size, real = int(operands[2]), self.get(operands[3], "u32")
        for i in np.flatnonzero(here):
            target = self.memory.at(SHARED + int(to[i]), size)
            target[:] = 255
            self.copies[i].append((target, self.memory.at(int(source[i]), size) if real[i] == size else None))

    def shfl(self, opcode: list[str], operands: list[str], here: np.ndarray) -> None:
        self.lanes(here)
        lanes, clamp, members = (int(self.get(x, "u32")[0]) for x in operands[2:])
        if opcode[2] != "bfly" or clamp != 31 or members != 0xFFFFFFFF:
            raise ValueError(f"{'.'.join(opcode)} {operands} is not known")
        # Its second result, whether the source exists, stands behind a bar.
        register = operands[0].split("|")[0]
        self.put(register, self.get(operands[1], "b32")[np.arange(self.threads) ^ lanes], here)

    def ldmatrix(self, opcode: list[str], operands: list[str], here: np.ndarray) -> None:
        registers, addresses = _parts(operands[0]), self.addresses(operands[1])
        if opcode[:4] != ["ldmatrix", "sync", "aligned", "m8n8"] or opcode[4] != f"x{len(registers)}":
            raise ValueError(f"{'.'.join(opcode)} is not known")
        results = np.zeros((len(registers), self.threads), np.uint32)
        for warp in self.lanes(here):
            for i in range(len(registers)):
                rows = [self.memory.at(SHARED + int(addresses[warp[8 * i + r]]), 16).view(np.uint16) for r in range(8)]
                matrix = np.stack(rows)
                matrix = matrix.T if "trans" in opcode else matrix
                results[i, list(warp)] = np.ascontiguousarray(matrix).view(np.uint32).reshape(32)
        for register, values in zip(registers, results, strict=True):
            self.put(register, values, here)

    def mma(self, opcode: list[str], operands: list[str], here: np.ndarray) -> None:
        d, a, b, c = (_parts(x) for x in operands)
        k = {"m16n8k16": 16, "m16n8k8": 8}[opcode[3]]
        if opcode[4:6] != ["row", "col"] or len(a) != k // 4 or len(b) != k // 8 or opcode[7] != opcode[8]:
            raise ValueError(f"{'.'.join(opcode)} {operands} is not known")
        bits = [np.stack([self.get(x, "b32") for x in group], 1) for group in (a, b)]
        a_values, b_values = (_numbers(x, opcode[7]) for x in bits)
        sums = np.stack([self.get(x, "f32") for x in c], 1)
        lane = np.arange(32)
        group, member = lane >> 2, lane % 4
        for warp in self.lanes(here):
            threads = list(warp)
            left, right = np.zeros((16, k)), np.zeros((k, 8))
            for i in range(k // 2):
                low = i < 2 or 4 <= i < 6
                left[group if low else group + 8, member * 2 + (i & 1) + (8 if i >= 4 else 0)] = a_values[threads, i]
            for i in range(k // 4):
                right[member * 2 + (i & 1) + (8 if i >= 2 else 0), group] = b_values[threads, i]
            product = left @ right
            for i in range(4):
                sums[threads, i] += product[group if i < 2 else group + 8, member * 2 + (i & 1)]
        for i, register in enumerate(d):
            self.put(register, sums[:, i], here)


def _parts(operand: str) -> Sequence[str]:
    return [x.strip() for x in operand.strip("{}").split(",")]


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """(threads, n) registers of two elements → (threads, 2 n) float64."""
    halves = np.ascontiguousarray(bits).view(np.uint16)
    if kind == "f16":
        return halves.view(np.float16).astype(np.float64)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _rounded(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16x2":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)


def pack_forward(
    pointers: Sequence[int], strides: Sequence[int], sizes: Sequence[int], counts: Sequence[int], scale: float
) -> bytes:
    """The struct Forward of csrc/cross_attention_score/cuda/forward.h."""
    return struct.pack("12Q8q2q6if4x", *pointers, *strides, *sizes, *counts, scale)
