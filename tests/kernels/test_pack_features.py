"""Packed feature maps against float64, plain and interpreted."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.pack_features import op, pack_features
from tests.kernels.elementwise import DTYPES, INTERPRETED, PUBLIC_KINDS, draw, forced

OPERATOR = torch.ops.dsd_fast.pack_features.default

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}

# B, C, h, w and H, W: no map, no channel, no position; one number; as large; larger, smaller, and both, by primes;
# twice and half; one place from many and many from one; more channels and positions than a tile has.
SIZES = [
    ((0, 3, 4, 4), (2, 2)),
    ((2, 0, 4, 4), (2, 2)),
    ((2, 3, 4, 4), (0, 2)),
    ((2, 3, 0, 4), (0, 4)),
    ((1, 1, 1, 1), (1, 1)),
    ((3, 5, 7, 3), (7, 3)),
    ((2, 5, 7, 3), (17, 11)),
    ((2, 5, 19, 13), (7, 3)),
    ((1, 3, 5, 29), (13, 7)),
    ((1, 2, 4, 4), (8, 2)),
    ((1, 2, 1, 37), (5, 1)),
    ((2, 67, 9, 8), (8, 9)),
]
# Interpreting takes long: a mode that reads places, and one that reads windows.
SOME_MODES = ["bilinear", "area"] if INTERPRETED else op.MODES
# Normalised in two passes.
PASSES = ((1, 520, 3, 2), (3, 5))


def written_out(x, size, mode, normalize):
    if not x.numel() or 0 in size:
        return x.new_zeros((*x.shape[:2], *size))
    y = F.adaptive_max_pool2d(x, size) if mode == "max" else F.interpolate(x, size, mode=mode)
    return F.normalize(y, dim=1) if normalize else y


def maps(shape, dtype=torch.float32, layout=torch.channels_last, seed=0):
    return draw(*shape, seed=seed, dtype=dtype).contiguous(memory_format=layout)


def packed(kind, x, size, mode="bilinear", normalize=False, dtype=None):
    """The packed maps in their order, written to a buffer in another, between rows and bands that stay."""
    rows, band = torch.arange(len(x)).flip(0) * 2 + 1, 67
    shape = (2 * len(x) + 1, x.shape[1], *size)
    count = torch.Size(shape).numel()
    memory = torch.full((count + 2 * band,), float("nan"), dtype=dtype or x.dtype)
    out = memory[band : band + count].view(shape)
    forced(kind, "pack_features", lambda: pack_features(x, out, rows, mode=mode, normalize=normalize))
    assert memory[:band].isnan().all()
    assert memory[band + count :].isnan().all()
    assert out[::2].isnan().all()
    return out[rows]


def assert_as_good_as_torch(x, size, mode, normalize, ours):
    """Errors are at most twice plain torch's, one rounding of the largest, and what a rounded place makes.

    A place among n is rounded twice in float32, by n units of the last place at most, and what it is made of changes by
    so much of the difference of two neighbours; where it is normalised that is divided by the norm.
    """
    assert ours.shape == (*x.shape[:2], *size)
    if not ours.numel():
        return
    truth, plain = written_out(x.double(), size, mode, normalize), written_out(x, size, mode, normalize)
    largest, eps = float(x.abs().max()), torch.finfo(torch.float32).eps
    place = torch.tensor(sum(x.shape[2:]) * eps * 2 * largest if mode == "bilinear" else 0.0)
    if normalize:
        place = place / written_out(x.double(), size, mode, False).norm(dim=1, keepdim=True).clamp_min(1e-12)
    limit = 2 * float((plain.double() - truth).abs().max()) + float(truth.abs().max()) * torch.finfo(ours.dtype).eps
    assert ((ours.double() - truth).abs() <= limit + place).all()


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("mode", op.MODES)
@pytest.mark.parametrize("sizes", [*SIZES, PASSES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_values(kind, dtype, sizes, mode, normalize):
    x = maps(sizes[0], dtype)
    assert_as_good_as_torch(x, sizes[1], mode, normalize, packed(kind, x, sizes[1], mode, normalize))


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_each_number_by_hand(kind):
    """A row of 1, 3, 8 and 4 as two places, and one of 2 and 6 as four."""
    four, two = torch.tensor([1.0, 3.0, 8.0, 4.0]).view(1, 1, 1, 4), torch.tensor([2.0, 6.0]).view(1, 1, 1, 2)
    down = {"bilinear": [2.0, 6.0], "nearest": [1.0, 8.0], "area": [2.0, 6.0], "max": [3.0, 8.0]}
    up = {"bilinear": [2.0, 3.0, 5.0, 6.0], "nearest": [2.0, 2.0, 6.0, 6.0]}
    up |= {"area": up["nearest"], "max": up["nearest"]}
    for mode in op.MODES:
        assert packed(kind, four, (1, 2), mode).flatten().tolist() == down[mode]
        assert packed(kind, two, (1, 4), mode).flatten().tolist() == up[mode]
    vector = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(packed(kind, vector, (1, 2), normalize=True).mT.flatten()[::2], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_rounded_once_to_the_buffers_type(kind, normalize):
    """Whatever the types: float32 arithmetic, then one rounding; float64 stays, and is the reference's."""
    kinds = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
    for taken, wanted in itertools.product(kinds, (*kinds, torch.float64)):
        x, who = maps((2, 6, 5, 4), taken), "reference" if wanted == torch.float64 else kind
        wide = packed(who, x.float(), (7, 3), normalize=normalize)
        got = packed(who, x, (7, 3), normalize=normalize, dtype=wanted)
        torch.testing.assert_close(got, wide.to(wanted), rtol=0, atol=0)
    x = maps((2, 6, 5, 4), torch.float64)
    got = packed("reference", x, (7, 3), normalize=normalize)
    torch.testing.assert_close(got, written_out(x, (7, 3), "bilinear", normalize), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("mode", SOME_MODES)
@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_strides_do_not_matter(kind, mode, normalize):
    x = maps((2, 70, 5, 4), layout=torch.contiguous_format)
    want = packed(kind, x, (3, 9), mode, normalize)
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.stack([x, -x], -1)[..., 0],
        x.flip(0)[[1, 0]].mT.contiguous().mT,
    ):
        # Sums over channels may run in another order.
        torch.testing.assert_close(packed(kind, other, (3, 9), mode, normalize), want, rtol=1e-6, atol=1e-7)


