"""The CUDA C++ form of cross_attention_score on a device: its accuracy, repeats, streams and addresses."""

import itertools
import math

import pytest
import torch

from dsd_fast.kernels.common import backend, native
from dsd_fast.kernels.cross_attention_score import cross_attention_score, reference

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16)
WIDTHS = (40, 64, 80, 128, 160)


@pytest.fixture(autouse=True)
def library():
    if not native.load("cuda"):
        pytest.skip("dsd_fast._cuda is not built")


def draw(dtype, width, rows=6, positions=197, texts=4, tokens=77, heads=3, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    sizes = ((rows, positions), (texts, tokens), (texts, tokens))
    q, k, v = (torch.randn(*size, heads * width, generator=g, device="cuda").to(dtype) for size in sizes)
    # No row has text 3, and the order is none.
    return q, k, v, torch.tensor([2, 0, 0, 2, 1, 2], device="cuda")[:rows], g


def call(q, k, v, index, *, heads=3, **options):
    with torch.no_grad(), backend.force("cuda"):
        out, score = cross_attention_score(q, k, v, heads=heads, text_index=index, **options)
    assert backend.last("cross_attention_score") == "cuda"
    return (score,) if out is None else (out, score)


def plain(q, k, v, index, *, heads=3, text_length=None, key_bias=None, score_mask=None, mean=False):
    """The reference's formula in the type of the inputs, without float32 inside."""
    rows, length, width = q.shape
    bias = torch.zeros(k.shape[:2], device=q.device) if key_bias is None else key_bias
    if text_length is not None:
        beyond = torch.arange(k.shape[1], device=q.device) >= text_length[:, None]
        bias = bias.masked_fill(beyond, -math.inf)
    k, v = (x.masked_fill(bias[..., None] == -math.inf, 0)[index] for x in (k, k if v is None else v))
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias[index][:, None, None].to(q.dtype)
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width)
    if score_mask is not None:
        logits = logits.masked_fill(~score_mask[index][:, None, None], -math.inf)
    score = logits.logsumexp(-1)
    return out, score.mean(-1) if mean else score


def check(ours, q, k, v, index, **options):
    """Within twice plain torch's error in the inputs' type, and one unit in the last place of the largest result."""
    naive = plain(q, k, v, index, **options)
    double = [None if x is None else x.double() for x in (q, k, v)]
    bias = options.get("key_bias")
    truth = reference.forward(
        *double,
        index,
        options.get("text_length"),
        None if bias is None else bias.double(),
        options.get("score_mask"),
        heads=3,
        scale=(q.shape[-1] // 3) ** -0.5,
        mean=options.get("mean", False),
        save=False,
    )[:2]
    for mine, theirs, true in list(zip((None, *ours)[-2:], naive, truth, strict=True)):
        if mine is None:
            continue
        error, other = (float((x.double() - true).abs().max()) for x in (mine, theirs))
        assert error <= 2 * other + float(true.abs().max()) * torch.finfo(mine.dtype).eps


@pytest.mark.parametrize("tokens", [1, 24, 77, 128], ids="T{}".format)
@pytest.mark.parametrize("output", [True, False], ids=["output", "score"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS, ids="D{}".format)
def test_every_kernel(width, dtype, output, tokens):
    q, k, v, index, _ = draw(dtype, width, tokens=tokens)
    case = (q, k, v if output else None, index)
    check(call(*case), *case)


@pytest.mark.sanitizer
@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=5)), ids=str)
def test_every_option(options):
    output, limited, biased, masked, mean = options
    q, k, v, index, g = draw(torch.bfloat16, 40, positions=67)
    chosen = {"mean": mean}
    if limited:
        chosen["text_length"] = torch.tensor([77, 2, 40, 33], device="cuda")
        beyond = torch.arange(77, device="cuda") >= chosen["text_length"][:, None]
        k[beyond] = v[beyond] = math.nan
    if biased:
        chosen["key_bias"] = torch.randn(4, 77, generator=g, device="cuda")
        chosen["key_bias"][:, ::7] = -math.inf
        k[:, ::7] = v[:, ::7] = math.nan
    if masked:
        chosen["score_mask"] = torch.rand(4, 77, generator=g, device="cuda") > 0.4
        chosen["score_mask"][:, 1] = True  # so that no text is left without a key
    case = (q, k, v if output else None, index)
    check(call(*case, **chosen), *case, **chosen)


@pytest.mark.sanitizer
@pytest.mark.parametrize("positions", [1, 15, 16, 17, 1031], ids="L{}".format)
def test_results_end_where_they_should(positions):
    """What lies in memory before and after q, k and v does not reach the result."""

    def between(x):
        guarded = torch.full((x.numel() + 4096,), math.nan, dtype=x.dtype, device="cuda")
        guarded[2048 : 2048 + x.numel()] = x.flatten()
        return guarded[2048 : 2048 + x.numel()].view(x.shape)

    q, k, v, index, _ = draw(torch.float16, 64, positions=positions)
    case = (between(q), between(k), between(v), index)
    check(call(*case), *case)


def test_strides_of_slices_and_odd_addresses():
    g = torch.Generator("cuda").manual_seed(0)
    joint = torch.randn(67, 6, 3 * 120, generator=g, device="cuda").to(torch.bfloat16)
    pair = torch.randn(4, 77, 241, generator=g, device="cuda").to(torch.bfloat16)
    case = (joint.transpose(0, 1)[..., :120], pair[..., 1:121], pair[..., 121:], draw(torch.bfloat16, 40)[3])
    check(call(*case), *case)


def test_equal_bits_on_repeats_and_in_every_batch():
    q, k, v, index, _ = draw(torch.bfloat16, 40, positions=1024)
    for options in ({}, {"mean": True}):
        first = call(q, k, v, index, **options)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first, call(q, k, v, index, **options), strict=True))
        # Many rows are cut into longer blocks than one.
        many = call(q.repeat(64, 1, 1), k, v, index.repeat(64), **options)
        assert all(torch.equal(a, b[-len(a) :]) for a, b in zip(first, many, strict=True))


def test_side_stream_waits_for_its_producer():
    q, k, v, index, _ = draw(torch.float16, 64)
    want = call(q, k, v, index)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(q)
        got = call(late, k, v, index)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    q, k, v, index, _ = draw(torch.float16, 64)
    want = call(q, k, v, index)
    got = call(*(x.to("cuda:1") for x in (q, k, v, index)))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


def test_addresses_beyond_32_bits():
    rows, positions, width = 54, 1 << 20, 40
    if torch.cuda.mem_get_info()[0] < 3 * rows * positions * width * 2:
        pytest.skip("too little memory for two tensors of more than 2³¹ elements")
    q = torch.randn(1, positions, width, device="cuda").half().expand(rows, -1, -1).contiguous()
    k, v = torch.randn(2, 1, 77, width, device="cuda").half()
    index = torch.zeros(rows, dtype=torch.long, device="cuda")
    out, score = call(q, k, v, index, heads=1)
    assert q.numel() > 1 << 31
    assert torch.equal(out[0], out[-1])
    assert torch.equal(score[0], score[-1])
