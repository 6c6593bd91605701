"""The operator against attention written out, in every case of its contract."""

import math
import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dsd_fast.kernels.common import attention, backend, native
from dsd_fast.kernels.cross_attention_score import cross_attention_score
from tests.kernels.attention import INF, largest_logit, written_out
from tests.memory import allocations
from tests.repository.processes import run_python
from tests.repository.source import ROOT

IMPLEMENTATIONS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not native.load(), reason="the CPU library is not built")),
]


@pytest.fixture
def tf32():
    """The settings of products on GPUs, with tf32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield matmul
    matmul.fp32_precision = before


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Each implementation that a CPU has for 16-bit and 32-bit inputs, and proof that it ran."""
    with backend.force(request.param):
        yield request.param
    assert backend.last("cross_attention_score") == request.param


def inputs(rows=3, positions=5, texts=2, tokens=7, heads=2, width=4, dtype=torch.float64, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)

    c = heads * width
    return draw(rows, positions, c), draw(texts, tokens, c), draw(texts, tokens, c), g


def error(x, truth):
    return float((x.double() - truth).abs().max()) if truth.numel() else 0.0


def floor(truth, dtype):
    """Rounding of the result itself: one unit in the last place of its largest value."""
    return float(truth.abs().max()) * torch.finfo(dtype).eps if truth.numel() else 0.0


# One image position, a prime number, one below, at and above the usual 64 × 64 chunks; widths of SD 1.5 (40, 80, 160),
# SD 2.x (64), the smallest and the largest; 77 keys, one, and more than a block of 128. Where keys and heads are few,
# positions are many: plain torch's own error, the largest of a handful of them, would be a poor measure.
GRID = [
    (1, 1, 1, 1, 1, 1),
    (2, 13, 2, 77, 8, 40),
    (3, 31, 2, 77, 5, 64),
    (2, 9, 3, 200, 2, 80),
    (2, 4, 2, 77, 1, 160),
    (1, 97, 1, 5, 1, 256),
    (4, 97, 2, 24, 4, 24),
]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("shape", GRID, ids=lambda s: "B{}-L{}-M{}-T{}-H{}-D{}".format(*s))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_within_twice_plain_torch(shape, dtype):
    rows, positions, texts, tokens, heads, width = shape
    q, k, v, g = inputs(rows, positions, texts, tokens, heads, width, dtype)
    index = torch.randint(texts, (rows,), generator=g)
    truth = written_out(q.double(), k.double(), v.double(), heads=heads, index=index)
    plain = written_out(q, k, v, heads=heads, index=index)
    ours = cross_attention_score(q, k, v, heads=heads, text_index=index)
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    for mine, naive, true, out_dtype in zip(ours, plain, truth, (dtype, torch.float32), strict=True):
        assert error(mine, true) <= 2 * error(naive, true) + floor(true, out_dtype)


@pytest.mark.parametrize("chunk", [1 << 20, 64, 1], ids=["whole", "parts", "single"])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_every_option_and_gradient_against_autograd(monkeypatch, chunk, mean, masked, limited, biased):
    monkeypatch.setitem(attention.CHUNK_ELEMENTS, "cpu", chunk)
    q, k, v, g = inputs(rows=5, positions=3, texts=4, grad=True)
    index = torch.tensor([2, 0, 2, 3, 2])
    length = torch.tensor([7, 1, 4, 6]) if limited else None
    bias = torch.randn(4, 7, generator=g, dtype=torch.float64) if biased else None
    if bias is not None:
        bias[2, 1] = -INF
        bias.requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(4, 7, generator=g) > 0.4
        mask[:, 0] = True
    ours = cross_attention_score(
        q, k, v, heads=2, text_index=index, text_length=length, key_bias=bias, score_mask=mask, mean=mean
    )
    truth = written_out(q, k, v, heads=2, index=index, length=length, bias=bias, mask=mask, mean=mean)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in truth]
    leaves = [x for x in (q, k, v, bias) if x is not None]
    got = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, ours, strict=True)), leaves)
    want = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, truth, strict=True)), leaves)
    for mine, true in zip(got, want, strict=True):
        torch.testing.assert_close(mine, true.nan_to_num(), rtol=1e-11, atol=1e-11)
    # Text 1 belongs to no row.
    assert not any(x[1].any() for x in got[1:])


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("output", [False, True])
def test_gradcheck(mean, output):
    q, k, v, _ = inputs(grad=True)
    bias = torch.zeros(2, 7, dtype=torch.float64, requires_grad=True)
    index, length = torch.tensor([1, 0, 1]), torch.tensor([5, 7])
    mask = torch.tensor([[True, False] * 3 + [True]] * 2)

    def call(q, k, v, bias):
        out, score = cross_attention_score(
            q,
            k,
            v if output else None,
            heads=2,
            text_index=index,
            text_length=length,
            key_bias=bias,
            score_mask=mask,
            mean=mean,
        )
        return (out, score) if output else score

    assert torch.autograd.gradcheck(call, (q, k, v, bias))