@settings(max_examples=8 if INTERPRETED else 60)
@given(
    st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
    st.sampled_from(op.MODES),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from(list(LAYOUTS.values())),
)
def test_any_shape_type_and_stride(shape, size, mode, normalize, dtype, layout):
    x = maps(shape, dtype, layout)
    ours = packed(PUBLIC_KINDS[-1], x, size, mode, normalize)
    assert_as_good_as_torch(x, size, mode, normalize, ours)


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_small_norms_and_no_norm(kind):
    """Divided by the norm or by 1e-12, whichever is larger."""
    x = torch.zeros(1, 3, 1, 3)
    x[0, 0] = torch.tensor([0.0, 3e-13, 2e-11])
    got = packed(kind, x, (1, 3), normalize=True)
    torch.testing.assert_close(got[0, 0, 0], torch.tensor([0.0, 0.3, 1.0]))
    assert not got[0, 1:].any()


@pytest.mark.parametrize("mode", ["area", "max"])
@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_a_nan_is_not_lost_and_spreads_no_further(kind, mode):
    x = torch.full((1, 1, 4, 4), -1.0)
    x[0, 0, 1, 2] = float("nan")
    got = packed(kind, x, (2, 2), mode).flatten()
    assert got.isnan().tolist() == [False, True, False, False]
    assert (got[[0, 2, 3]] == -1).all()


def test_equal_inputs_give_equal_bits():
    x = maps((3, 67, 5, 4))
    for mode in SOME_MODES:
        first, *others = (packed(PUBLIC_KINDS[-1], x, (3, 7), mode, True) for _ in range(3))
        assert all(torch.equal(first, other) for other in others)
        # Nor does a map depend on the others.
        assert torch.equal(packed(PUBLIC_KINDS[-1], x[1:2], (3, 7), mode, True), first[1:2])


