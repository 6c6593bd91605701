"""The compiled CPU operators themselves: each instruction set of this processor against the truth."""

import re
from pathlib import Path

import pytest
import torch

from dsd_fast.kernels.common import native
from tests.kernels.attention import maps_written_out, written_out
from tests.memory import allocations
from tests.repository.processes import run_python

if not native.load():
    pytest.skip("the CPU library is not built: pip install --no-build-isolation -e .", allow_module_level=True)

ops = torch.ops.dsd_fast_cpu
FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
SETS = [
    name
    for name, flags in (("avx512", ("avx512f", "avx512bw", "avx512dq", "avx512vl")), ("avx2", ("avx2", "fma", "f16c")))
    if all(re.search(rf"\b{flag}\b", FLAGS) for flag in flags)
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[*SETS, "baseline"], autouse=True)
def capability(request, monkeypatch):
    monkeypatch.setenv("DSD_FAST_CPU_CAPABILITY", request.param)
    assert ops.capability() == request.param


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that the library takes from torch holds NaN at first, as conftest.py has it for the package."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(shape, dtype=torch.float32, seed=0, strided=False, options=()):
    rows, positions, texts, tokens, heads, width = shape
    g = torch.Generator().manual_seed(seed)

    def draw(n, m):
        if strided:
            return torch.randn(n, m, 2 * heads * width, generator=g).to(dtype)[..., ::2]
        return torch.randn(n, m, heads * width, generator=g).to(dtype)

    q, k, v = draw(rows, positions), draw(texts, tokens), draw(texts, tokens)
    index = torch.randint(texts, (rows,), generator=g)
    length = torch.randint(tokens + 1, (texts,), generator=g) if "length" in options else None
    bias = torch.randn(texts, tokens, generator=g) if "bias" in options else None
    if bias is not None and tokens > 2:
        bias[0, 1] = -float("inf")
    mask = torch.rand(texts, tokens, generator=g) > 0.4 if "mask" in options else None
    return q, k, None if "score" in options else v, index, length, bias, mask


def pass_and_gradients(arguments, heads, scale, mean, dout, dscore, dtype):
    """Output, score, and the gradients of q, k, v and key_bias of attention written out in `dtype`, by autograd."""
    q, k, v, index, length, bias, mask = arguments
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in (q, k, v, bias)]
    q, k, v, bias = leaves
    out, score = written_out(
        q, k, v, heads=heads, index=index, length=length, bias=bias, mask=mask, scale=scale, mean=mean
    )
    # A score of −inf has no gradient, and −inf · 0 would be NaN.
    loss = (score.masked_fill(score == -float("inf"), 0.0) * dscore).sum()
    loss = loss if dout is None or v is None else loss + (out * dout).sum()
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None], allow_unused=True, materialize_grads=True)
    given = iter(grads)
    found = [None if x is None else next(given).nan_to_num(0.0) for x in leaves]
    return [None if v is None else out.detach(), score.detach(), *found]


def close(mine, plain, truth):
    """Off from the truth by at most twice what plain torch is, and one rounding of the largest value.

    Each is a list, of draws of one problem: the largest of few errors is a matter of luck.
    """
    size = error = mistake = 0.0
    for x, y, z in zip(mine, plain, truth, strict=True):
        assert x.shape == z.shape
        assert not x.isnan().any()
        finite = z.isfinite()
        assert torch.equal(x[~finite].double(), z[~finite])
        if finite.any():
            size = max(size, float(z[finite].abs().max()))
            error = max(error, float((y.to(x.dtype) - z)[finite].abs().max()))
            mistake = max(mistake, float((x - z)[finite].abs().max()))
    # Without fused multiply-adds, which plain torch has here, every term is rounded twice: √2 the error.
    times = 2 * 2**0.5 if ops.capability() == "baseline" else 2
    assert mistake <= times * error + size * torch.finfo(mine[0].dtype).eps


SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 13, 2, 77, 8, 40),
    (3, 31, 2, 77, 5, 64),
    (2, 33, 3, 200, 2, 80),
    (2, 34, 2, 77, 1, 160),
    (1, 63, 1, 5, 1, 256),
    (5, 97, 3, 24, 4, 24),
    (3, 5, 2, 0, 2, 4),
    (0, 5, 2, 7, 2, 4),
    (3, 0, 2, 7, 2, 4),
]
OPTIONS = [(), ("length", "bias", "mask"), ("score", "bias"), ("score", "mask", "mean"), ("length", "mean")]
DRAWS = 6


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-L{}-M{}-T{}-H{}-D{}".format(*s))
def test_output_score_and_gradients(shape, dtype, options):
    judged(shape, dtype, options, size=1.0)