SHAPES = [
    (3, 5, 2, 7, 2, 4),
    (0, 5, 2, 7, 2, 4),
    (3, 0, 2, 7, 2, 4),
    (3, 5, 2, 0, 2, 4),
    (1, 1, 1, 1, 1, 1),
    (2, 13, 2, 11, 1, 3),
]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.newest
def test_opcheck(shape, mean):
    rows, positions, texts, tokens, heads, width = shape
    q, k, v, g = inputs(rows, positions, texts, tokens, heads, width, torch.float32, grad=True)
    index = torch.randint(texts, (rows,), generator=g)
    bias = torch.zeros(texts, tokens, requires_grad=True)
    mask = torch.ones(texts, tokens, dtype=torch.bool)
    op = torch.ops.dsd_fast.cross_attention_score.default
    opcheck(op, (q, k, v, index, None, bias, mask, heads, 0.5, mean, True))
    strided = q.detach().new_zeros(rows, positions, 2 * heads * width)[..., ::2]
    opcheck(op, (strided, k.detach(), None, index, None, None, None, heads, 0.5, mean, False))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("permuted", "rows"), [("q", 3), ("k", 3), ("v", 3), ("qkv", 3), ("qkv", 0)])
def test_opcheck_of_both_operators_over_permuted_leaves(permuted, rows):
    q, k, v, g = inputs(rows, dtype=torch.float32)
    q, k, v = (
        (x.transpose(1, 2).contiguous().transpose(1, 2) if name in permuted else x).requires_grad_()
        for name, x in (("q", q), ("k", k), ("v", v))
    )
    options = (torch.randint(2, (rows,), generator=g), None, torch.zeros(2, 7, requires_grad=True), None)
    opcheck(torch.ops.dsd_fast.cross_attention_score.default, (q, k, v, *options, 2, 0.5, True, True))
    leaves, options = [x.detach() for x in (q, k, v)], [None if x is None else x.detach() for x in options]
    out, score, saved = torch.ops.dsd_fast.cross_attention_score(*leaves, *options, 2, 0.5, True, True)
    dout, dscore = (torch.randn(x.shape, generator=g) for x in (out, score))
    # Autograd is registered with the forward operator alone.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    opcheck(
        torch.ops.dsd_fast.cross_attention_score_backward.default,
        (dout, dscore, *leaves, *options, saved, 2, 0.5, True),
        test_utils=checks,
    )


@pytest.mark.usefixtures("implementation")
def test_forward_mode_and_transforms_are_refused():
    q, k, _, _ = inputs(rows=2, dtype=torch.float32)

    def score(q):
        return cross_attention_score(q, k, heads=2)[1]

    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="cross_attention_score: got an input with a forward-mode"):
            score(forward_ad.make_dual(q, q))
        # What has no tangent is nobody's business.
        torch.testing.assert_close(score(q), want := score(q.clone()), rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="cross_attention_score: got an input with a forward-mode"):
        torch.func.jvp(score, (q,), (q,))
    with pytest.raises(NotImplementedError, match=r"cross_attention_score: .* transform of torch.func"):
        torch.func.grad(lambda q: score(q).sum())(q)
    torch.testing.assert_close(score(q), want, rtol=0, atol=0)


