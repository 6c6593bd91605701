"""The attention operators on a CUDA device: options, types and widths against float64, and what only a GPU shows."""

import functools

import pytest
import torch

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.cross_attention_score import cross_attention_score
from dsd_fast.kernels.token_maps import token_maps
from tests.kernels.attention import INF, attend, draw, largest_logit, maps_written_out, options, written_out

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [3, 40, 64, 80, 128, 160, 256]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def gradients(call, leaves, weights):
    """The results and the gradients of the leaves, on the CPU in float64."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
    results = call(*leaves)
    loss = sum((w.to(x) * x.masked_fill(x.isinf(), 0.0)).sum() for w, x in zip(weights, results, strict=True))
    found = torch.autograd.grad(loss, [x for x in leaves if x is not None], allow_unused=True)
    found = [torch.zeros(()) if x is None else x for x in found]
    return [x.detach().double().cpu().nan_to_num(neginf=-INF) for x in (*results, *found)]


def assert_as_good_as_torch(call, plain, leaves, shapes, heads, scale, dtype):
    """The error is at most twice plain torch's of the same type, and one unit in the last place of the largest value.

    In float32 also what exponentials to the base 2 round more, in proportion to the logits.
    """
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(shape, generator=g, dtype=torch.float64).cuda() for shape in shapes]
    ours = gradients(call, leaves, weights)
    naive = gradients(plain, leaves, weights)
    truth = gradients(plain, [None if x is None else x.double() for x in leaves], weights)
    reach = 4 * largest_logit(*leaves[:2], leaves[3], heads, scale) * torch.finfo(torch.float32).eps
    for number, (x, y, true) in enumerate(zip(ours, naive, truth, strict=True)):
        assert torch.equal(x.isinf(), true.isinf()), number
        x, y, true = (z[~true.isinf()] for z in (x, y, true))
        if x.numel():
            limit = 2 * float((y - true).abs().max()) + float(true.abs().max()) * (torch.finfo(dtype).eps + reach)
            assert float((x - true).abs().max()) <= limit, number


def on_gpu(leaves, rest):
    def move(x):
        return x.cuda() if isinstance(x, torch.Tensor) else x

    return [move(x) for x in leaves], {name: move(x) for name, x in rest.items()}


def check(shape, dtype, **chosen):
    rows, positions, _, _, heads, width = shape
    g = torch.Generator().manual_seed(0)
    leaves, rest = on_gpu(*options(g, *shape, dtype=dtype, **chosen))
    score = (rows, heads) if rest["mean"] else (rows, heads, positions)
    shapes = [score] if leaves[2] is None else [(rows, positions, heads * width), score]
    ours, plain = (functools.partial(attend, operator, **rest) for operator in (cross_attention_score, written_out))
    assert_as_good_as_torch(ours, plain, leaves, shapes, heads, rest["scale"], dtype)
    assert backend.last("cross_attention_score") == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [77, 200], ids=["one tile", "a loop"])
@pytest.mark.parametrize("output", [True, False], ids=["output", "score alone"])
@pytest.mark.parametrize("mean", [False, True], ids=["each position", "mean"])
@pytest.mark.parametrize("masked", [False, True], ids=["all keys score", "score_mask"])
@pytest.mark.parametrize("limited", [False, True], ids=["all keys", "text_length"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "key_bias"])
def test_every_option(dtype, tokens, output, mean, masked, limited, biased):
    shape = (6, 97, 3, tokens, 4, 40)
    check(shape, dtype, output=output, mean=mean, masked=masked, limited=limited, biased=biased)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 77, 128, 200])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_split_of_keys_and_width(dtype, tokens, width):
    check((3, 131, 2, tokens, 2, width), dtype)


@pytest.mark.sanitizer
@pytest.mark.parametrize("positions", [0, 1, 13, 64, 1024])
@pytest.mark.parametrize("index", [False, True], ids=["own text", "shared texts"])
def test_every_number_of_positions(positions, index):
    check((8, positions, 3 if index else 8, 77, 8, 40), torch.bfloat16, index=index, mean=True)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 17])
def test_token_maps(dtype, width, count):
    g = torch.Generator().manual_seed(0)
    leaves, rest = options(g, 4, 97, 3, 77, 2, width, biased=True, limited=True, output=False, dtype=dtype)
    chosen = torch.randint(77, (4, count), generator=g).cuda()
    leaves, rest = on_gpu(leaves, rest)

    def maps(operator):
        return lambda q, k, _, bias: (
            operator(q, k, chosen, rest["index"], rest["length"], bias, heads=2, scale=width**-0.5),
        )

    shapes = [(4, count, 97)]
    assert_as_good_as_torch(maps(token_maps), maps(maps_written_out), leaves, shapes, 2, None, dtype)
    assert backend.last("token_maps") == "triton"


def problem(rows=16, positions=256, texts=3, width=160, dtype=torch.bfloat16, device="cuda"):
    g = torch.Generator().manual_seed(0)
    sizes = ((rows, positions), (texts, 77), (texts, 77))
    leaves = [draw(g, *size, width, dtype=dtype).to(device).requires_grad_() for size in sizes]
    return leaves, (torch.arange(rows) * 7 % texts).to(device)


def results(leaves, index, heads=4):
    out, score = cross_attention_score(*leaves, heads=heads, text_index=index, mean=True)
    tokens = torch.arange(2, device=index.device).expand(len(index), 2)
    maps = token_maps(leaves[0], leaves[1], tokens, index, None, None, heads, 0.1)
    loss = out.square().sum() + score.sum() + maps.square().sum()
    return (out, score, maps, *torch.autograd.grad(loss, leaves))


def test_more_texts_than_the_second_axis_of_a_grid_takes():
    g = torch.Generator().manual_seed(0)
    texts = (1 << 16) + 3
    q, k, v = (draw(g, texts, 2, 16).cuda().requires_grad_() for _ in range(3))
    index = torch.arange(texts).flip(0).cuda()

    def grads(operator):
        out, score = operator(q, k, v, index)
        return torch.autograd.grad(out.square().sum() + score.sum(), (q, k, v))

    ours = grads(lambda q, k, v, index: cross_attention_score(q, k, v, heads=1, text_index=index))
    plain = grads(lambda q, k, v, index: written_out(q, k, v, heads=1, index=index))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_equal_to_the_bit_on_repeats():
    leaves, index = problem()
    first = results(leaves, index)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, results(leaves, index), strict=True))


def test_a_rows_results_do_not_depend_on_what_else_is_in_the_batch():
    leaves, index = problem(positions=4096)
    out, score = cross_attention_score(*leaves, heads=4, text_index=index, mean=True)
    alone = cross_attention_score(leaves[0][5:6], *leaves[1:], heads=4, text_index=index[5:6], mean=True)
    assert torch.equal(alone[0], out[5:6])
    assert torch.equal(alone[1], score[5:6])


def test_a_side_stream_waits_for_nobody_else():
    """The inputs are made late on the stream that launches: a launch on another one would read them too early."""
    leaves, index = problem()
    want = results(leaves, index)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = [x.detach().clone().requires_grad_() for x in leaves]
        got = results(late, index)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one():
    leaves, index = problem()
    want = results(leaves, index)
    there = [x.detach().to("cuda:1").requires_grad_() for x in leaves]
    got = results(there, index.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b.to("cuda:0")) for a, b in zip(want, got, strict=True))


def test_no_host_synchronisation():
    leaves, index = problem()
    results(leaves, index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(leaves, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_with_new_inputs():
    leaves, index = problem()
    results(leaves, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(leaves, index)
    with torch.no_grad():
        for x in leaves:
            x.mul_(0.5).add_(0.25)
        index.copy_(index.flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results(leaves, index), got, strict=True))


def test_compiles_in_full_for_any_number_of_rows():
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(q, k, v, index):
        out, score = cross_attention_score(q, k, v, heads=4, text_index=index)
        return out.float().square().sum() + score.sum()

    for rows in (16, 7):
        leaves, index = problem(rows)
        out, score = cross_attention_score(*leaves, heads=4, text_index=index)
        want = torch.autograd.grad(out.float().square().sum() + score.sum(), leaves)
        got = torch.autograd.grad(compiled(*leaves, index), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * float(b.abs().max()))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 20 << 30, reason="less than 20 GiB of GPU memory"
)
def test_more_than_two_to_the_31_elements():
    """The last row lies beyond what 32 bits address; it is that of a call with this row alone."""
    rows, positions, width = 820, 4096, 640
    assert rows * positions * width > 1 << 31
    q = torch.zeros(rows, positions, width, dtype=torch.bfloat16, device="cuda")
    g = torch.Generator().manual_seed(0)
    k, v = (draw(g, 2, 77, width, dtype=torch.bfloat16).cuda() for _ in range(2))
    q[-1] = draw(g, positions, width, dtype=torch.bfloat16).cuda()
    index = torch.zeros(rows, dtype=torch.int64, device="cuda")
    index[-1] = 1
    out, score = cross_attention_score(q, k, v, heads=8, text_index=index, mean=True)
    want = cross_attention_score(q[-1:].clone(), k, v, heads=8, text_index=index[-1:], mean=True)
    assert torch.equal(out[-1:], want[0])
    assert torch.equal(score[-1:], want[1])
