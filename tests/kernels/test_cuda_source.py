"""The CUDA source of cross_attention_score without a GPU: the kernels and the operator, unchanged, run on the CPU.

`cuda_host/` holds what the kernels' warp-wide instructions do, so that g++ compiles the kernels' source, with a
sanitizer that sees every access outside of an input, a result or shared memory. What it replaces is not seen:
csrc/common/cuda/primitives.cuh, which test_cuda_build.py looks at.
"""

import itertools
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from dsd_fast.kernels.cross_attention_score import reference
from tests.kernels.test_cross_attention_score import error, floor, written_out
from tests.repository.source import ROOT

INF, NAN = float("inf"), float("nan")
SOURCES = ROOT / "csrc"
HOST = Path(__file__).parent / "cuda_host"
WIDTHS = (40, 64, 80, 128, 160)
DTYPES = (torch.float16, torch.bfloat16)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def compile_on_host(source: str, path: Path, *arguments: object) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    common = ("-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-I", HOST, "-I", SOURCES)
    subprocess.run([compiler, *common, HOST / source, "-o", path, *arguments], check=True)
    return path


@pytest.fixture(scope="module")
def executable(tmp_path_factory) -> Path:
    return compile_on_host(
        "main.cpp", tmp_path_factory.mktemp("cuda_host") / "cuda_host", "-fsanitize=address", "-Werror"
    )


@pytest.fixture(scope="module")
def operator(tmp_path_factory):
    """The operator itself, its kernels run on the CPU and its tensors there."""
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    path = tmp_path_factory.mktemp("operator") / "operator.so"
    compile_on_host("operator_on_host.cpp", path, "-shared", "-fPIC", STABLE_ABI, *includes, *libraries, "-ltorch_cpu")
    torch.ops.load_library(str(path))
    return torch.ops.dsd_fast_cuda_on_host.cross_attention_score