def test_threads_in_full_precision_leave_the_setting_as_it_was(tf32):
    """Two that overlap: the first to come is the first to go."""
    matmul, device = tf32, torch.device("cuda")
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = []

    def first():
        with attention.full_precision(device):
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert first_is_in.wait(10)
    with attention.full_precision(device):
        second_is_in.set()
        assert first_is_out.wait(10)
        seen.append(matmul.fp32_precision)
    thread.join()
    assert [*seen, matmul.fp32_precision] == ["ieee", "tf32"]


TF32_WAYS = (
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
    "pass",
)
TF32_CHECK = """
import functools, os, sys, torch
from dsd_fast.kernels.common import attention

def settings():
    found = []
    for name in ("cuda.matmul.allow_tf32", "cuda.matmul.fp32_precision", "mkldnn.matmul.fp32_precision"):
        try:
            found.append(functools.reduce(getattr, name.split("."), torch.backends))
        except RuntimeError:
            found.append("refused")
    return found

# What torch remembers of the ways taken cannot be taken back: a process each.
for way in sys.argv[1:]:
    if not os.fork():
        exec(way)
        before = settings()
        with attention.full_precision(torch.device("cuda")):
            inside = settings()
        print(way, inside[0] is False and inside[1] != "tf32" and settings() == before, flush=True)
        os._exit(0)
    os.wait()
"""


def test_tf32_is_switched_off_by_the_way_that_switched_it_on():
    """torch refuses a product, and the reading of its settings, where one way was taken after the other."""
    said = run_python(["-W", "ignore", "-c", TF32_CHECK, *TF32_WAYS], cwd=ROOT).stdout
    assert said.splitlines() == [f"{way} True" for way in TF32_WAYS]


@pytest.mark.parametrize("how", ["length", "bias"])
def test_masked_keys_are_not_read(how):
    q, k, v, g = inputs(grad=True)
    options = {"heads": 2, "text_index": torch.tensor([0, 1, 0])}
    real = torch.tensor([3, 0])
    beyond = torch.arange(7) >= real[:, None]
    if how == "length":
        options["text_length"] = real
    else:
        options["key_bias"] = torch.zeros(2, 7, dtype=torch.float64).masked_fill(beyond, -INF)
    weight = torch.randn(3, 5, 8, generator=g, dtype=torch.float64)

    def results(k, v):
        out, score = cross_attention_score(q, k, v, **options)
        total = (out * weight).sum() + score[[0, 2]].square().sum()
        return (out, score, *torch.autograd.grad(total, (q, k, v)))

    want = results(k, v)
    for poison in (float("nan"), INF):
        spoiled = [x.detach().masked_fill(beyond[..., None], poison).requires_grad_() for x in (k, v)]
        torch.testing.assert_close(results(*spoiled), want, rtol=0, atol=0)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_at_the_end_alone(dtype):
    """The arithmetic is float32: the score is that of the inputs in float32, the output that one rounded."""
    q, k, v, _ = inputs(2, 33, 2, 77, 8, 40, dtype)
    exact = written_out(q.double(), k.double(), v.double(), heads=8)
    out, score = cross_attention_score(q, k, v, heads=8)
    # Sums of 77 and of 40 products: their rounding in float32, and one rounding of the output.
    eps = torch.finfo(torch.float32).eps
    assert error(score, exact[1]) <= 77 * eps * float(exact[1].abs().max())
    assert error(out, exact[0]) <= (0.5 * torch.finfo(dtype).eps + 2 * 77 * eps) * float(exact[0].abs().max())


@pytest.mark.usefixtures("implementation")
def test_autocast_does_not_lower_the_arithmetic():
    q, k, v, _ = inputs(dtype=torch.float32, grad=True)
    index = torch.tensor([0, 1, 1])

    def results():
        out, score = cross_attention_score(q, k, v, heads=2, text_index=index)
        return (out, score, *torch.autograd.grad(out.sum() + score.sum(), (q, k, v)))

    want = results()
    with torch.autocast("cpu", torch.bfloat16):
        got = results()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_scale_of_zero_is_zero():
    q, k, _, _ = inputs()
    score = cross_attention_score(q, k[[0, 0, 0]], heads=2, scale=0.0)[1]
    torch.testing.assert_close(score, torch.full_like(score, math.log(7)))


