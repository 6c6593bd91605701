"""The kernels of group norm, GEGLU and layer norm on a CUDA device."""

import pytest
import torch
import torch.nn.functional as F

from dsd_fast.kernels.add_layer_norm import add_layer_norm
from dsd_fast.kernels.common import backend
from dsd_fast.kernels.geglu import geglu
from dsd_fast.kernels.group_norm_silu import group_norm_silu

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

CHANNELS_LAST = torch.channels_last
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def group_norm_plain(x, weight, bias, shift, groups):
    return (F.silu(F.group_norm(x + shift[:, :, None, None], groups, weight, bias)),)


def group_norm_ours(x, weight, bias, shift, groups):
    return (group_norm_silu(x, weight, bias, groups, shift=shift),)


def geglu_plain(x, _):
    value, gate = x.chunk(2, dim=-1)
    return (value * F.gelu(gate),)


def geglu_ours(x, _):
    return (geglu(x),)


def layer_norm_plain(x, residual, weight, bias, _):
    total = x + residual
    return total, F.layer_norm(total, total.shape[-1:], weight, bias)


def layer_norm_ours(x, residual, weight, bias, _):
    return add_layer_norm(x, residual, weight, bias)


def image(shape, groups, layout=CHANNELS_LAST):
    shapes = (shape, shape[1:2], shape[1:2], shape[:2])
    return group_norm_ours, group_norm_plain, shapes, groups, layout


def gate(*shape):
    return geglu_ours, geglu_plain, (shape,), None, torch.contiguous_format


def stream(*shape):
    return layer_norm_ours, layer_norm_plain, (shape, shape, shape[-1:], shape[-1:]), None, torch.contiguous_format


# The widths of SD 1.5, 2.x and SDXL; primes, a pixel, one image, a width beyond one tile of columns.
CASES = {
    "group norm 64x64 C320": image((2, 320, 64, 64), 32),
    "group norm 64x64 C960": image((1, 960, 64, 64), 32),
    "group norm 32x32 C640": image((2, 640, 32, 32), 32),
    "group norm 16x16 C1280": image((3, 1280, 16, 16), 32),
    "group norm 8x8 C2560": image((3, 2560, 8, 8), 32),
    "group norm NCHW 64x64 C320": image((2, 320, 64, 64), 32, torch.contiguous_format),
    "group norm NCHW 8x8 C1280": image((2, 1280, 8, 8), 32, torch.contiguous_format),
    "group norm 37x41 C26": image((1, 26, 37, 41), 2),
    "group norm 1x1 C7": image((1, 7, 1, 1), 7),
    "group norm one group": image((2, 97, 13, 11), 1),
    "geglu N1280": gate(2, 1024, 2560),
    "geglu N5120": gate(2, 64, 10240),
    "geglu prime": gate(13, 2 * 307),
    "geglu one": gate(1, 2),
    "layer norm C320": stream(2, 4096, 320),
    "layer norm C640": stream(2, 1024, 640),
    "layer norm C1280": stream(2, 256, 1280),
    "layer norm C997": stream(31, 997),
    "layer norm one": stream(1, 1),
    "layer norm C9000": stream(5, 9000),
}
SMALL = ["group norm 37x41 C26", "group norm one group", "group norm 8x8 C2560", "geglu prime", "layer norm C997"]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(autouse=True)
def kernels():
    with backend.force("triton"):
        yield


def tensors(case, dtype):
    _, _, shapes, _, layout = case
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=g, dtype=torch.float64).to("cuda", dtype) for shape in shapes]
    made[0] = made[0].contiguous(memory_format=layout)
    return made


def results(call, made, extra, kind=None):
    leaves = [(x if kind is None else x.to(kind)).detach().requires_grad_() for x in made]
    outputs = call(*leaves, extra)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=g, dtype=torch.float64).to("cuda", y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def check(case, dtype):
    ours, plain, _, extra, layout = case
    made = tensors(case, dtype)
    got = results(ours, made, extra)
    assert got[0].is_contiguous(memory_format=layout)
    for x, naive, true in zip(
        got, results(plain, made, extra), results(plain, made, extra, torch.float64), strict=True
    ):
        limit = 2 * float((naive - true).abs().max()) + float(true.abs().max()) * torch.finfo(dtype).eps
        assert float((x - true).abs().max()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_as_good_as_torchs(case, dtype):
    name = {group_norm_ours: "group_norm_silu", geglu_ours: "geglu", layer_norm_ours: "add_layer_norm"}[case[0]]
    if case is CASES["group norm 1x1 C7"]:
        # Torch refuses to normalise one number; a normalised one is the bias.
        made = tensors(case, dtype)
        (y,) = group_norm_ours(*made, 7)
        torch.testing.assert_close(y, F.silu(made[2].float()).to(dtype)[None, :, None, None])
    else:
        check(case, dtype)
    assert backend.last(name) == "triton"


@pytest.mark.sanitizer
@pytest.mark.parametrize("name", SMALL)
def test_small_shapes_touch_only_their_own_memory(name):
    check(CASES[name], torch.float16)


def test_repeats_are_equal_to_the_bit(case):
    made = tensors(case, torch.bfloat16)
    first = results(case[0], made, case[3])
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, results(case[0], made, case[3]), strict=True))


@pytest.mark.parametrize("name", ["group norm 64x64 C320", "group norm 8x8 C2560"])
def test_an_image_does_not_depend_on_its_batch(name):
    made = tensors(CASES[name], torch.bfloat16)
    together = results(group_norm_ours, made, 32)
    alone = results(group_norm_ours, [made[0][1:2], *made[1:3], made[3][1:2]], 32)
    assert torch.equal(together[0][1:2], alone[0])


def test_compiles_whole_with_the_same_numbers(case):
    torch._dynamo.reset()
    ours, _, _, extra, _ = case
    made = tensors(case, torch.bfloat16)
    compiled = results(torch.compile(ours, fullgraph=True), made, extra)
    torch.testing.assert_close(compiled, results(ours, made, extra), rtol=0, atol=0)


def test_captured_graphs_replay_without_a_synchronisation(case):
    """With gradients; no step waits for the device, which a capture would refuse."""
    ours, _, _, extra, _ = case
    made = tensors(case, torch.bfloat16)
    leaves = [x.requires_grad_() for x in made]
    grads = [torch.ones_like(y) for y in ours(*leaves, extra)]

    def step():
        outputs = ours(*leaves, extra)
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = [x.detach().clone() for x in step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.detach().fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_more_elements_than_an_int32_counts():
    """Offsets are 64 bits wide: the last rows are those of a small tensor."""
    width, rows = 2560, 2**31 // 2560 + 4096
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    x = torch.randn(8, width, device="cuda").bfloat16()
    big = x.new_zeros(rows, width)
    big[-8:] = x
    assert torch.equal(geglu(big)[-8:], geglu(x))
    assert torch.equal(add_layer_norm(big, None, None, None)[1][-8:], add_layer_norm(x, None, None, None)[1])
    images = big[: rows // 4096 * 4096].view(-1, 64, 64, width).permute(0, 3, 1, 2)
    last = torch.randn(1, width, 64, 64, device="cuda").bfloat16()
    images[-1:] = last
    small = last.contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(group_norm_silu(images, None, None, 32)[-1:], group_norm_silu(small, None, None, 32))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one():
    x = torch.randn(4, 64, device="cuda:1")
    torch.testing.assert_close(geglu(x), geglu_plain(x, None)[0])
