"""The Triton kernels of cross_attention_score and token_maps, interpreted on the CPU in float32, against float64.

Triton reads TRITON_INTERPRET when it is imported: the tests run in a process that has it, which one test starts.
"""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.cross_attention_score import cross_attention_score, kernel
from dsd_fast.kernels.token_maps import token_maps
from tests.kernels.attention import INF, attend, draw, gradients, largest_logit, maps_written_out, options, written_out
from tests.kernels.elementwise import INTERPRETED, run_interpreted

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of the first test")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="it starts this process")
def test_all_in_a_process_that_interprets():
    run_interpreted(__file__)


def assert_as_good_as_torch(call, plain, leaves, heads, scale=None, weights_seed=7):
    """Results and gradients: at most twice plain torch's error, and one unit in the last place of the largest.

    And what exponentials to the base 2 round more, each in proportion to the logits, which are exponents: log2(e),
    the logits' product with it, the log-sum-exp that is saved, and that one's product.
    """
    reach = 4 * largest_logit(*leaves[:2], leaves[3], heads, scale)
    with backend.force("triton"):
        ours = gradients(call, leaves, weights_seed)
    naive = gradients(plain, leaves, weights_seed)
    truth = gradients(plain, [None if x is None else x.double() for x in leaves], weights_seed)
    eps = torch.finfo(torch.float32).eps
    for number, (x, y, true) in enumerate(zip(ours, naive, truth, strict=True)):
        assert x.shape == true.shape
        if not x.numel():
            continue
        true = true.nan_to_num(neginf=-INF)
        assert torch.equal(x.isinf(), true.isinf()), number
        x, y, true = (z[~true.isinf()] for z in (x, y.nan_to_num(neginf=-INF), true))
        if not x.numel():
            continue
        limit = 2 * float((y - true).abs().max()) + float(true.abs().max()) * eps * (1 + reach)
        assert float((x - true).abs().max()) <= limit, number


def assert_attention(leaves, rest):
    ours, plain = (functools.partial(attend, operator, **rest) for operator in (cross_attention_score, written_out))
    assert_as_good_as_torch(ours, plain, leaves, rest["heads"], rest["scale"])


def check(rows, positions, texts, tokens, heads, width, **chosen):
    g = torch.Generator().manual_seed(0)
    leaves, rest = options(g, rows, positions, texts, tokens, heads, width, **chosen)
    assert_attention(leaves, rest)
    assert backend.last("cross_attention_score") == "triton"


# Interpreting takes long: of the 64 choices of six options, 16 in which any three of them meet in all eight ways. A GPU
# runs them all (tests/gpu/test_operators.py).
CHOICES = [(a, b, c, d, a ^ b ^ c, b ^ c ^ d) for a, b, c, d in itertools.product([False, True], repeat=4)]


def test_any_three_options_meet_in_every_way():
    assert all(
        len({tuple(choice[i] for i in three) for choice in CHOICES}) == 8
        for three in itertools.combinations(range(6), 3)
    )


@interpreted
@pytest.mark.parametrize(("streamed", "output", "mean", "masked", "limited", "biased"), CHOICES)
def test_every_option(streamed, output, mean, masked, limited, biased):
    tokens = 133 if streamed else 21
    check(4, 13, 3, tokens, 2, 4, output=output, mean=mean, masked=masked, limited=limited, biased=biased)


@interpreted
@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 3), (16, 40), (77, 40), (128, 40), (77, 64), (77, 80), (77, 160), (200, 3), (200, 160)]
)
def test_every_split_of_keys_and_width(tokens, width):
    """One tile of keys and many, widths of one part and of two, with and without a rest."""
    check(2, 5, 2, tokens, 1, width)


@interpreted
@pytest.mark.parametrize("launch", kernel.TEXT_LAUNCHES.values(), ids=str)
def test_every_launch_of_the_texts_gradients(launch, monkeypatch):
    """The launches of 16-bit inputs: tiles with and without a rest, dk and dv in one launch and in two."""
    monkeypatch.setattr(kernel, "TEXT_LAUNCH_FLOAT32", launch)
    check(3, 97, 2, 77, 2, 40, biased=True)


@interpreted
@pytest.mark.parametrize("positions", [0, 1, 13, 97])
@pytest.mark.parametrize("index", ["own text", "shared texts"])
def test_every_number_of_positions(positions, index):
    check(4, positions, 4 if index == "own text" else 2, 7, 2, 8, index=index == "shared texts", mean=True)


@interpreted
@pytest.mark.parametrize("shape", [(0, 5, 2, 7, 2, 8), (2, 5, 2, 0, 2, 8)], ids=["no rows", "no keys"])
def test_nothing(shape):
    check(*shape)


@interpreted
def test_a_negative_scale_and_none():
    check(2, 5, 2, 7, 2, 8, scale=-0.3)
    check(2, 5, 2, 7, 2, 8, scale=0.0)


@interpreted
@pytest.mark.parametrize("only", ["q", "k", "v", "bias"])
def test_only_the_gradient_that_is_asked_for(only):
    g = torch.Generator().manual_seed(0)
    leaves, rest = options(g, 5, 70, 3, 9, 2, 8, biased=True)
    number = ["q", "k", "v", "bias"].index(only)
    leaves[number].requires_grad_()
    call = functools.partial(attend, cross_attention_score, **rest)
    with backend.force("triton"):
        out, score = call(*leaves)
        mine = torch.autograd.grad(out.square().sum() + score.sum(), leaves[number])
    with backend.force("reference"):
        out, score = call(*leaves)
        true = torch.autograd.grad(out.square().sum() + score.sum(), leaves[number])
    torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)