@pytest.mark.parametrize("size", [4.0, 10.0])
def test_logits_of_trained_networks_cost_no_digits(size):
    """Exponents that are large lose digits where they are rounded twice: in a log-sum-exp that is kept, for example."""
    judged((2, 256, 2, 77, 4, 40), torch.float32, ("bias", "mean"), size)


def judged(shape, dtype, options, size):
    rest = (shape[4], size * max(1, shape[5]) ** -0.5, "mean" in options)
    results = [[] for _ in range(3)]
    for seed in range(DRAWS):
        arguments = problem(shape, dtype, seed, options=options)
        out, score, saved = ops.cross_attention_score(*arguments, *rest, True)
        g = torch.Generator().manual_seed(seed)
        dscore = torch.randn(score.shape, generator=g)
        # Without a gradient of the output the gradient of the score alone is made, by other code.
        dout = None if "score" in options or seed == 0 else torch.randn(out.shape, generator=g).to(dtype)
        grads = ops.cross_attention_score_backward(dout, dscore, *arguments, saved, *rest)
        assert out.dtype == grads[0].dtype == dtype
        results[0].append((out, score, *grads))
        for found, kind in zip(results[1:], (torch.float32, torch.float64), strict=True):
            given = [x if x is None else x.to(kind) for x in (dout, dscore)]
            found.append(pass_and_gradients(arguments, *rest, *given, kind))
    for mine, plain, truth in zip(*(zip(*each, strict=True) for each in results), strict=True):
        if truth[0] is not None:
            close(mine, plain, truth)


def test_sums_over_many_positions_keep_their_digits():
    """Rounding of a sum of n numbers one after another grows with √n; plain torch adds in blocks, and so must this."""
    arguments = problem((2, 4096, 1, 77, 1, 40), options=("bias",))
    g = torch.Generator().manual_seed(1)
    dout, dscore = torch.randn(2, 4096, 40, generator=g), torch.randn(2, 1, 4096, generator=g)
    rest = (1, 40**-0.5, False)
    saved = ops.cross_attention_score(*arguments, *rest, True)[2]
    got = ops.cross_attention_score_backward(dout, dscore, *arguments, saved, *rest)
    plain = pass_and_gradients(arguments, *rest, dout, dscore, torch.float32)[2:]
    truth = pass_and_gradients(arguments, *rest, dout.double(), dscore.double(), torch.float64)[2:]
    for each in zip(got, plain, truth, strict=True):
        close(*([x] for x in each))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype):
    arguments = problem((3, 37, 2, 9, 2, 20), dtype, strided=True, options=("bias",))
    packed = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in arguments]
    got = ops.cross_attention_score(*arguments, 2, 0.3, False, True)
    want = ops.cross_attention_score(*packed, 2, 0.3, False, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    dout = torch.randn(3, 37, 80).to(dtype)[..., ::2]
    grads = ops.cross_attention_score_backward(dout, want[1], *arguments, want[2], 2, 0.3, False)
    right = ops.cross_attention_score_backward(dout.contiguous(), want[1], *packed, want[2], 2, 0.3, False)
    assert all(torch.equal(a, b) for a, b in zip(grads, right, strict=True))


@pytest.fixture
def denormals(request):
    """Whether the processor computes with float32's subnormals, or takes them as 0."""
    assert torch.set_flush_denormal(not request.param)
    yield
    torch.set_flush_denormal(False)


# float16's subnormals are numbers in float32 whatever it does with its own; bfloat16's are its own.
@pytest.mark.parametrize(
    ("dtype", "denormals"),
    [(torch.bfloat16, True), (torch.float16, True), (torch.float16, False)],
    ids=["bfloat16", "float16", "float16-flushed"],
    indirect=["denormals"],
)
@pytest.mark.usefixtures("denormals")
def test_every_number_of_16_bits_is_read_and_written_as_it_is(dtype):
    """One key has probability 1, so the output is its value, and every one of the 65,536 has its turn."""
    v = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).reshape(256, 1, 256)
    q, k = torch.zeros(256, 1, 256, dtype=dtype), torch.zeros(256, 1, 256, dtype=dtype)
    out = ops.cross_attention_score(q, k, v, torch.arange(256), None, None, None, 1, 1.0, True, False)[0]
    numbers = ~v.isnan()
    assert torch.equal(out[numbers], v[numbers])
    assert torch.equal(out.isnan(), v.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_output_is_rounded_to_the_nearest_even(dtype):
    """Two keys of equal weight give the mean of two values, often halfway between two numbers."""
    g = torch.Generator().manual_seed(0)
    v = (torch.randn(64, 2, 256, generator=g) * torch.logspace(-7, 4, 64)[:, None, None]).to(dtype)
    q, k = torch.zeros(64, 1, 256, dtype=dtype), torch.zeros(64, 2, 256, dtype=dtype)
    out = ops.cross_attention_score(q, k, v, torch.arange(64), None, None, None, 1, 1.0, True, False)[0]
    want = ((v[:, :1].float() + v[:, 1:].float()) * 0.5).to(dtype)
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", ["forward", "backward", "maps"])
def test_no_operand_of_16_bits_is_copied_to_32(call, dtype):
    """What is allocated are the results: operands become floats a block at a time, in scratch that stays in cache."""
    q, k, v, index, *_ = problem((2, 512, 2, 77, 2, 40), dtype, strided=True)
    rest, chosen = (2, 0.16, True), torch.zeros(2, 3, dtype=torch.int64)
    out, score, saved = ops.cross_attention_score(q, k, v, index, None, None, None, *rest, True)
    calls = {
        "forward": lambda: ops.cross_attention_score(q, k, v, index, None, None, None, *rest, True),
        "backward": lambda: ops.cross_attention_score_backward(
            out, score, q, k, v, index, None, None, None, saved, *rest
        ),
        "maps": lambda: ops.token_maps(q, k, chosen, index, None, None, 2, 0.16),
    }
    results = calls[call]()
    results = (results,) if isinstance(results, torch.Tensor) else results
    allocated = [size for size in allocations(calls[call]) if size > 0]
    assert {value.dtype for value in results[:1]} == {torch.float32 if call == "maps" else dtype}
    # Of each result what the allocator rounds it up by.
    assert sum(allocated) <= sum(value.nbytes for value in results) + 64 * len(results)
    # A copy would be seen.
    assert 4 * q.numel() > 64 * len(results)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 3000.0])
