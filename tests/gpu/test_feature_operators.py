"""The kernels that noise latents and pack features on a CUDA device."""

import math

import pytest
import torch
import torch.nn.functional as F

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.noise_latents import noise_latents
from dsd_fast.kernels.pack_features import pack_features

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BAND = 2048


def draw(shape, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to("cuda", dtype)


# Latents


# N, S, D and the latent; by image, by timestep. SD's latents, primes, one number, latents of many blocks.
NOISED = {
    "SD 1.5": ((16, 8, 2, 4, 64, 64), False, False),
    "SDXL": ((4, 5, 1, 4, 128, 128), True, False),
    "mini": ((5, 4, 3, 4, 16, 16), True, True),
    "primes": ((3, 7, 5, 3, 13, 11), False, True),
    "one": ((1, 1, 1, 1, 1, 1), False, False),
    "wide": ((2, 1, 1, 16, 97, 101), False, False),
}


def noised_plain(latents, noise, signal, sigma):
    signal, sigma = (x.to(latents.dtype)[:, None, None, None, None] for x in (signal, sigma))
    return signal * latents[:, None, None] + sigma * noise.to(latents.dtype)


def noising(case, dtype):
    (images, timesteps, draws, *latent), by_image, by_timestep = case
    angle = torch.linspace(0.1, 1.5, timesteps, device="cuda")
    latents = draw((images, *latent), 0, dtype).contiguous(memory_format=torch.channels_last)
    noise = draw((images if by_image else 1, timesteps if by_timestep else 1, draws, *latent), 1)
    return latents, noise, angle.cos(), angle.sin()


def noised(call, tensors, kind=None):
    leaves = [(x if kind is None else x.to(kind)).detach().requires_grad_() for x in tensors[:2]]
    out = call(*leaves, *tensors[2:])
    return [out.detach(), *torch.autograd.grad(out, leaves, draw(out.shape, 2).to(out.dtype))]


def check_noised(case, dtype):
    tensors = noising(case, dtype)
    got = noised(noise_latents, tensors)
    assert backend.last("noise_latents") == "triton"
    assert got[0].is_contiguous()
    plain, truth = noised(noised_plain, tensors), noised(noised_plain, tensors, torch.float64)
    for x, naive, true in zip(got, plain, truth, strict=True):
        # One after another is how sums run, by halves in torch: √n roundings, by chance, instead of about one.
        terms = got[0].numel() / x.numel()
        eps = torch.finfo(x.dtype).eps + math.sqrt(terms) * torch.finfo(torch.float32).eps
        limit = 2 * float((naive - true).abs().max()) + float(true.abs().max()) * eps
        assert float((x - true).abs().max()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NOISED.values(), ids=NOISED.keys())
def test_noised_latents_and_gradients_are_as_good_as_torchs(case, dtype):
    check_noised(case, dtype)


@pytest.mark.sanitizer
@pytest.mark.parametrize("name", ["mini", "primes", "one"])
def test_small_latents_touch_only_their_own_memory(name):
    check_noised(NOISED[name], torch.float16)


@pytest.mark.parametrize("case", NOISED.values(), ids=NOISED.keys())
def test_repeats_of_noised_latents_are_equal_to_the_bit(case):
    tensors = noising(case, torch.bfloat16)
    first = noised(noise_latents, tensors)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, noised(noise_latents, tensors), strict=True))


def test_noised_latents_compile_whole_with_the_same_numbers():
    torch._dynamo.reset()
    tensors = noising(NOISED["mini"], torch.bfloat16)
    compiled = noised(torch.compile(noise_latents, fullgraph=True), tensors)
    torch.testing.assert_close(compiled, noised(noise_latents, tensors), rtol=0, atol=0)


# Features


# The maps, the size wanted, and whether they are contiguous: SD's levels, primes, one position, few channels, many.
PACKED = {
    "as they are": ((4, 320, 64, 64), (64, 64)),
    "twice": ((3, 640, 32, 32), (64, 64)),
    "half": ((3, 1280, 16, 16), (8, 8)),
    "from 8 to 64": ((2, 1280, 8, 8), (64, 64)),
    "primes": ((3, 97, 37, 41), (13, 59)),
    "contiguous": ((2, 320, 33, 31), (17, 64)),
    "one": ((1, 1, 1, 1), (1, 1)),
    "one position": ((2, 513, 1, 1), (5, 3)),
    "few channels": ((5, 3, 64, 48), (31, 100)),
    "10240 channels": ((1, 10240, 9, 7), (8, 11)),
}
SMALL = ["primes", "contiguous", "one", "one position", "few channels"]
MODES = ["bilinear", "nearest", "area", "max"]


def packed_plain(x, size, mode, normalize):
    y = F.adaptive_max_pool2d(x, size) if mode == "max" else F.interpolate(x, size, mode=mode)
    return F.normalize(y, dim=1) if normalize else y


def maps(name, dtype):
    layout = torch.contiguous_format if name == "contiguous" else torch.channels_last
    return draw(PACKED[name][0], 0, dtype).contiguous(memory_format=layout)


def packed(x, size, mode, normalize, dtype=None):
    """The packed maps, from a buffer in another order, between rows and bands of NaN that stay."""
    rows = torch.arange(len(x)).flip(0) * 2 + 1
    shape = torch.Size((2 * len(x) + 1, x.shape[1], *size))
    memory = torch.full((shape.numel() + 2 * BAND,), math.nan, dtype=dtype or x.dtype, device="cuda")
    out = memory[BAND:-BAND].view(shape)
    pack_features(x, out, rows, mode=mode, normalize=normalize)
    assert backend.last("pack_features") == "triton"
    assert memory[:BAND].isnan().all()
    assert memory[-BAND:].isnan().all()
    assert out[::2].isnan().all()
    return out[rows.cuda()]


