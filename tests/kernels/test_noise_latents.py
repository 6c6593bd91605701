"""Noised latents against float64, plain, registered and interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.noise_latents import noise_latents
from tests.kernels.elementwise import (
    DTYPES,
    INTERPRETED,
    KINDS,
    PUBLIC_KINDS,
    assert_as_good_as_torch,
    assert_forward_mode,
    draw,
    forced,
    leaf,
    run_interpreted,
)

OPERATOR = torch.ops.dsd_fast.noise_latents.default
BACKWARD = torch.ops.dsd_fast.noise_latents_backward.default

# N, S, D, C, h, w: nothing at all, one number, primes, latents of two and a half blocks.
SHAPES = [(0, 2, 1, 4, 3, 3), (2, 0, 1, 4, 3, 3), (2, 3, 0, 4, 3, 3), (2, 3, 2, 4, 0, 3), (1, 1, 1, 1, 1, 1)]
SHAPES += [(3, 2, 5, 3, 7, 5), (2, 3, 2, 5, 32, 32)]
SHARING = {"by all": (False, False), "by timesteps": (True, False), "by images": (False, True), "by none": (True, True)}


def written_out(latents, noise, signal, sigma):
    signal, sigma = (x.to(latents.dtype)[:, None, None, None, None] for x in (signal, sigma))
    return signal * latents[:, None, None] + sigma * noise.to(latents.dtype)


def run(kind, *tensors):
    if kind == "operator":
        return OPERATOR(*tensors)
    return forced(kind, "noise_latents", lambda: noise_latents(*tensors))


def inputs(shape, sharing=(False, False), dtype=torch.float32, noise_dtype=None):
    images, timesteps, draws, *latent = shape
    by_image, by_timestep = sharing
    real = torch.float64 if dtype == torch.float64 else torch.float32
    angle = draw(timesteps, seed=2)
    own = (images if by_image else 1, timesteps if by_timestep else 1)
    return (
        draw(images, *latent, seed=0, dtype=dtype, offset=1.0),
        draw(*own, draws, *latent, seed=1, dtype=noise_dtype or real),
        angle.cos().to(real),
        angle.sin().to(real),
    )


def results(call, tensors, kind=None):
    latents, noise = (leaf(x, kind) for x in tensors[:2])
    out = call(latents, noise, *tensors[2:])
    grads = torch.autograd.grad(out, (latents, noise), draw(*out.shape, seed=3).to(out.dtype))
    return {"noised": out.detach(), "dlatents": grads[0], "dnoise": grads[1]}


@pytest.mark.parametrize("sharing", SHARING.values(), ids=SHARING.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, dtype, shape, sharing):
    tensors = inputs(shape, sharing, dtype)
    ours = results(lambda *a: run(kind, *a), tensors)
    assert ours["noised"].shape == shape
    assert ours["noised"].is_contiguous()
    assert_as_good_as_torch(ours, results(written_out, tensors), results(written_out, tensors, torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_by_hand(kind):
    """Two images, two timesteps, two draws, one number each; the second timestep is that of the clean latent."""
    latents, noise = torch.tensor([3.0, 5.0]), torch.tensor([1.0, -2.0])
    signal, sigma = torch.tensor([0.5, 1.0]), torch.tensor([4.0, 0.0])
    got = run(kind, latents.view(2, 1, 1, 1), noise.view(1, 1, 2, 1, 1, 1), signal, sigma)
    assert got.flatten(2).tolist() == [[[5.5, -6.5], [3.0, 3.0]], [[6.5, -5.5], [5.0, 5.0]]]


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_rounded_once(kind):
    """1/2 + 1/2·(1 + 5/4·2⁻¹⁰) is nearest to 1 + 2⁻¹⁰; with the noise rounded first it would be a tie, and 1."""
    latents = torch.ones((1, 1, 1, 1), dtype=torch.float16)
    noise = torch.full((1, 1, 1, 1, 1, 1), 1 + 1.25 * 2.0**-10)
    assert run(kind, latents, noise, *[torch.tensor([0.5])] * 2).item() == 1 + 2.0**-10


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    tensors = inputs((2, 3, 2, 4, 5, 6), (True, True))
    want = results(lambda *a: run(kind, *a), tensors)
    latents, noise, *factors = tensors
    turned = noise.transpose(0, 2).contiguous().transpose(0, 2)
    spread = [torch.stack([factor] * 2, -1)[:, 0] for factor in factors]
    for x in (latents.contiguous(memory_format=torch.channels_last), torch.stack([latents] * 2, -1)[..., 0]):
        got = results(lambda *a: run(kind, *a), (x, turned, *spread))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert got["noised"].is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_an_expanded_gradient(kind):
    latents, noise, signal, sigma = inputs((2, 3, 2, 4, 5, 6))
    leaves = leaf(latents), leaf(noise)
    found = torch.autograd.grad(run(kind, *leaves, signal, sigma).sum(), leaves)
    torch.testing.assert_close(found[0], (2 * signal.sum()).expand_as(latents))
    torch.testing.assert_close(found[1], (2 * sigma.sum()).expand_as(noise))


@settings(max_examples=8 if INTERPRETED else 20)
@given(
    st.tuples(*[st.integers(0, 3)] * 4, st.integers(0, 30), st.integers(0, 30)),
    st.sampled_from(list(SHARING.values())),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_any_shape_type_and_stride(shape, sharing, dtype, noise_dtype, channels_last):
    latents, *rest = inputs(shape, sharing, dtype, noise_dtype)
    if channels_last:
        latents = latents.contiguous(memory_format=torch.channels_last)
    tensors = (latents, *rest)
    for kind in KINDS:
        ours = results(lambda *a, kind=kind: run(kind, *a), tensors)
        assert_as_good_as_torch(ours, results(written_out, tensors), results(written_out, tensors, torch.float64))


@pytest.mark.skipif(not INTERPRETED, reason="plain torch takes its own memory")
def test_equal_inputs_give_equal_bits():
    first, *others = (results(lambda *a: run(KINDS[-1], *a), inputs((3, 2, 5, 3, 7, 5))) for _ in range(5))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("call", [noise_latents, OPERATOR], ids=["reference", "operator"])
@pytest.mark.parametrize("sharing", SHARING.values(), ids=SHARING.keys())
def test_gradcheck(call, sharing):
    latents, noise, *factors = inputs((2, 3, 2, 2, 2, 1), sharing, torch.float64)
    assert torch.autograd.gradcheck(lambda x, e: call(x, e, *factors), (leaf(latents), leaf(noise)))


@pytest.mark.parametrize("sharing", [(False, False), (True, True)], ids=["shared", "own"])
@pytest.mark.parametrize("shape", [(0, 2, 1, 4, 3, 3), (1, 1, 1, 1, 1, 1), (3, 2, 5, 3, 7, 5)], ids=str)
def test_opcheck(shape, sharing):
    latents, noise, *factors = inputs(shape, sharing)
    views = (torch.stack([x, x], dim=-1)[..., 0] for x in (latents, noise))
    opcheck(OPERATOR, (*(leaf(x) for x in views), *factors))
    # Autograd is registered with the forward operator alone.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    dout = draw(*shape, seed=3, dtype=torch.float32)
    opcheck(BACKWARD, (dout, *factors, *sharing, True, True), test_utils=checks)
    opcheck(BACKWARD, (dout.mT.contiguous().mT, *factors, *sharing, False, True), test_utils=checks)


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_compiles_and_exports_whole(kind):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return noise_latents(*tensors)

    tensors = inputs((2, 3, 2, 4, 5, 6))
    torch._dynamo.reset()
    with backend.force(kind):
        compiled = torch.compile(noise_latents, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(results(compiled, tensors), results(noise_latents, tensors))
        graph = torch.export.export(Module(), tensors).graph
    opaque = [str(node.target) for node in graph.nodes if "dsd_fast" in str(node.target)]
    assert opaque == (["dsd_fast.noise_latents.default"] if kind == "triton" else [])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 4, 5), r"latents: got \(2, 4, 5\) torch.float32, expected \(N, C, h, w\) floating point"),
        (0, torch.zeros(2, 4, 5, 6, dtype=torch.int64), "latents: got .* torch.int64, expected"),
        (1, torch.zeros(4, 5, 6), r"noise: got \(4, 5, 6\) torch.float32, expected \(1 or 2, 1 or 3, D, 4, 5, 6\)"),
        (1, torch.zeros(3, 1, 1, 4, 5, 6), r"noise: got \(3, 1, 1, 4, 5, 6\) torch.float32, expected \(1 or 2, "),
        (1, torch.zeros(1, 2, 1, 4, 5, 6), "noise: got .* expected"),
        (1, torch.zeros(1, 1, 1, 4, 6, 5), "noise: got .* expected"),
        (1, torch.zeros(1, 1, 1, 4, 5, 6, dtype=torch.int32), "noise: got .* torch.int32, expected .* floating point"),
        (1, torch.zeros(1, 1, 1, 4, 5, 6, device="meta"), "noise: on meta, expected cpu like latents"),
        (2, torch.zeros(3, 1), r"signal: got \(3, 1\) torch.float32, expected \(S,\) torch.float32"),
        (2, torch.zeros(3).double(), r"signal: got \(3,\) torch.float64, expected \(S,\) torch.float32"),
        (2, torch.zeros(3, requires_grad=True), "signal: requires a gradient, expected a tensor without one"),
        (3, torch.zeros(2), r"sigma: got \(2,\) torch.float32, expected \(S,\) .* the same S for signal and sigma"),
        (3, torch.zeros(3, device="meta"), "sigma: on meta, expected cpu"),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name(place, value, message):
    tensors = list(inputs((2, 3, 2, 4, 5, 6)))
    tensors[place] = value
    with pytest.raises(ValueError, match=message):
        noise_latents(*tensors)


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_forward_mode_is_plain_torchs_alone(kind):
    latents, *rest = inputs((2, 3, 2, 4, 5, 6))
    assert_forward_mode(
        kind, "noise_latents", lambda x: noise_latents(x, *rest), lambda x: written_out(x, *rest), latents
    )


def test_plain_torch_on_a_cpu_unless_a_kernel_is_asked_for():
    tensors = inputs((1, 1, 1, 1, 2, 2), dtype=torch.float64)
    noise_latents(*tensors)
    assert backend.last("noise_latents") == "reference"
    # Never in float64.
    with backend.force("triton"), pytest.raises(ValueError, match="noise_latents has no 'triton' implementation"):
        noise_latents(*tensors)


if not INTERPRETED:

    @pytest.mark.slow
    def test_kernels_under_the_interpreter():
        pytest.importorskip("triton")
        run_interpreted(__file__)
