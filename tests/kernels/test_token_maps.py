"""Token maps against the softmax written out."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dsd_fast.kernels.common import attention, backend, native
from dsd_fast.kernels.token_maps import token_maps
from tests.kernels.attention import INF, draw, largest_logit, maps_written_out


@pytest.mark.parametrize("chunk", [1 << 20, 50])
def test_maps_equal_the_softmax_averaged_over_heads(monkeypatch, chunk):
    monkeypatch.setitem(attention.CHUNK_ELEMENTS, "cpu", chunk)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 6, 8, generator=g, dtype=torch.float64).requires_grad_() for n in (3, 2))
    index, length = torch.tensor([1, 0, 1]), torch.tensor([4, 6])
    bias = torch.randn(2, 6, generator=g, dtype=torch.float64)
    tokens = torch.tensor([[0, 3], [2, 2], [5, 1]])
    got = token_maps(q, k, tokens, index, length, bias, heads=2, scale=0.5)
    split = [x.reshape(3, 6, 2, 4).transpose(1, 2) for x in (q, k[index])]
    logits = split[0] @ split[1].transpose(-1, -2) * 0.5 + bias[index][:, None, None]
    logits = logits.masked_fill((torch.arange(6) >= length[index][:, None])[:, None, None], float("-inf"))
    p = torch.softmax(logits, -1).mean(1)
    want = p.gather(-1, tokens[:, None, :].expand(-1, 6, -1)).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for mine, true in zip(
        torch.autograd.grad(got.square().sum(), (q, k)), torch.autograd.grad(want.square().sum(), (q, k)), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "implementation",
    [
        "reference",
        pytest.param("cpu", marks=pytest.mark.skipif(not native.load(), reason="the CPU library is not built")),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (3, 97, 2, 77, 3, 8, 40), (2, 13, 2, 200, 1, 2, 64)], ids=str)
def test_error_is_within_twice_plain_torch(shape, implementation, dtype):
    rows, positions, texts, tokens, count, heads, width = shape
    g = torch.Generator().manual_seed(0)
    q, k = (draw(g, n, m, heads * width, dtype=dtype) for n, m in ((rows, positions), (texts, tokens)))
    index = torch.randint(texts, (rows,), generator=g)
    chosen = torch.randint(tokens, (rows, count), generator=g)
    dmaps = draw(g, rows, count, positions)
    reach = largest_logit(q, k, None, heads, None)

    def results(operator, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k)]
        maps = operator(*leaves, chosen, index, None, None, heads=heads, scale=width**-0.5)
        return [maps, *torch.autograd.grad(maps, leaves, dmaps.to(maps.dtype))]

    with backend.force(implementation):
        ours = results(token_maps, dtype)
    assert backend.last("token_maps") == implementation
    assert ours[0].dtype == torch.float32
    plain, truth = results(maps_written_out, dtype), results(maps_written_out, torch.float64)
    for mine, naive, true in zip(ours, plain, truth, strict=True):
        # Beside the result's own rounding: the logits are exponents, and what is rounded of them is multiplied.
        rounding = torch.finfo(mine.dtype).eps + 4 * reach * torch.finfo(torch.float32).eps
        floor = float(true.abs().max()) * rounding
        assert float((mine - true).abs().max()) <= 2 * float((naive - true).abs().max()) + floor


def problem(dtype=torch.float64, grad=True):
    g = torch.Generator().manual_seed(0)
    leaves = [draw(g, *size, dtype=dtype) for size in ((3, 5, 8), (2, 7, 8), (2, 7))]
    leaves[2][1, 3] = -INF
    index, chosen = torch.tensor([1, 0, 1]), torch.tensor([[0, 3], [2, 2], [6, 1]])
    return [x.requires_grad_(grad) for x in leaves], index, torch.tensor([5, 7]), chosen


def test_gradcheck():
    leaves, index, length, chosen = problem()
    leaves[2] = torch.zeros_like(leaves[2]).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, bias: token_maps(q, k, chosen, index, length, bias, heads=2, scale=0.5), leaves
    )


@pytest.mark.parametrize("rows", [3, 0])
def test_opcheck(rows):
    (q, k, bias), index, length, chosen = problem(torch.float32)
    q = q.detach()[:rows].requires_grad_()
    operator = torch.ops.dsd_fast.token_maps.default
    opcheck(operator, (q, k, chosen[:rows], index[:rows], length, bias, 2, 0.5))
    opcheck(operator, (q.detach()[..., ::2], k.detach()[..., ::2], chosen[:rows], index[:rows], None, None, 2, 0.5))
    opcheck(operator, (q.detach(), k.detach()[[0] * rows], chosen[:rows], None, None, None, 2, 0.5))


@pytest.mark.parametrize("permuted", ["q", "k", "qk"])
def test_opcheck_of_both_operators_over_permuted_leaves(permuted):
    (q, k, bias), index, length, chosen = problem(torch.float32)
    q, k = (
        (x.detach().transpose(1, 2).contiguous().transpose(1, 2) if name in permuted else x.detach()).requires_grad_()
        for name, x in (("q", q), ("k", k))
    )
    options = (chosen, index, length)
    opcheck(torch.ops.dsd_fast.token_maps.default, (q, k, *options, bias, 2, 0.5))
    # Autograd is registered with the forward operator alone.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    opcheck(
        torch.ops.dsd_fast.token_maps_backward.default,
        (draw(torch.Generator().manual_seed(1), 3, 2, 5), q.detach(), k.detach(), *options, bias.detach(), 2, 0.5),
        test_utils=checks,
    )


def test_forward_mode_and_transforms_are_refused():
    (q, k, bias), index, length, chosen = problem(torch.float32, grad=False)

    def maps(q):
        return token_maps(q, k, chosen, index, length, bias, heads=2, scale=0.5)

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="token_maps: got an input with a forward"):
        maps(forward_ad.make_dual(q, q))
    with pytest.raises(NotImplementedError, match="token_maps: got an input with a forward"):
        torch.func.jvp(maps, (q,), (q,))
    with pytest.raises(NotImplementedError, match=r"token_maps: .* transform of torch.func"):
        torch.func.grad(lambda q: maps(q).sum())(q)


def test_flops_are_registered():
    (q, k, _), index, _, chosen = problem(torch.float32)
    product = 2 * 3 * 5 * 7 * 8
    with FlopCounterMode(display=False) as counter:
        maps = token_maps(q, k, chosen, index, None, None, heads=2, scale=0.5)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(maps.sum(), q)
    assert counter.get_total_flops() == 3 * product


def test_compiles_without_a_graph_break():
    (q, k, bias), index, length, chosen = problem(torch.float32)

    def call(q, k, bias):
        return token_maps(q, k, chosen, index, length, bias, heads=2, scale=0.5).square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want, got = (torch.autograd.grad(f(q, k, bias), (q, k, bias)) for f in (call, compiled))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.tensor([[0], [7], [0]])}, "tokens: values from 0 to 7, expected 0 to 6"),
        ({"tokens": torch.tensor([0, 1, 2])}, "tokens: got"),
        ({"tokens": torch.zeros(3, 1)}, "tokens: got"),
        ({"index": torch.tensor([0, 2, 0])}, "text_index: values from 0 to 2"),
        ({"index": None}, "text_index: needed"),
        ({"k": torch.zeros(2, 7, 6)}, "k: got"),
        ({"bias": torch.zeros(2, 6)}, "key_bias: got"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    (q, k, bias), index, length, chosen = problem(torch.float32, grad=False)
    given = {"k": k, "tokens": chosen, "index": index, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        token_maps(q, given["k"], given["tokens"], given["index"], length, given["bias"], heads=2, scale=0.5)


@pytest.mark.parametrize("how", ["length", "bias"])
def test_masked_tokens_have_maps_of_0_and_a_row_without_keys_no_gradient(how):
    (q, k, _), _, _, chosen = problem()
    index = torch.tensor([0, 1, 0])
    beyond = torch.arange(7) >= torch.tensor([3, 0])[:, None]
    bias = torch.zeros(2, 7, dtype=torch.float64).masked_fill(beyond, -INF)
    options = (torch.tensor([3, 0]), None) if how == "length" else (None, bias)
    k = k.detach().masked_fill(beyond[..., None], float("nan")).requires_grad_()
    maps = token_maps(q, k, chosen, index, *options, heads=2, scale=0.5)
    assert maps[0, 0].all()
    assert not maps[0, 1].any()
    assert not maps[1].any()
    dq, dk = torch.autograd.grad(maps.square().sum(), (q, k))
    assert not dq[1].any()
    assert not dk[beyond].any()
    assert not dq.isnan().any()


def test_a_backend_it_does_not_have_is_an_error():
    index = torch.zeros(1, dtype=torch.int64)
    with backend.force("triton"), pytest.raises(ValueError, match="token_maps has no 'triton' implementation"):
        token_maps(torch.zeros(1, 5, 4), torch.zeros(1, 3, 4), index[None], index, None, None, heads=2, scale=1.0)


def test_no_rows_no_maps():
    none = torch.zeros(0, dtype=torch.int64)
    empty = token_maps(
        torch.zeros(0, 5, 4), torch.zeros(1, 3, 4), none.view(0, 2), none, None, None, heads=2, scale=1.0
    )
    assert empty.shape == (0, 2, 5)