def check_packed(name, dtype, mode, normalize):
    x, size = maps(name, dtype), PACKED[name][1]
    got = packed(x, size, mode, normalize)
    truth, naive = packed_plain(x.double(), size, mode, normalize), packed_plain(x, size, mode, normalize)
    # A place among n is rounded twice in float32, and moves what it is made of by so much of the difference of two
    # neighbours; divided by the norm where it is normalised.
    eps = torch.finfo(torch.float32).eps
    place = torch.tensor(sum(x.shape[2:]) * eps * 2 * float(x.abs().max()) if mode == "bilinear" else 0.0).cuda()
    if normalize:
        place = place / packed_plain(x.double(), size, mode, False).norm(dim=1, keepdim=True).clamp_min(1e-12)
    # The sum of a norm's C squares, by chance, and of a window's places.
    roundings = math.sqrt(x.shape[1]) if normalize else math.sqrt(x.shape[2] * x.shape[3])
    rounding = torch.finfo(dtype).eps + roundings * eps
    limit = 2 * float((naive - truth).abs().max()) + float(truth.abs().max()) * rounding
    assert ((got - truth).abs() <= limit + place).all()


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_features_are_as_good_as_torchs(name, dtype, mode, normalize):
    check_packed(name, dtype, mode, normalize)


@pytest.mark.sanitizer
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SMALL)
def test_small_maps_touch_only_their_own_memory(name, mode, normalize):
    check_packed(name, torch.float16, mode, normalize)


@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("taken", DTYPES, ids=str)
def test_each_type_into_each_type_is_rounded_once(taken, wanted):
    x = maps("primes", taken)
    wide = packed(x, (13, 59), "bilinear", True, torch.float32)
    assert torch.equal(packed(x, (13, 59), "bilinear", True, wanted), wide.to(wanted))


@pytest.mark.parametrize("mode", ["area", "max"])
def test_a_nan_is_not_lost_and_spreads_no_further(mode):
    x = torch.full((1, 1, 4, 4), -1.0, device="cuda")
    x[0, 0, 1, 2] = math.nan
    assert packed(x, (2, 2), mode, False).isnan().flatten().tolist() == [False, True, False, False]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PACKED)
def test_repeats_are_equal_to_the_bit_whatever_else_is_in_the_batch(name, mode):
    x, size = maps(name, torch.bfloat16), PACKED[name][1]
    first = packed(x, size, mode, True)
    for _ in range(20):
        assert torch.equal(packed(x, size, mode, True), first)
    assert torch.equal(packed(x[-1:], size, mode, True), first[-1:])


def test_packing_compiles_whole_with_the_same_numbers():
    def call(x, rows):
        out = x.new_zeros(4, x.shape[1], 16, 16)
        pack_features(2 * x, out, rows, normalize=True)
        return out + 1

    torch._dynamo.reset()
    x, rows = maps("half", torch.bfloat16), torch.tensor([3, 0, 1], device="cuda")
    compiled = torch.compile(call, fullgraph=True)(x, rows)
    torch.testing.assert_close(compiled, call(x, rows), rtol=0, atol=0)


def test_packing_is_captured_and_replayed_without_a_synchronisation():
    x, rows = maps("twice", torch.bfloat16), torch.tensor([2, 0, 1], device="cuda")
    out = torch.zeros(3, 640, 64, 64, dtype=torch.bfloat16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack_features(x, out, rows, normalize=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want, graph = out.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pack_features(x, out, rows, normalize=True)
    out.fill_(math.nan)
    graph.replay()
    assert torch.equal(out, want)


def test_more_elements_than_an_int32_counts():
    """Offsets are 64 bits wide, in what is read and in what is written: the last rows are those of a small tensor."""
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    channels, side, count = 2560, 64, 2**31 // (2560 * 64 * 64) + 2
    x = torch.zeros(count, side, side, channels, dtype=torch.float16, device="cuda").permute(0, 3, 1, 2)
    x[-1:] = draw((1, channels, side, side), 0, torch.float16)
    out = torch.zeros(count, channels, side, side, dtype=torch.float16, device="cuda")
    small = torch.zeros(1, channels, side, side, dtype=torch.float16, device="cuda")
    for mode, normalize in (("bilinear", False), ("area", True)):
        pack_features(x, out, torch.arange(count), mode=mode, normalize=normalize)
        pack_features(x[-1:].clone(), small, torch.zeros(1, dtype=torch.int64), mode=mode, normalize=normalize)
        assert torch.equal(out[-1:], small)
    del x, out
    images, latent = 2**31 // (64 * 4 * 128 * 128) + 2, (4, 128, 128)
    latents, noise = torch.zeros(images, *latent, dtype=torch.float16, device="cuda"), draw((1, 1, 8, *latent), 1)
    latents[-1:] = draw((1, *latent), 0)
    factors = torch.linspace(0, 1, 8, device="cuda"), torch.linspace(1, 0, 8, device="cuda")
    noisy = noise_latents(latents, noise, *factors)
    assert noisy.numel() > 2**31
    assert torch.equal(noisy[-1:], noise_latents(latents[-1:], noise, *factors))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one():
    x, out = torch.randn(2, 5, 4, 3, device="cuda:1"), torch.zeros(2, 5, 8, 6, device="cuda:1")
    pack_features(x, out, torch.tensor([0, 1]))
    torch.testing.assert_close(out, F.interpolate(x, (8, 6), mode="bilinear"))
    noise, factor = torch.randn(1, 1, 1, 5, 4, 3, device="cuda:1"), torch.ones(1, device="cuda:1")
    torch.testing.assert_close(noise_latents(x, noise, factor, factor)[:, 0, 0], x + noise[0, 0])
