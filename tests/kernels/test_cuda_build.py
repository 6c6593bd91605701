"""The CUDA library compiled by nvcc, without a GPU: what each kernel takes, and what its instructions compute.

`python -m tests.kernels.test_cuda_build` writes the table of `benchmarks/results/resources-cuda.csv` anew.
"""

import csv
import itertools
import math
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from tests.kernels import ptx
from tests.kernels.test_cuda_source import DTYPES, WIDTHS, check, draw
from tests.repository.source import ROOT

SOURCES = ROOT / "csrc"
FOLDER = SOURCES / "cross_attention_score" / "cuda"
TABLE = ROOT / "benchmarks" / "results" / "resources-cuda.csv"
COLUMNS = (
    *("nvcc", "kernel", "type", "width", "keys", "output", "architecture"),
    *("registers", "stack", "spills", "shared"),
)
TYPES = {"Half": "float16", "BFloat16": "bfloat16"}
ARCHITECTURES = ("sm_80", "sm_90")
PROCESSES = 2

USED = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
FORWARD = re.compile(r"forward_kernelINS0_\d+(Half|BFloat16)ELi(\d+)ELb([01])ELb([01])E")


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the usual folder, or of the PATH."""
    found = [Path(folder, "bin", "nvcc") for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if folder]
    found += [Path(path) for path in [shutil.which("nvcc")] if path]
    return next((path for path in found if path.exists()), None)


@pytest.fixture(scope="module")
def nvcc() -> Path:
    found = find_nvcc()
    if found is None:
        pytest.skip("no nvcc in CUDA_HOME, /usr/local/cuda or PATH")
    return found


def release(nvcc: Path) -> str:
    told = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release ([\d.]+)", told)[1]


def compile_source(nvcc: Path, source: Path, *arguments: object) -> str:
    """Compiles and does not link: the wheel of a torch without CUDA has the headers, but not the library."""
    includes = [SOURCES, *cpp_extension.include_paths()] if source.suffix == ".cpp" else [SOURCES]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    command = [nvcc, "-std=c++20", "-O3", *defines, *(f"-I{path}" for path in includes), *arguments, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stderr


def table_rows(nvcc: Path) -> list[dict[str, str]]:
    """What ptxas says of every kernel, and how much shared memory its launch asks for."""
    targets = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in ARCHITECTURES]
    # The widest first, so that none of them is waited for alone.
    sources = sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cpp")], key=lambda file: file.stem[-3:], reverse=True)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(PROCESSES) as pool:

        def compile_one(source: Path) -> str:
            return compile_source(nvcc, source, "-Xptxas=-v", *targets, "-c", "-o", Path(scratch, f"{source.name}.o"))

        told = "".join(pool.map(compile_one, sources))
    rows, version = [], release(nvcc)
    for used in USED.finditer(told):
        forward = FORWARD.search(used["name"])
        row = dict.fromkeys(COLUMNS, "") | {"nvcc": version, "kernel": "forward" if forward else "mean", "shared": "0"}
        if forward:
            kind, width, fixed, output = forward.groups()
            keys = 80 if fixed == "1" else 128
            row |= {"type": TYPES[kind], "width": width, "keys": str(keys), "output": output}
            # As shared_bytes in forward.h: keys, values, a tile of queries for each of 4 warps, biases and marks.
            row["shared"] = str(2 * int(width) * (keys * (1 + int(output)) + 4 * 16) + 2 * 4 * keys)
        row |= {name: used[name] for name in ("architecture", "registers", "stack")}
        row["spills"] = str(int(used["stores"]) + int(used["loads"]))
        rows.append(row)
    return sorted(rows, key=lambda row: [(len(row[name]), row[name]) for name in COLUMNS])


@pytest.mark.slow
def test_no_kernel_needs_a_stack_or_spills(nvcc):
    rows = table_rows(nvcc)
    kernels = {tuple(row[name] for name in ("type", "width", "keys", "output", "architecture")) for row in rows}
    grid = itertools.product(TYPES.values(), map(str, WIDTHS), ("80", "128"), ("0", "1"), ARCHITECTURES)
    assert kernels == {*grid, *(("", "", "", "", name) for name in ARCHITECTURES)}
    assert [row for row in rows if row["stack"] != "0" or row["spills"] != "0"] == []
    with TABLE.open(newline="") as file:
        committed = list(csv.DictReader(file))
    if committed[0]["nvcc"] != release(nvcc):
        pytest.skip(f"the table is of nvcc {committed[0]['nvcc']}, whose numbers may differ")
    assert rows == committed


def run_ptx(text, mean_text, q, k, v, index, length=None, bias=None, mask=None, *, heads, mean=False):
    """What `reference.forward` returns with ``save``, from the instructions that nvcc made, block after block."""
    rows, positions, width = q.shape
    tokens = k.shape[1]
    head_width = width // heads
    # As is_fixed and cut_into_blocks of forward.h, with blocks of one round.
    fixed, tiles = length is None and 64 < tokens <= 80, math.ceil(positions / 16)
    chunks, keys, lines = math.ceil(tiles / 4), 80 if fixed else 128, rows * heads
    memory = ptx.Memory(2 * head_width * (keys * (1 if v is None else 2) + 4 * 16) + 2 * 4 * keys)

    def place(x):
        return 0 if x is None else memory.place(x.view(torch.uint8).numpy().tobytes())

    def result(*shape, dtype=torch.float32):
        return memory.place(b"\xff" * (math.prod(shape) * dtype.itemsize)), shape, dtype

    nothing = (0, (0,), q.dtype)
    out = nothing if v is None else result(*q.shape, dtype=q.dtype)
    score = result(rows, heads) if mean else result(rows, heads, positions)
    sums = result(lines, tiles) if mean else nothing
    saved = [result(rows, heads, positions) for _ in range(1 if mask is None else 2)]
    parameters = ptx.pack_forward(
        pointers=[
            *(place(x) for x in (q, k, v, index, length, bias, mask)),
            *(x[0] for x in (out, score, sums, saved[0], nothing if mask is None else saved[1])),
        ],
        strides=[positions * width, width, tokens * width, width, tokens * width, width, tokens, tokens],
        sizes=[rows, positions],
        counts=[tiles, tokens, heads, width, 1, chunks],
        scale=head_width**-0.5,
    )
    kernel = ptx.Kernel(text, f"forward_kernel\\w*ELi{head_width}ELb{int(fixed)}ELb{int(v is not None)}E")
    for block in range(lines * chunks):
        kernel.run(memory, parameters, block, 128)
    if mean:
        for block in range(math.ceil(lines / 4)):
            ptx.Kernel(mean_text, "mean_kernel").run(memory, parameters, block, 128)

    def read(place, shape, dtype):
        data = memory.allocations[place >> 32].tobytes() if place else b""
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)

    return read(*out), read(*score), torch.stack([read(*x) for x in saved])


@pytest.fixture(scope="module")
def to_ptx(nvcc, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptx")

    def to_ptx(name: str, architecture: str = "compute_80") -> str:
        target = folder / f"{name}-{architecture}.ptx"
        if not target.exists():
            compile_source(nvcc, FOLDER / f"{name}.cu", f"-arch={architecture}", "-ptx", "-o", target)
        return target.read_text()

    return to_ptx


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS, ids="D{}".format)
def test_instructions_compute_what_the_reference_does(to_ptx, width, dtype):
    text = to_ptx(f"forward_{'bf16' if dtype == torch.bfloat16 else 'f16'}_{width}")
    q, k, v, index, g = draw(dtype, width, positions=21)
    case = (q, k, v, index)
    check(run_ptx(text, "", *case, heads=2), *case, heads=2, save=True)
    # Two blocks a line, keys in groups of 16, some masked and NaN, some not scored.
    q, k, v, index, g = draw(dtype, width, rows=1, positions=70)
    bias, mask = torch.randn(3, 77, generator=g), torch.rand(3, 77, generator=g) > 0.4
    bias[:, ::7] = -math.inf
    k[:, ::7] = v[:, ::7] = math.nan
    case = (q, k, v, index, torch.tensor([50, 33, 77]), bias, mask)
    check(run_ptx(text, "", *case, heads=2), *case, heads=2, save=True)


@pytest.mark.parametrize("tokens", [77, 40], ids="T{}".format)
@pytest.mark.parametrize("architecture", ["compute_80", "compute_90"])
def test_instructions_of_score_and_mean(to_ptx, architecture, tokens):
    text, mean_text = to_ptx("forward_bf16_40", architecture), to_ptx("launch", architecture)
    q, k, _, index, g = draw(torch.bfloat16, 40, positions=67, tokens=tokens)
    for mask in (None, torch.rand(3, tokens, generator=g) > 0.4):
        case = (q, k, None, index, None, None, mask)
        check(run_ptx(text, mean_text, *case, heads=2, mean=True), *case, heads=2, mean=True, save=True)


if __name__ == "__main__":
    with TABLE.open("w", newline="") as table:
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table_rows(find_nvcc()))