def run(executable, q, k, v, index, length=None, bias=None, mask=None, *, heads, scale=None, mean=False, save=False,
        multiprocessors=1, reversed_order=False):  # fmt: skip
    """What `reference.forward` returns, from the kernels. Strides are handed over, and storages without a byte more."""
    rows, positions, width = q.shape
    tokens = k.shape[1]
    storages = [b"" if x is None else storage(x) for x in (q, k, v, index, length, bias, mask)]
    scale = (width // heads) ** -0.5 if scale is None else scale
    numbers = [
        *(q.dtype == torch.bfloat16, width // heads, rows, positions, tokens, heads, mean, save),
        *(multiprocessors, reversed_order, *q.stride()[:2], *k.stride()[:2]),
        *((0, 0) if v is None else v.stride()[:2]),
        *(0 if x is None else x.stride(0) for x in (bias, mask)),
        *map(len, storages),
    ]
    request = struct.pack(f"{len(numbers)}qd", *numbers, scale) + b"".join(storages)
    # Fibers change stacks, which the search for leaks and for uses after return does not follow.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    done = subprocess.run([executable], input=request, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    saved = (1 if mask is None else 2) if save else 0
    shapes = [
        (q.shape if v is not None else (0,), q.dtype),
        ((rows, heads) if mean else (rows, heads, positions), torch.float32),
        ((saved, rows, heads, positions), torch.float32),
    ]
    results, offset = [], 0
    for shape, dtype in shapes:
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        part = bytearray(done.stdout[offset : offset + size])
        results.append(torch.frombuffer(part, dtype=dtype).view(shape) if count else torch.empty(shape, dtype=dtype))
        offset += size
    assert offset == len(done.stdout)
    return tuple(results)


def storage(x: torch.Tensor) -> bytes:
    """The bytes from the tensor's first element to its last, whatever lies between."""
    span = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((span,), (1,)).view(torch.uint8).numpy().tobytes()


def draw(dtype, width, rows=2, positions=21, texts=3, tokens=77, heads=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = ((rows, positions), (texts, tokens), (texts, tokens))
    q, k, v = (torch.randn(*size, heads * width, generator=g).to(dtype) for size in sizes)
    return q, k, v, torch.randint(texts, (rows,), generator=g), g


def check(ours, q, k, v, index, length=None, bias=None, mask=None, *, heads, scale=None, mean=False, save=False):
    """Within twice plain torch's own error in the inputs' type, and one unit in the last place; infinities alike."""
    scale = (q.shape[-1] // heads) ** -0.5 if scale is None else scale
    real_bias = None if bias is None else bias.double()
    real = [None if x is None else x.double() for x in (q, k, v)]
    truth = reference.forward(*real, index, length, real_bias, mask, heads=heads, scale=scale, mean=mean, save=save)
    values = torch.zeros_like(k) if v is None else v
    plain_out, plain_score = written_out(
        q, k, values, heads=heads, index=index, length=length, bias=bias, mask=mask, scale=scale, mean=mean
    )
    _, plain_all = written_out(q, k, values, heads=heads, index=index, length=length, bias=bias, scale=scale)
    plain = [plain_out if v is not None else truth[0], plain_score, torch.stack([plain_all] * len(ours[2]))
             if len(ours[2]) else truth[2]]  # fmt: skip
    if len(ours[2]) == 2:
        plain[2] = torch.stack([plain_all, plain_score if not mean else plain_all])
    for mine, naive, true in zip(ours, plain, truth, strict=True):
        assert mine.shape == true.shape
        if not true.numel():
            continue
        infinite = true.isinf()
        assert torch.equal(mine.isinf(), infinite)
        assert torch.equal(mine[infinite].double(), true[infinite])
        mine, naive, true = (x.double().masked_fill(infinite, 0.0) for x in (mine, naive, true))
        dtype = torch.float32 if mine.shape != q.shape else q.dtype
        assert error(mine, true) <= 2 * error(naive.nan_to_num(), true) + floor(true, dtype)


@pytest.mark.parametrize("output", [True, False], ids=["output", "score"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS, ids="D{}".format)
@pytest.mark.parametrize("tokens", [77, 24], ids="T{}".format)
def test_every_kernel(executable, tokens, width, dtype, output):
    q, k, v, index, _ = draw(dtype, width, tokens=tokens)
    case = (q, k, v if output else None, index)
    check(run(executable, *case, heads=2), *case, heads=2)


# None, one, around a tile of 16, around the 64 of a block's round, and a prime beyond two rounds.
@pytest.mark.parametrize("positions", [1, 15, 16, 17, 63, 65, 131], ids="L{}".format)
@pytest.mark.parametrize("mean", [False, True], ids=["positions", "mean"])
def test_every_number_of_positions(executable, positions, mean):
    q, k, v, index, _ = draw(torch.bfloat16, 40, positions=positions)
    case = (q, k, v, index)
    check(run(executable, *case, heads=2, mean=mean), *case, heads=2, mean=mean)


def test_mean_over_more_tiles_than_a_warp_has_lanes(executable):
    q, k, _, index, _ = draw(torch.float16, 40, rows=1, positions=563, heads=1)
    case = (q, k, None, index)
    check(run(executable, *case, heads=1, mean=True), *case, heads=1, mean=True)


# One key, around the groups of 16, around the bounds of the two kernels, and the most.
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 65, 79, 80, 81, 127, 128], ids="T{}".format)
@pytest.mark.parametrize("width", [40, 64], ids="D{}".format)
def test_every_number_of_keys(executable, tokens, width):
    q, k, v, index, _ = draw(torch.float16, width, positions=17, tokens=tokens)
    case = (q, k, v, index)
    check(run(executable, *case, heads=2), *case, heads=2)


OPTIONS = list(itertools.product([False, True], repeat=6))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "".join("vlbmas"[i] if x else "-" for i, x in enumerate(o)))
def test_every_option(executable, options):
    output, limited, biased, masked, mean, save = options
    q, k, v, index, g = draw(torch.bfloat16, 40, rows=3, positions=19, texts=4)
    length = torch.tensor([77, 1, 40, 33]) if limited else None
    bias = torch.randn(4, 77, generator=g) if biased else None
    if bias is not None:
        bias[:, ::7] = -INF
        bias[1, 0] = 0.0
    mask = torch.rand(4, 77, generator=g) > 0.4 if masked else None
    if mask is not None:
        mask[:, 0] = True
    # What is masked is not read: it may hold anything.
    for x in (k, v):
        if length is not None:
            x[torch.arange(77) >= length[:, None]] = NAN
        if bias is not None:
            x[bias == -INF] = NAN
    case = (q, k, v if output else None, index, length, bias, mask)
    ours = run(executable, *case, heads=2, mean=mean, save=save, reversed_order=True)
    check(ours, *case, heads=2, mean=mean, save=save)


@pytest.mark.parametrize("tokens", [77, 24], ids="T{}".format)
def test_all_keys_masked(executable, tokens):
    q, k, v, index, _ = draw(torch.float16, 64, rows=3, tokens=tokens)
    index = torch.tensor([0, 1, 0])
    bias = torch.zeros(3, tokens)
    bias[0] = -INF
    k[0] = v[0] = NAN
    out, score, saved = run(executable, q, k, v, index, None, bias, heads=2, save=True)
    assert not out[[0, 2]].any()
    assert (score[[0, 2]] == -INF).all()
    assert (saved[:, [0, 2]] == -INF).all()
    check((out, score, saved), q, k, v, index, None, bias, heads=2, save=True)
    length = torch.tensor([0, tokens, tokens])
    again = run(executable, q, k, v, index, length, heads=2, save=True)
    check(again, q, k, v, index, length, heads=2, save=True)


@pytest.mark.parametrize("bias_of_unscored", [20.0, 30.0, 300.0])
def test_scored_keys_far_below_the_others(executable, bias_of_unscored):
    """The score keeps its digits where the output's exponentials of the scored keys have none left."""
    q, k, v, index, _ = draw(torch.float16, 40)
    bias, mask = torch.zeros(3, 77), torch.ones(3, 77, dtype=torch.bool)
    bias[:2, 3], mask[:2, 3] = bias_of_unscored, False
    mask[2] = False
    index = torch.tensor([0, 2])
    ours = run(executable, q, k, v, index, None, bias, mask, heads=2, save=True)
    check(ours, q, k, v, index, None, bias, mask, heads=2, save=True)
    truth = reference.forward(
        *(x.float() for x in (q, k, v)), index, None, bias, mask, heads=2, scale=40**-0.5, mean=False, save=False
    )
    # Rounding of logits up to 300 in the exponent's unit, on either side.
    assert error(ours[1][0], truth[1][0].double()) <= 2 * floor(bias.double(), torch.float32)


def test_strides_of_slices(executable):
    g = torch.Generator().manual_seed(0)
    # q, k and v as slices of joint projections, the rows of q in reverse order of storage dimensions.
    joint = torch.randn(21, 2, 3 * 80, generator=g).to(torch.bfloat16)
    q = joint.transpose(0, 1)[..., :80]
    pair = torch.randn(3, 77, 2 * 80, generator=g).to(torch.bfloat16)
    k, v = pair[..., :80], pair[..., 80:]
    bias = torch.randn(3, 100, generator=g)[:, :77]
    mask = torch.rand(3, 90, generator=g)[:, :77] > 0.5
    case = (q, k, v, torch.tensor([2, 0]), None, bias, mask)
    check(run(executable, *case, heads=2, save=True), *case, heads=2, save=True)


@pytest.mark.parametrize("masked", [False, True])
def test_no_number_depends_on_how_the_work_is_cut(executable, masked):
    q, k, v, index, g = draw(torch.bfloat16, 40, rows=2, positions=300)
    mask = torch.rand(3, 77, generator=g) > 0.5 if masked else None
    first = run(executable, q, k, v, index, None, None, mask, heads=2, mean=True, save=True)
    for cut in ({"multiprocessors": 1000}, {"reversed_order": True}):
        again = run(executable, q, k, v, index, None, None, mask, heads=2, mean=True, save=True, **cut)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = run(executable, q[1:], k, v, index[1:], None, None, mask, heads=2, mean=True)
    assert torch.equal(alone[0], first[0][1:])
    assert torch.equal(alone[1], first[1][1:])


def call(operator, q, k, v, index, length=None, bias=None, mask=None, *, heads, mean=False, save=False):
    return operator(q, k, v, index, length, bias, mask, heads, (q.shape[-1] // heads) ** -0.5, mean, save)


@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=4)), ids=str)
def test_operator(operator, options):
    output, masked, mean, save = options
    q, k, v, index, g = draw(torch.bfloat16, 40, positions=17)
    length = torch.tensor([77, 1, 40])
    bias = torch.randn(3, 77, generator=g)
    mask = torch.rand(3, 77, generator=g) > 0.4 if masked else None
    case = (q, k, v if output else None, index, length, bias, mask)
    check(call(operator, *case, heads=2, mean=mean, save=save), *case, heads=2, mean=mean, save=save)


def test_operator_takes_any_strides(operator):
    g = torch.Generator().manual_seed(0)

    def of(rows, length, offset, steps):
        """(rows, length, 80) that begins at `offset` of its storage; `steps` of the last two dimensions."""
        base = torch.randn(200_000, generator=g).to(torch.float16)
        return base.as_strided((rows, length, 80), (length * steps[0], *steps), offset)

    index = torch.tensor([2, 0])
    bias, mask = torch.randn(77, 3, generator=g).T, torch.rand(3, 154, generator=g)[:, ::2] > 0.5
    # On 16 bytes; begun at an odd element, with gaps and without; rows of an odd number of elements; every third one.
    for offset, steps in ((0, (160, 1)), (1, (160, 1)), (1, (80, 1)), (8, (83, 1)), (0, (240, 3))):
        q, k, v = of(2, 19, offset, steps), of(3, 77, offset, steps), of(3, 77, offset, steps)
        case = (q, k, v, index, None, bias, mask)
        check(call(operator, *case, heads=2, save=True), *case, heads=2, save=True)
    # The same text for all rows, without a copy.
    k, v = of(1, 77, 0, (160, 1)).expand(3, 77, 80), of(1, 77, 0, (160, 1)).expand(3, 77, 80)
    check(call(operator, q, k, v, index, heads=2), q, k, v, index, heads=2)


@pytest.mark.parametrize(("rows", "positions"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("mean", [False, True])
def test_operator_on_nothing(operator, rows, positions, mean):
    q, k, v, index, _ = draw(torch.float16, 40, rows=rows, positions=positions)
    ours = call(operator, q, k, v, index, heads=2, mean=mean, save=True)
    truth = reference.forward(q, k, v, index, None, None, None, heads=2, scale=1.0, mean=mean, save=True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


def test_operator_refuses_what_it_cannot_do(operator):
    q, k, v, index, _ = draw(torch.float16, 40)
    half = (q[..., :60], k[..., :60], v[..., :60], index)
    for case, expected in (
        ((q.float(), k.float(), v.float(), index), "q: expected float16 or bfloat16"),
        (half, "q: heads of width 30, expected 40, 64, 80, 128 or 160"),
        ((q, k.repeat(1, 2, 1), v.repeat(1, 2, 1), index), "k: 154 keys, expected 1 to 128"),
        ((q, k[:, :0], v[:, :0], index), "k: 0 keys, expected 1 to 128"),
        ((q, k, v[:, :5], index), "v: expected k's shape"),
        ((q, k.bfloat16(), v, index), "k: wrong type"),
        ((q, k, v, index.int()), "text_index: wrong type"),
        ((q, k, v, index[:1]), "text_index: expected"),
        ((q, k[:0], v[:0], index), "k: no text for 2 rows"),
        ((q, k, v, index, index), "text_length: expected"),
        ((q, k, v, index, None, torch.zeros(3, 5)), "key_bias: expected"),
        ((q, k, v, index, None, None, torch.ones(3, 77)), "score_mask: wrong type"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(expected)):
            call(operator, *case, heads=2)