def test_small_and_large_logits(size):
    """Logits of 3000 in base e are past every exponent of float32; scored keys may have none of the probability."""
    q, k, v, index, *_ = problem((2, 40, 2, 30, 2, 16))
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[:, 3] = True
    arguments = (q * size, k, v, index, None, None, mask)
    got = ops.cross_attention_score(*arguments, 2, 1.0, False, True)
    plain, truth = (
        written_out(*(x.to(kind) for x in arguments[:3]), heads=2, index=index, mask=mask, scale=1.0)
        for kind in (torch.float32, torch.float64)
    )
    for each in zip(got[:2], plain, truth, strict=True):
        close(*([x] for x in each))


def test_masked_keys_are_not_read():
    q, k, v, index, _, bias, mask = problem((4, 50, 2, 20, 2, 24), options=("bias", "mask"))
    length = torch.tensor([0, 12])
    beyond = (torch.arange(20) >= length[:, None]) | (bias == -float("inf"))
    results = []
    for poison in (0.0, float("nan"), float("inf")):
        keys, values = (x.masked_fill(beyond[..., None], poison) for x in (k, v))
        arguments = (q, keys, values, index, length, bias, mask)
        out = ops.cross_attention_score(*arguments, 2, 0.3, False, True)
        grads = ops.cross_attention_score_backward(out[0], out[1].clamp(min=-9), *arguments, out[2], 2, 0.3, False)
        results.append((*out, *grads))
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


def test_nan_in_a_query_stays_in_its_row():
    q, k, v, index, *rest = problem((3, 40, 2, 20, 2, 24))
    q[1, 7, 30] = float("nan")
    out, score, _ = ops.cross_attention_score(q, k, v, index, *rest, 2, 0.3, False, False)
    assert out[1, 7, 24:].isnan().all()
    assert score[1, 1, 7].isnan()
    assert int(out.isnan().sum()) == 24
    assert int(score.isnan().sum()) == 1


def test_the_number_of_threads_and_repeats_do_not_change_a_bit():
    arguments = problem((24, 300, 5, 77, 4, 40), options=("bias",))

    def once():
        out = ops.cross_attention_score(*arguments, 4, 0.16, True, True)
        return (*out, *ops.cross_attention_score_backward(out[0], out[1], *arguments, out[2], 4, 0.16, True))

    threads = torch.get_num_threads()
    try:
        first = once()
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3]], ids=lambda s: "B{}-L{}-M{}-T{}-H{}-D{}".format(*s))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_maps(shape, dtype):
    results = [[] for _ in range(3)]
    for seed in range(DRAWS):
        q, k, _, index, length, bias, _ = problem(shape, dtype, seed, options=("length", "bias"))
        tokens = torch.randint(shape[3], (shape[0], 3), generator=torch.Generator().manual_seed(seed))
        results[0].append(ops.token_maps(q, k, tokens, index, length, bias, shape[4], 0.3))
        for found, kind in zip(results[1:], (torch.float32, torch.float64), strict=True):
            real = [x.to(kind) for x in (q, k, bias)]
            found.append(maps_written_out(*real[:2], tokens, index, length, real[2], heads=shape[4], scale=0.3))
    close(*results)