@pytest.mark.parametrize("how", ["length", "bias", "no tokens"])
def test_a_row_without_keys_has_output_zero_score_minus_infinity_and_no_gradient(how):
    q, k, v, _ = inputs(grad=True, tokens=0 if how == "no tokens" else 7)
    options = {"heads": 2, "text_index": torch.tensor([0, 1, 0])}
    if how == "length":
        options["text_length"] = torch.zeros(2, dtype=torch.int64)
    if how == "bias":
        options["key_bias"] = torch.full((2, 7), -INF, dtype=torch.float64)
    out, score = cross_attention_score(q, k, v, **options)
    assert not out.any()
    assert (score == -INF).all()
    for total in (out.sum(), score.sum()):
        grads = torch.autograd.grad(total, (q, k, v), retain_graph=True)
        assert not any(g.any() for g in grads)


def test_a_key_bias_of_log_n_counts_a_key_n_times():
    q, k, v, _ = inputs(texts=1, rows=1, tokens=2)
    bias = torch.tensor([[0.0, math.log(76)]], dtype=torch.float64)
    repeats = torch.tensor([1, 76])
    want = cross_attention_score(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), heads=2)
    got = cross_attention_score(q, k, v, heads=2, key_bias=bias)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_strides_and_shared_texts_do_not_matter():
    q, k, v, _ = inputs(rows=4, positions=6, heads=2, width=4)
    wide = torch.zeros(4, 6, 3 * 8, dtype=torch.float64)
    wide[..., 8:16] = q
    transposed = k.transpose(1, 2).contiguous().transpose(1, 2)
    index = torch.tensor([1, 1, 0, 1], dtype=torch.int32)
    got = cross_attention_score(wide[..., 8:16], transposed, v, heads=2, text_index=index)
    want = cross_attention_score(q, k[index.long()], v[index.long()], heads=2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_without_values_only_the_score():
    q, k, v, _ = inputs()
    index = torch.tensor([0, 1, 1])
    out, score = cross_attention_score(q, k, heads=2, text_index=index)
    assert out is None
    torch.testing.assert_close(score, cross_attention_score(q, k, v, heads=2, text_index=index)[1], rtol=0, atol=0)


@pytest.mark.usefixtures("implementation")
def test_gradients_are_equal_to_the_bit_on_repeats():
    q, k, v, _ = inputs(rows=16, positions=33, texts=3, dtype=torch.float32, grad=True)
    index = torch.arange(16) % 3

    def once():
        out, score = cross_attention_score(q, k, v, heads=2, text_index=index)
        return torch.autograd.grad(out.square().sum() + score.sum(), (q, k, v))

    first = once()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.usefixtures("implementation")
@given(
    sizes=st.tuples(*(st.integers(low, high) for low, high in ((0, 4), (0, 40), (1, 3), (0, 140), (1, 3), (1, 50)))),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    step=st.integers(1, 3),
    transposed=st.booleans(),
    mean=st.booleans(),
    data=st.data(),
)
def test_any_shape_stride_type_and_index(sizes, dtype, step, transposed, mean, data):
    rows, positions, texts, tokens, heads, width = sizes
    index = torch.tensor(
        data.draw(st.lists(st.integers(0, texts - 1), min_size=rows, max_size=rows)), dtype=torch.int64
    )
    q, k, v, _ = inputs(rows, positions, texts, tokens, heads, width * step, dtype)
    q, k, v = (x[..., ::step] for x in (q, k, v))
    if transposed:
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    leaves = [x.requires_grad_() for x in (q.detach(), k.detach(), v.detach())]
    reach = 1 + 4 * largest_logit(*leaves[:2], None, heads, None)

    def results(call, dtype):
        x = [leaf.to(dtype) for leaf in leaves]
        values = call(*x, index)
        loss = sum(y.masked_fill(y.isinf(), 0.0).sum() for y in values)
        return [*values, *torch.autograd.grad(loss, leaves)] if loss.requires_grad else list(values)

    ours = results(lambda q, k, v, i: cross_attention_score(q, k, v, heads=heads, text_index=i, mean=mean), dtype)
    plain = results(lambda q, k, v, i: written_out(q, k, v, heads=heads, index=i, mean=mean), dtype)
    truth = results(lambda q, k, v, i: written_out(q, k, v, heads=heads, index=i, mean=mean), torch.float64)
    for number, (mine, naive, true) in enumerate(zip(ours, plain, truth, strict=True)):
        assert mine.shape == true.shape
        seen = true.isfinite()
        assert torch.equal(mine.isfinite(), seen), number
        mine, naive, true = mine[seen], naive[seen], true[seen]
        # Beside the result's own rounding: the logits are exponents, and what is rounded of them is multiplied.
        assert error(mine, true) <= 2 * error(naive, true) + floor(true, mine.dtype) * reach, number


def test_nothing_of_size_heads_positions_tokens_is_allocated(monkeypatch):
    monkeypatch.setenv("DSD_FAST_BACKEND", "reference")
    q, k, v, _ = inputs(rows=1, positions=4096, texts=1, tokens=77, heads=8, width=40, dtype=torch.float32)
    per_row = 8 * 4096 * 77 * 4
    largest = max(allocations(lambda: cross_attention_score(q, k, v, heads=8, mean=True)))
    assert 0 < largest < per_row
    # The inputs are of a size at which the whole of a row would be seen: it is when a chunk holds it.
    monkeypatch.setitem(attention.CHUNK_ELEMENTS, "cpu", 1 << 40)
    assert max(allocations(lambda: cross_attention_score(q, k, v, heads=8, mean=True))) >= per_row


def test_flops_are_registered():
    q, k, v, _ = inputs(rows=3, positions=5, texts=2, tokens=7, heads=2, width=4, dtype=torch.float32, grad=True)
    index = torch.tensor([0, 1, 1])
    product = 2 * 3 * 5 * 7 * 8
    with FlopCounterMode(display=False) as counter:
        out, score = cross_attention_score(q, k, v, heads=2, text_index=index)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum() + score.sum(), q)
    assert counter.get_total_flops() == 5 * product
    with FlopCounterMode(display=False) as counter:
        cross_attention_score(q, k, heads=2, text_index=index)
    assert counter.get_total_flops() == product


