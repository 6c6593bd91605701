"""The compiled CPU operators themselves: each instruction set of this processor against the truth."""

import re
from pathlib import Path

import pytest
import torch

from dsd_fast.kernels.common import native
from dsd_fast.kernels.cross_attention_score import reference
from tests.repository.processes import run_python

if not native.load("cpu"):
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


def exact(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def logit_terms(arguments, heads, scale):
    """The largest Σ|q||k| of a logit: a sum in float32 is off by about eps times the size of its terms."""
    q, k, _, index, *_ = arguments
    q, k = (x.double().abs().unflatten(-1, (heads, -1)) for x in (q, k[index]))
    return float(torch.einsum("blhd,bthd->bhlt", q, k).max()) * scale if q.numel() and k.numel() else 0.0


def close(mine, plain, truth, logit, size=0.0):
    """Off from the truth by no more than twice what plain torch is, and the rounding of results and logits.

    A logit is an exponent: where it is off by `logit` · eps, a probability changes by that share of itself, and with it
    what is made of it, of size `size` before terms cancel.
    """
    assert mine.shape == truth.shape
    assert not mine.isnan().any()
    finite = truth.isfinite()
    assert torch.equal(mine[~finite].double(), truth[~finite].double())
    if not finite.any():
        return
    error, largest = (plain - truth)[finite].abs().max(), truth[finite].abs().max()
    floor = largest * torch.finfo(mine.dtype).eps + max(largest, size) * logit * torch.finfo(torch.float32).eps
    assert (mine - truth)[finite].abs().max() <= 2 * error + floor


SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 13, 2, 77, 8, 40),
    (3, 31, 2, 77, 5, 64),
    (2, 33, 3, 200, 2, 80),
    (2, 4, 2, 77, 1, 160),
    (1, 3, 1, 5, 1, 256),
    (5, 97, 3, 24, 4, 24),
    (3, 5, 2, 0, 2, 4),
    (0, 5, 2, 7, 2, 4),
    (3, 0, 2, 7, 2, 4),
]
OPTIONS = [(), ("length", "bias", "mask"), ("score", "bias"), ("score", "mask", "mean"), ("length", "mean")]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-L{}-M{}-T{}-H{}-D{}".format(*s))
def test_output_score_and_gradients(shape, dtype, options):
    arguments = problem(shape, dtype, options=options)
    rest = (shape[4], 0.3, "mean" in options)
    results = ops.cross_attention_score(*arguments, *rest, True)
    named = dict(zip(("heads", "scale", "mean"), rest, strict=True))
    truth = reference.forward(*map(exact, arguments), **named, save=True)
    plain = reference.forward(*arguments, **named, save=True)
    assert results[0].dtype == dtype
    logit = logit_terms(arguments, shape[4], 0.3)
    for x, y, z in zip(results, plain, truth, strict=True):
        close(x, y, z, logit)
    g = torch.Generator().manual_seed(1)
    dscore = torch.randn(results[1].shape, generator=g)
    douts = [None] if "score" in options else [torch.randn(results[0].shape, generator=g).to(dtype), None]
    for dout in douts:
        got = ops.cross_attention_score_backward(dout, dscore, *arguments, results[2], *rest)
        true = reference.backward(exact(dout), exact(dscore), *map(exact, arguments), truth[2], **named)
        naive = reference.backward(dout, dscore, *arguments, plain[2], **named)
        size = float(dscore.abs().max()) if dscore.numel() else 0.0
        if dout is not None and dout.numel() and arguments[2].numel():
            size += logit_terms((dout, arguments[2], None, arguments[3]), shape[4], 1.0)
        for x, y, z in zip(got, naive, true, strict=True):
            close(x, y, z, logit, size)


def test_sums_over_many_positions_keep_their_digits():
    """Rounding of a sum of n numbers one after another grows with √n; plain torch adds in blocks, and so must this."""
    arguments = problem((2, 4096, 1, 77, 1, 40))
    named = {"heads": 1, "scale": 40**-0.5, "mean": False}
    truth = reference.forward(*map(exact, arguments), **named, save=True)
    g = torch.Generator().manual_seed(1)
    dout, dscore = torch.randn(2, 4096, 40, generator=g), torch.randn(2, 1, 4096, generator=g)
    saved = truth[2].float()
    got = ops.cross_attention_score_backward(dout, dscore, *arguments, saved, 1, 40**-0.5, False)
    true = reference.backward(exact(dout), exact(dscore), *map(exact, arguments), truth[2], **named)
    naive = reference.backward(dout, dscore, *arguments, saved, **named)
    for mine, plain, right in zip(got, naive, true, strict=True):
        floor = right.abs().max() * torch.finfo(torch.float32).eps
        assert (mine - right).abs().max() <= 2 * (plain - right).abs().max() + floor


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
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


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 3000.0])
def test_small_and_large_logits(size):
    """Logits of 3000 in base e are past every exponent of float32; scored keys may have none of the probability."""
    q, k, v, index, *_ = problem((2, 40, 2, 30, 2, 16))
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[:, 3] = True
    arguments = (q * size, k, v, index, None, None, mask)
    truth = reference.forward(*map(exact, arguments), heads=2, scale=1.0, mean=False, save=True)
    plain = reference.forward(*arguments, heads=2, scale=1.0, mean=False, save=True)
    for x, y, z in zip(ops.cross_attention_score(*arguments, 2, 1.0, False, True), plain, truth, strict=True):
        close(x, y, z, logit_terms(arguments, 2, 1.0))


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
    q, k, _, index, length, bias, _ = problem(shape, dtype, options=("length", "bias"))
    tokens = torch.randint(shape[3], (shape[0], 3), generator=torch.Generator().manual_seed(2))
    maps = ops.token_maps(q, k, tokens, index, length, bias, shape[4], 0.3)
    d = shape[5]

    def written_out(q, k, bias):
        b = bias[index].masked_fill(torch.arange(shape[3]) >= length[index][:, None], -float("inf"))
        keys = k[index].masked_fill((b == -float("inf"))[..., None], 0)
        s = torch.einsum("blhd,bthd->bhlt", q.unflatten(-1, (-1, d)), keys.unflatten(-1, (-1, d))) * 0.3
        p = torch.softmax(s + b[:, None, None], -1).nan_to_num()
        return torch.stack([p[i][..., tokens[i]].mean(0).T for i in range(len(q))]) if len(q) else maps.to(q.dtype)

    plain, truth = written_out(q.float(), k.float(), bias), written_out(q.double(), k.double(), bias.double())
    close(maps, plain, truth, logit_terms((q, k, None, index), shape[4], 0.3))


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


def test_the_library_needs_no_more_than_the_stable_interface(tmp_path):
    """Loaded beside torch alone it works: of its libraries it needs one, for the stable interface."""
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.dsd_fast_cpu.capability())"
    (library,) = native.PACKAGE.glob("_cpu.*so")
    assert run_python(["-c", code, library], cwd=tmp_path).stdout.split() == [ops.capability()]
    assert b"libc10.so" not in library.read_bytes()