@interpreted
def test_strides_do_not_matter():
    g = torch.Generator().manual_seed(0)
    q, k, v = (draw(g, n, 6, 3 * 16) for n in (4, 2, 2))
    index = torch.tensor([1, 0, 0, 1])
    views = [q[..., 16:32], k.transpose(1, 2).contiguous().transpose(1, 2)[..., :16], v[..., ::3]]
    with backend.force("triton"):
        got = cross_attention_score(*views, heads=2, text_index=index.int())
        want = cross_attention_score(*(x.contiguous() for x in views), heads=2, text_index=index)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("positions", [0, 5])
@pytest.mark.parametrize("used", ["output", "score", "maps"])
def test_gradients_of_permuted_inputs_are_contiguous(positions, used):
    g = torch.Generator().manual_seed(0)
    leaves = [draw(g, 2, 16, size).transpose(1, 2).requires_grad_() for size in (positions, 7, 7)]
    with backend.force("triton"):
        out, score = cross_attention_score(*leaves, heads=2)
        maps = token_maps(*leaves[:2], torch.zeros(2, 1, dtype=torch.long), None, None, None, heads=2, scale=0.5)
    total = {"output": out, "score": score, "maps": maps}[used].sum()
    grads = torch.autograd.grad(total, leaves[: 2 if used == "maps" else 3])
    assert all(x.is_contiguous() for x in grads)


@interpreted
@pytest.mark.parametrize("how", ["length", "bias"])
@pytest.mark.parametrize("tokens", [21, 133])
def test_masked_keys_are_not_read(how, tokens):
    g = torch.Generator().manual_seed(0)
    q, k, v = (draw(g, n, m, 8) for n, m in ((3, 5), (2, tokens), (2, tokens)))
    real = torch.tensor([3, 0])
    beyond = torch.arange(tokens) >= real[:, None]
    bias = torch.zeros(2, tokens).masked_fill(beyond, -INF)
    rest = {"text_length": real} if how == "length" else {"key_bias": bias}

    def results(k, v):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with backend.force("triton"):
            out, score = cross_attention_score(*leaves, heads=2, text_index=torch.tensor([0, 1, 0]), **rest)
            maps = token_maps(
                *leaves[:2], torch.tensor([[0], [2], [1]]), torch.tensor([0, 1, 0]), real, None, heads=2, scale=0.5
            )
        loss = out.square().sum() + score[[0, 2]].square().sum() + maps.square().sum()
        return (out, score, maps, *torch.autograd.grad(loss, leaves))

    want = results(k, v)
    for poison in (float("nan"), INF):
        spoiled = (x.masked_fill(beyond[..., None], poison) for x in (k, v))
        torch.testing.assert_close(results(*spoiled), want, rtol=0, atol=0)


@interpreted
def test_equal_to_the_bit_on_repeats_and_whatever_else_is_in_the_batch():
    g = torch.Generator().manual_seed(0)
    leaves = [draw(g, n, m, 16).requires_grad_() for n, m in ((8, 97), (3, 21), (3, 21))]
    index = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0])

    def once():
        with backend.force("triton"):
            out, score = cross_attention_score(*leaves, heads=2, text_index=index, mean=True)
        return (out, score, *torch.autograd.grad(out.square().sum() + score.sum(), leaves))

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
    with backend.force("triton"):
        alone = cross_attention_score(leaves[0][5:6], *leaves[1:], heads=2, text_index=index[5:6], mean=True)
    assert torch.equal(alone[0], first[0][5:6])
    assert torch.equal(alone[1], first[1][5:6])


@interpreted
@pytest.mark.parametrize(
    ("count", "tokens", "masked"),
    [(1, 21, False), (17, 21, True), (17, 133, False), (1, 133, True)],
    ids=["one map", "more than a block of maps, masked keys", "more than a block of maps", "one map, masked keys"],
)
def test_token_maps(count, tokens, masked):
    g = torch.Generator().manual_seed(0)
    leaves, rest = options(g, 3, 13, 2, tokens, 2, 40, biased=masked, limited=masked, output=False)
    chosen = torch.randint(tokens, (3, count), generator=g)

    def call(q, k, _, bias):
        return (token_maps(q, k, chosen, rest["index"], rest["length"], bias, heads=2, scale=0.2),)

    def plain(q, k, _, bias):
        return (maps_written_out(q, k, chosen, rest["index"], rest["length"], bias, heads=2, scale=0.2),)

    assert_as_good_as_torch(call, plain, leaves, heads=2, scale=0.2)
    assert backend.last("token_maps") == "triton"


@interpreted
@settings(max_examples=12)
@given(
    st.integers(0, 3), st.integers(0, 9), st.integers(1, 3), st.integers(0, 40), st.integers(1, 2), st.integers(1, 24),
    st.booleans(), st.booleans(), st.data(),
)  # fmt: skip
def test_any_shape(rows, positions, texts, tokens, heads, width, mean, limited, data):
    index = data.draw(st.lists(st.integers(0, texts - 1), min_size=rows, max_size=rows))
    g = torch.Generator().manual_seed(0)
    leaves, rest = options(g, rows, positions, texts, tokens, heads, width, mean=mean, limited=limited)
    rest["index"] = torch.tensor(index, dtype=torch.int64)
    assert_attention(leaves, rest)