@pytest.mark.parametrize("mode", SOME_MODES)
@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[4], SIZES[6]], ids=str)
def test_opcheck(sizes, mode):
    (count, channels, *_), size = sizes
    x = torch.stack([maps(sizes[0])] * 2, dim=-1)[..., 0]
    out = torch.zeros(count + 1, channels, *size)
    opcheck(OPERATOR, (x, out, torch.arange(count).flip(0), mode, mode != "max"))


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_compiles_and_exports_whole(kind):
    class Module(torch.nn.Module):
        def forward(self, x, rows):
            out = x.new_zeros(3, x.shape[1], 5, 6)
            pack_features(2 * x, out, rows, mode="area", normalize=True)
            return out + 1

    arguments, module = (maps((2, 3, 7, 4)), torch.tensor([2, 0])), Module()
    torch._dynamo.reset()
    with backend.force(kind):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), module(*arguments), rtol=0, atol=0)
        graph = torch.export.export(module, arguments).graph
    assert [str(node.target) for node in graph.nodes if "dsd_fast" in str(node.target)] == [
        "dsd_fast.pack_features.default"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x: got \(2, 3, 4\) torch.float32, expected \(B, C, h, w\)"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "x: got .* torch.int32, expected .* floating-point"),
        ({"x": torch.zeros(2, 3, 0, 4)}, r"x: got \(2, 3, 0, 4\), expected positions to make \(5, 6\) of"),
        ({"x": torch.zeros(2, 3, 4, 4, requires_grad=True)}, "x: requires a gradient, expected a tensor without one"),
        ({"out": torch.zeros(4, 2, 5, 6)}, r"out: got \(4, 2, 5, 6\) torch.float32, expected \(R, 3, H, W\)"),
        ({"out": torch.zeros(4, 3, 5, 6, dtype=torch.uint8)}, "out: got .* torch.uint8, expected .* floating-point"),
        ({"out": torch.zeros(4, 3, 6, 5).mT}, r"out: got strides \(90, 30, 1, 5\) .*, expected a contiguous tensor"),
        ({"out": torch.zeros(4, 3, 5, 6, requires_grad=True)}, "out: requires a gradient"),
        ({"out": torch.zeros(4, 3, 5, 6, device="meta")}, "out: on meta, expected cpu like x"),
        ({"rows": torch.tensor([0, 4])}, "rows: values from 0 to 4, expected 0 to 3"),
        ({"rows": torch.tensor([-1, 0])}, "rows: values from -1 to 0, expected 0 to 3"),
        ({"rows": torch.tensor([1])}, r"rows: got \(1,\) torch.int64, expected \(2,\)"),
        ({"rows": torch.zeros(2)}, r"rows: got \(2,\) torch.float32, expected"),
        ({"rows": torch.tensor([1, 1])}, r"rows: got \[1, 1\], expected no row twice"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, "rows: on meta, expected cpu like x, or the CPU"),
        ({"mode": "bicubic"}, "mode: got 'bicubic', expected one of bilinear, nearest, area, max"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input_is_refused_by_name(change, message):
    given_ones = {"x": torch.zeros(2, 3, 4, 4), "out": torch.zeros(4, 3, 5, 6), "rows": torch.tensor([0, 1])} | change
    before = given_ones["out"].detach().clone()
    with pytest.raises(ValueError, match=message):
        pack_features(**given_ones)
    assert given_ones["out"].device.type == "meta" or torch.equal(given_ones["out"], before)


def test_inference_mode_and_parameters_without_gradients():
    x = torch.nn.Parameter(maps((2, 3, 4, 4)))
    rows = torch.tensor([1, 0])
    outs = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outs.append(torch.zeros(2, 3, 2, 2))
            pack_features(x, outs[-1], rows, mode="max")
    assert torch.equal(*(out.clone() for out in outs))
    assert torch.equal(outs[0], F.adaptive_max_pool2d(x.detach(), 2).flip(0))


def test_plain_torch_on_a_cpu_unless_a_kernel_is_asked_for():
    x, rows = torch.ones(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    pack_features(x, torch.zeros(1, 1, 1, 1), rows)
    assert backend.last("pack_features") == "reference"
    # Never from float64, nor to it.
    for given_one, out in ((x.double(), x.clone()), (x, x.double())):
        with backend.force("triton"), pytest.raises(ValueError, match="pack_features has no 'triton' implementation"):
            pack_features(given_one, out, rows)


if INTERPRETED:

    def test_a_launch_compiles_what_is_judged(monkeypatch):
        """The constants and warps of a build are those of a launch for its channels."""
        from dsd_fast.kernels.pack_features import kernel

        launches = []

        class Recorder:
            def __getitem__(self, grid):
                return lambda **arguments: launches.append(arguments)

        monkeypatch.setattr(kernel, "pack_kernel", Recorder())
        for mode in op.MODES:
            for channels, normalize in ((1280, False), (320, True), (1280, True)):
                kernel.pack_features(
                    maps((1, channels, 2, 2)), torch.zeros(1, channels, 3, 3), torch.zeros(1).long(), mode, normalize
                )
        monkeypatch.undo()
        builds = [build for build in kernel.builds() if build.name.endswith("bf16")]
        for build, arguments in zip(builds, launches, strict=True):
            assert {name: arguments[name] for name in build.constants} == dict(build.constants)
            assert set(build.signature) | set(build.constants) == set(arguments) - {"num_warps"}
            assert build.warps == arguments["num_warps"]
