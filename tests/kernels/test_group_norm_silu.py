"""Group norm with shift and SiLU against float64, plain, registered and interpreted."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.group_norm_silu import group_norm_silu
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

OPERATOR = torch.ops.dsd_fast.group_norm_silu.default
CHANNELS_LAST = torch.channels_last

# (B, C, h, w), groups: empty images and batches, one number, a pixel, primes, groups of 10 channels, splits of two
# tiles with a rest in the last, and a group of more channels than a tile.
SHAPES = [
    ((0, 4, 2, 2), 2),
    ((2, 4, 0, 3), 2),
    ((1, 1, 1, 1), 1),
    ((3, 6, 1, 1), 2),
    ((2, 7, 5, 3), 7),
    ((2, 20, 8, 8), 2),
    ((1, 10, 70, 31), 2),
    ((2, 97, 13, 11), 1),
]


def written_out(x, weight, bias, shift, groups, silu):
    y = x if shift is None else x + shift[:, :, None, None]
    # Torch's own kernels fail where there is nothing to normalise.
    if y.numel():
        y = torch.group_norm(y, groups, weight, bias, 1e-5)
    else:
        y = y * (1 if weight is None else weight[:, None, None]) + (0 if bias is None else bias[:, None, None])
    return F.silu(y) if silu else y


def run(kind, x, weight, bias, shift, groups, silu):
    if kind == "operator":
        return OPERATOR(x, weight, bias, shift, groups, 1e-5, silu)[0]
    call = lambda: group_norm_silu(x, weight, bias, groups, shift=shift, silu=silu)  # noqa: E731
    return forced(kind, "group_norm_silu", call)


def inputs(shape, dtype=torch.float32, absent=(), layout=CHANNELS_LAST):
    shapes = {"x": shape, "weight": shape[1:2], "bias": shape[1:2], "shift": shape[:2]}
    tensors = {n: None if n in absent else draw(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}
    tensors["x"] = (tensors["x"] * 2 + 1).contiguous(memory_format=layout)
    return tensors


def results(call, tensors, groups, silu=True, kind=None, dy=None):
    leaves = {name: None if x is None else leaf(x, kind) for name, x in tensors.items()}
    y = call(*leaves.values(), groups, silu)
    dy = draw(*y.shape, seed=7) if dy is None else dy
    wanted = {f"d{name}": x for name, x in leaves.items() if x is not None}
    found = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


# Interpreting takes long, and which tensors there are is one thing, the layout of x another.
@pytest.mark.parametrize(
    ("layout", "absent"),
    [
        (layout, absent)
        for layout in (CHANNELS_LAST, torch.contiguous_format)
        for absent in ((), ("shift",), ("weight", "bias", "shift"), ("bias",))
        if not INTERPRETED or layout == CHANNELS_LAST or not absent
    ],
    ids=str,
)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, dtype, shape, groups, layout, absent):
    silu = absent != ("bias",)
    tensors = inputs(shape, dtype, absent, layout)
    ours = results(lambda *a: run(kind, *a), tensors, groups, silu)
    plain = results(written_out, tensors, groups, silu)
    # An empty tensor is contiguous whatever its strides.
    if ours["y"].numel():
        assert ours["y"].is_contiguous(memory_format=layout)
        assert ours["dx"].is_contiguous(memory_format=layout)
    assert_as_good_as_torch(ours, plain, results(written_out, tensors, groups, silu, torch.float64))


@pytest.mark.parametrize("size", [4, 40], ids=["one split", "many"])
@pytest.mark.parametrize("mean", [1e3, -1e4])
# Torch's own kernel for channels-last images on CPUs, which the plain form calls, takes E[x²] − E[x]².
@pytest.mark.parametrize("kind", KINDS[-1:])
def test_a_large_mean_does_not_drown_a_small_variance(kind, mean, size):
    x = draw(2, 24, size, size, seed=0, dtype=torch.float32, scale=0.1, offset=mean)
    x = x.contiguous(memory_format=CHANNELS_LAST)
    y = run(kind, x, None, None, None, 2, False)
    truth = torch.group_norm(x.double(), 2)
    # The mean is rounded to float32 a few times; E[x²] − E[x]² would have lost every digit.
    eps = torch.finfo(torch.float32).eps
    limit = eps * (4 * abs(mean) / float(x.double().std()) + 16 * truth.abs().max())
    assert (y - truth).abs().max() <= limit


def layouts(x):
    """x (B, C, h, w) in every kind of stride: slices of channels and of columns, turned images, a stride of 2."""
    b, c, h, w = x.shape
    channels = torch.zeros(b, 3 * c, h, w).contiguous(memory_format=CHANNELS_LAST)
    channels[:, c : 2 * c] = x
    columns = torch.zeros(b, c, h, w + 3)
    columns[..., 2 : 2 + w] = x
    return {
        "channels": channels[:, c : 2 * c],
        "columns": columns[..., 2 : 2 + w],
        "turned": x.mT.contiguous().mT,
        "spread": torch.stack([x, x], dim=-1)[..., 0],
    }


@pytest.mark.parametrize("size", [(5, 4), (40, 33)], ids=["one split", "many"])
@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind, size):
    tensors = inputs((2, 12, *size), layout=torch.contiguous_format)
    want = results(lambda *a: run(kind, *a), tensors, 2)
    for name, x in layouts(tensors["x"]).items():
        # The other strides of the gradient, too; and of the parameters.
        dy = layouts(draw(*x.shape, seed=7, dtype=torch.float32))[name]
        spread = {n: torch.stack([tensors[n]] * 2, dim=-1)[..., 0] for n in ("weight", "bias", "shift")}
        got = results(lambda *a: run(kind, *a), {"x": x, **spread}, 2, dy=dy)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert got["y"].is_contiguous(memory_format=CHANNELS_LAST if name == "channels" else torch.contiguous_format)
    leaves = [leaf(x) for x in tensors.values()]
    got = torch.autograd.grad(run(kind, *leaves, 2, True).sum(), leaves)
    want = torch.autograd.grad(written_out(*leaves, 2, True).sum(), leaves)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [(5, 4), (40, 33)], ids=["one split", "many"])
def test_an_image_does_not_depend_on_its_batch(size):
    """To the bit, and so on repeats."""
    tensors = inputs((3, 12, *size))
    dy = draw(3, 12, *size, seed=7)
    kind = KINDS[-1]
    together, again = (results(lambda *a: run(kind, *a), tensors, 2, dy=dy) for _ in range(2))
    assert all(torch.equal(together[name], again[name]) for name in together)
    if kind == "triton":
        first = tensors | {"x": tensors["x"][1:2], "shift": tensors["shift"][1:2]}
        alone = results(lambda *a: run(kind, *a), first, 2, dy=dy[1:2])
        assert all(torch.equal(together[name][1:2], alone[name]) for name in ("y", "dx", "dshift"))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_parameters_with_half_precision_inputs(kind):
    tensors = inputs((2, 12, 5, 4), torch.float16)
    tensors |= {name: tensors[name].float() * 1.001 for name in ("weight", "bias")}
    ours = results(lambda *a: run(kind, *a), tensors, 2)
    assert ours["y"].dtype == torch.float16
    assert ours["dweight"].dtype == torch.float32
    truth = results(written_out, tensors, 2, kind=torch.float64)
    # The sum with the shift, and the result, are rounded.
    limit = 4 * torch.finfo(torch.float16).eps * truth["y"].abs().max()
    assert (ours["y"].double() - truth["y"]).abs().max() <= limit


def test_autocast_does_not_change_the_type():
    tensors = inputs((2, 12, 5, 4), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(KINDS[0], *tensors.values(), 2, True).dtype == torch.bfloat16


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", [CHANNELS_LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("kind", ["operator"] if INTERPRETED else KINDS)
def test_gradcheck(kind, layout, silu):
    tensors = inputs((2, 4, 3, 2), torch.float64, layout=layout)
    leaves = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(lambda *a: run(kind, *a, 2, silu), leaves)


@pytest.mark.parametrize("absent", [(), ("shift", "weight")], ids=str)
@pytest.mark.parametrize("layout", [CHANNELS_LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(("shape", "groups"), [s for s in SHAPES if s[0] != (1, 10, 70, 31)][:5], ids=str)
def test_opcheck(shape, groups, layout, absent):
    tensors = inputs(shape, absent=absent, layout=layout)
    opcheck(OPERATOR, (*(None if x is None else leaf(x) for x in tensors.values()), groups, 1e-5, not absent))


@pytest.mark.parametrize("name", ["channels", "columns", "turned", "spread"])
def test_opcheck_of_other_strides(name):
    x, *others = inputs((2, 4, 5, 3)).values()
    opcheck(OPERATOR, (leaf(layouts(x)[name]), *(leaf(other) for other in others), 2, 1e-5, True))


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_compiles_and_exports_whole(kind):
    def call(x, weight, bias, shift, groups=2, silu=True):
        return group_norm_silu(x, weight, bias, groups, shift=shift, silu=silu)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    tensors = inputs((2, 12, 5, 4))
    torch._dynamo.reset()
    with backend.force(kind):
        compiled = results(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors, 2)
        torch.testing.assert_close(compiled, results(call, tensors, 2))
        graph = torch.export.export(Module(), tuple(tensors.values())).graph
    assert compiled["y"].is_contiguous(memory_format=CHANNELS_LAST)
    opaque = [str(node.target) for node in graph.nodes if "dsd_fast" in str(node.target)]
    assert opaque == (["dsd_fast.group_norm_silu.default"] if kind == "triton" else [])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(3, 12, 5), r"x: got \(3, 12, 5\) torch.float32, expected \(B, C, h, w\)"),
        ("groups", 5, "groups: got 5, expected a divisor of x's 12 channels"),
        ("groups", 0, "groups: got 0, expected a divisor"),
        ("weight", torch.zeros(7), r"weight: got \(7,\) torch.float32, expected \(12,\) torch.float32"),
        ("bias", torch.zeros(12).half(), r"bias: got \(12,\) torch.float16, expected \(12,\) torch.float32"),
        ("shift", torch.zeros(12), r"shift: got \(12,\) torch.float32, expected \(B, C\) = \(2, 12\) torch.float32"),
        ("shift", torch.zeros(2, 12).half(), r"shift: got \(2, 12\) torch.float16, expected .* torch.float32 like x"),
    ],
    ids=lambda v: v if isinstance(v, str) and len(v) < 7 else "",
)
def test_bad_input_is_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**(inputs((2, 12, 5, 4)) | {"groups": 2} | {name: value}))


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_forward_mode_is_plain_torchs_alone(kind):
    x = draw(2, 4, 3, 3, seed=0, dtype=torch.float32)
    assert_forward_mode(
        kind, "group_norm_silu", lambda x: group_norm_silu(x, None, None, 2), lambda x: F.silu(F.group_norm(x, 2)), x
    )


def test_plain_torch_unless_a_kernel_is_asked_for():
    x = torch.zeros(2, 4, 3, 3)
    group_norm_silu(x, None, None, 2)
    assert backend.last("group_norm_silu") == "reference"
    # Never in float64.
    with backend.force("triton"), pytest.raises(ValueError, match="group_norm_silu has no 'triton' implementation"):
        group_norm_silu(x.double(), None, None, 2)


if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        pytest.importorskip("triton")
        run_interpreted(__file__)