def test_bad_arguments_raise():
    q, k, v, index, *rest = problem((2, 3, 2, 5, 2, 4))
    for change, message in [
        ((q.double(), k, v, index), "q: expected three dimensions of float32"),
        ((q, k[..., :4], v, index), "k: does not fit q"),
        ((q, k, v[:1], index), "v: does not fit k"),
        ((q, k, v, torch.tensor([0, 2])), "text_index: 2 is not below 2"),
        ((q, k, v, index.int()), "text_index: expected"),
    ]:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            ops.cross_attention_score(*change, *rest, 2, 0.3, True, False)


def test_an_instruction_set_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("DSD_FAST_CPU_CAPABILITY", "neon9")
    with pytest.raises(RuntimeError, match=r"DSD_FAST_CPU_CAPABILITY: got neon9, expected .*baseline"):
        ops.capability()


def test_the_best_instruction_set_is_the_default(monkeypatch):
    monkeypatch.delenv("DSD_FAST_CPU_CAPABILITY")
    assert ops.capability() == [*SETS, "baseline"][0]


@pytest.mark.parametrize("capability", ["baseline"], indirect=True)
def test_the_library_needs_no_more_than_the_stable_interface(tmp_path):
    """Loaded beside torch alone it works: of its libraries it needs one, for the stable interface."""
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.dsd_fast_cpu.capability())"
    (library,) = native.PACKAGE.glob("_cpu.*so")
    assert run_python(["-c", code, library], cwd=tmp_path).stdout.split() == [ops.capability()]
    assert b"libc10.so" not in library.read_bytes()


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("shape", [(1, 48, 16, 16, 8), (3, 96, 5, 7, 8), (2, 20, 3, 5, 5), (1, 6, 1, 1, 2)])
def test_group_norm_and_silu(shape, shifted, silu):
    rows, channels, height, width, groups = shape
    g = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(rows, channels, height, width, generator=g) + 5).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, generator=g).unbind()
    shift = torch.randn(rows, channels, generator=g) if shifted else None
    got = torch.full_like(x, float("nan"))
    ops.group_norm_silu(x, got, weight, bias, shift, groups, 1e-5, silu)
    moved = x.double() if shift is None else x.double() + shift.double()[:, :, None, None]
    grouped = moved.reshape(rows, groups, channels // groups * height * width)
    mean, variance = grouped.mean(-1, keepdim=True), grouped.var(-1, correction=0, keepdim=True)
    normed = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    want = normed * weight.double()[:, None, None] + bias.double()[:, None, None]
    want = want * torch.sigmoid(want) if silu else want
    # Numbers of about 8 are centred and scaled: two roundings of 2⁻²⁴ each of them, times weights of up to 3.
    torch.testing.assert_close(got.double(), want, rtol=4e-6, atol=4e-6)


def test_group_norm_takes_channels_last_alone():
    with pytest.raises(RuntimeError, match="expected channels-last"):
        ops.group_norm_silu(torch.ones(1, 8, 2, 2), torch.ones(1, 8, 2, 2), None, None, None, 2, 1e-5, True)
    x = torch.ones(1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    ops.group_norm_silu(x[:0], x[:0].clone(), None, None, None, 2, 1e-5, True)
    with pytest.raises(RuntimeError, match="weight: expected 8 numbers"):
        ops.group_norm_silu(x, x.clone(), torch.ones(7), None, None, 2, 1e-5, True)


def test_geglu_is_exact_to_rounding():
    gate = torch.cat([torch.linspace(-14, 14, 4001), torch.tensor([0.0, -0.0, float("inf"), float("nan")])])
    got = torch.full((len(gate), 1), float("nan"))
    ops.geglu(torch.stack([torch.ones_like(gate), gate], dim=-1), got)
    exact = gate.double() * 0.5 * torch.erfc(-gate.double() / 2**0.5)
    # Of a number below 0 the exponent −x²/2 is rounded, and its error is a share of the result.
    bound = 2e-7 * exact.abs() + 4e-7
    finite = torch.isfinite(exact)
    assert bool(((got[:, 0] - exact).abs() <= bound)[finite].all())
    assert torch.equal(got[~finite, 0].isnan(), exact[~finite].isnan())
    assert got[-2, 0] == float("inf")
    wide = torch.randn(5, 3, 2 * 37, generator=torch.Generator().manual_seed(0))
    got = torch.empty(5, 3, 37)
    ops.geglu(wide, got)
    value, gate = wide.double().chunk(2, -1)
    torch.testing.assert_close(got.double(), value * torch.nn.functional.gelu(gate), rtol=1e-6, atol=2e-6)