@pytest.mark.usefixtures("implementation")
@pytest.mark.newest
def test_compiles_without_a_graph_break():
    q, k, v, _ = inputs(dtype=torch.float32)
    index = torch.tensor([0, 1, 1])

    def call(q, k, v, index):
        return cross_attention_score(q, k, v, heads=2, text_index=index, mean=True)

    want = call(q, k, v, index)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, index)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "q: got"),
        ({"k": torch.zeros(2, 7, 9)}, "k: got"),
        ({"v": torch.zeros(2, 6, 8)}, "v: got"),
        ({"k": torch.zeros(2, 7, 8).half()}, "k: got torch.float16"),
        ({"text_index": torch.tensor([0, 2, 0])}, "text_index: values from 0 to 2"),
        ({"text_index": torch.tensor([0, -1, 0])}, "text_index: values from -1"),
        ({"text_index": torch.tensor([0, 1])}, "text_index: got"),
        ({"text_index": torch.tensor([0.0, 1.0, 0.0])}, "text_index: got"),
        ({"text_index": None}, "text_index: needed"),
        ({"text_length": torch.tensor([8, 1])}, "text_length: values"),
        ({"key_bias": torch.zeros(2, 7).half()}, "key_bias: got"),
        ({"score_mask": torch.zeros(2, 6, dtype=torch.bool)}, "score_mask: got"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    q, k, v, _ = inputs(dtype=torch.float32)
    arguments = {"k": k, "v": v, "heads": 2, "text_index": torch.tensor([0, 1, 0])} | change
    with pytest.raises(ValueError, match=message):
        cross_attention_score(q, arguments.pop("k"), arguments.pop("v"), **arguments)


def test_backend_is_chosen_by_block_then_operator_then_all(monkeypatch):
    q, k, v, _ = inputs()
    index = torch.tensor([0, 1, 1])

    def call():
        cross_attention_score(q, k, v, heads=2, text_index=index)
        return backend.last("cross_attention_score")

    assert call() == "reference"
    monkeypatch.setenv("DSD_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="DSD_FAST_BACKEND: unknown backend 'nonsense'"):
        call()
    monkeypatch.setenv("DSD_FAST_BACKEND_CROSS_ATTENTION_SCORE", "reference")
    assert call() == "reference"
    with backend.force("triton"), pytest.raises(ValueError, match=r"force\(\): .* has no 'triton' implementation"):
        call()
