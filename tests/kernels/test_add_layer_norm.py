"""The sum and its layer norm against float64, plain, registered and interpreted."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from dsd_fast.kernels.add_layer_norm import add_layer_norm
from dsd_fast.kernels.common import backend
from tests.kernels.elementwise import (
    DTYPES,
    KINDS,
    PUBLIC_KINDS,
    assert_as_good_as_torch,
    assert_forward_mode,
    draw,
    forced,
    leaf,
)

OPERATOR = torch.ops.dsd_fast.add_layer_norm.default
NAMES = ("x", "residual", "weight", "bias")

# Empty rows and columns, one number, primes, more rows than one program of a tile takes, a row wider than a tile.
SHAPES = [(0, 6), (3, 0), (1, 1), (3, 7, 37), (600, 40), (2, 2500), (6,)]


def written_out(x, residual, weight, bias, eps=1e-5):
    total = x if residual is None else x + residual
    # Torch's own kernels fail where there is nothing to normalise.
    if not total.numel():
        return total, total * (1 if weight is None else weight) + (0 if bias is None else bias)
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def run(kind, x, residual, weight, bias, eps=1e-5):
    if kind == "operator":
        total, normed, _, _ = OPERATOR(x, residual, weight, bias, eps)
        return x if residual is None else total, normed
    return forced(kind, "add_layer_norm", lambda: add_layer_norm(x, residual, weight, bias, eps))


def inputs(*shape, dtype=torch.float32, absent=()):
    shapes = {"x": shape, "residual": shape, "weight": shape[-1:], "bias": shape[-1:]}
    return {n: None if n in absent else draw(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}


def results(call, tensors, kind=None):
    leaves = {name: None if x is None else leaf(x, kind) for name, x in tensors.items()}
    total, normed = call(*leaves.values())
    grads = [draw(*total.shape, seed=seed).to(total.dtype) for seed in (5, 6)]
    wanted = {f"d{name}": x for name, x in leaves.items() if x is not None}
    found = torch.autograd.grad((total, normed), list(wanted.values()), grads)
    return {"sum": total.detach(), "normed": normed.detach(), **dict(zip(wanted, found, strict=True))}


@pytest.mark.parametrize("absent", [(), ("residual",), ("weight",), ("bias",), ("residual", "weight", "bias")], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, dtype, shape, absent):
    tensors = inputs(*shape, dtype=dtype, absent=absent)
    ours = results(lambda *a: run(kind, *a), tensors)
    assert_as_good_as_torch(ours, results(written_out, tensors), results(written_out, tensors, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_that_of_the_rounded_sum(kind, dtype):
    """Ours is one rounding from its norm in float64; that of the exact sum, about a mean of 8, would be several."""
    x, residual, *_ = inputs(5, 64, dtype=dtype).values()
    x = x + 8
    total, normed = run(kind, x, residual, None, None)
    assert torch.equal(total, x + residual)
    truth = F.layer_norm(total.double(), (64,))
    error = (normed.double() - truth).abs() - truth.abs() * torch.finfo(dtype).eps / 2
    assert error.max() <= 64 * torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_large_mean_does_not_drown_a_small_variance(kind, mean):
    x = draw(4, 512, seed=0, dtype=torch.float32, scale=0.1, offset=mean)
    _, normed = run(kind, x, None, None, None)
    truth = F.layer_norm(x.double(), (512,))
    # The mean is rounded to float32 once; E[x²] − E[x]² would have lost every digit.
    eps = torch.finfo(torch.float32).eps
    limit = eps * (abs(mean) / float(x.double().std(-1).min()) + 16 * truth.abs().max())
    assert (normed - truth).abs().max() <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    tensors = inputs(4, 6, 10)
    want = results(lambda *a: run(kind, *a), tensors)
    wide = torch.zeros(4, 6, 30)
    wide[..., 10:20] = tensors["x"]
    spread = torch.stack([tensors["weight"]] * 2, dim=-1)[:, 0]
    for x in (wide[..., 10:20], tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)):
        got = results(lambda *a: run(kind, *a), tensors | {"x": x, "weight": spread, "residual": tensors["residual"]})
        torch.testing.assert_close(got, want)
    leaves = [leaf(x) for x in tensors.values()]
    got = torch.autograd.grad(sum(x.sum() for x in run(kind, *leaves)), leaves)
    want = torch.autograd.grad(sum(x.sum() for x in written_out(*leaves)), leaves)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "normed"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_output_alone_may_be_used(kind, used):
    tensors = inputs(3, 10)
    found = []
    for call in (lambda *a: run(kind, *a), written_out):
        leaves = [leaf(x) for x in tensors.values()]
        found.append(torch.autograd.grad(call(*leaves)[used].square().sum(), leaves[: 2 + 2 * used]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_parameters_with_half_precision_inputs(kind):
    tensors = inputs(5, 40, dtype=torch.float16)
    tensors |= {name: tensors[name].float() * 1.001 for name in ("weight", "bias")}
    ours = results(lambda *a: run(kind, *a), tensors)
    assert ours["normed"].dtype == torch.float16
    assert ours["dweight"].dtype == torch.float32
    truth = results(written_out, tensors, torch.float64)
    assert (ours["normed"].double() - truth["normed"]).abs().max() <= 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("call", [add_layer_norm, lambda *a: OPERATOR(*a, 1e-5)[:2]], ids=["reference", "operator"])
def test_gradcheck(call):
    leaves = [x.requires_grad_() for x in inputs(3, 5, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("absent", [(), ("residual", "bias"), ("weight",)], ids=str)
@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (1, 1), (3, 7, 37)], ids=str)
def test_opcheck(shape, absent):
    tensors = inputs(*shape, absent=absent)
    tensors["x"] = torch.stack([tensors["x"]] * 2, dim=-1)[..., 0]
    opcheck(OPERATOR, (*(None if x is None else leaf(x) for x in tensors.values()), 1e-5))


def test_equal_inputs_give_equal_bits():
    first, *others = (results(lambda *a: run(KINDS[-1], *a), inputs(600, 40)) for _ in range(5))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_compiles_and_exports_whole(kind):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return add_layer_norm(*tensors)

    tensors = inputs(3, 8)
    torch._dynamo.reset()
    with backend.force(kind):
        compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(results(compiled, tensors), results(add_layer_norm, tensors))
        graph = torch.export.export(Module(), tuple(tensors.values())).graph
    opaque = [str(node.target) for node in graph.nodes if "dsd_fast" in str(node.target)]
    assert opaque == (["dsd_fast.add_layer_norm.default"] if kind == "triton" else [])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(3, 8, dtype=torch.int64), r"x: got \(3, 8\) torch.int64, expected \(\.\.\., C\)"),
        ("residual", torch.zeros(1, 8), r"residual: got \(1, 8\) torch.float32, expected \(3, 8\)"),
        (
            "residual",
            torch.zeros(3, 8).half(),
            r"residual: got \(3, 8\) torch.float16, expected .* torch.float32 like x",
        ),
        ("weight", torch.zeros(7), r"weight: got \(7,\) torch.float32, expected \(8,\) torch.float32"),
        ("bias", torch.zeros(8).half(), r"bias: got \(8,\) torch.float16, expected \(8,\) torch.float32"),
    ],
    ids=lambda v: v if isinstance(v, str) and len(v) < 9 else "",
)
def test_bad_input_is_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**(inputs(3, 8) | {name: value}))


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_forward_mode_is_plain_torchs_alone(kind):
    x = draw(3, 8, seed=0, dtype=torch.float32)
    assert_forward_mode(
        kind, "add_layer_norm", lambda x: add_layer_norm(x, None, None, None)[1], lambda x: F.layer_norm(x, (8,)), x
    )


def test_plain_torch_unless_a_kernel_is_asked_for():
    x = torch.zeros(2, 4)
    total, _ = add_layer_norm(x, None, None, None)
    assert total is x
    assert backend.last("add_layer_norm") == "reference"
    # Never in float64.
    with backend.force("triton"), pytest.raises(ValueError, match="add_layer_norm has no 'triton' implementation"):
        add_layer_norm(x.double(), None, None, None)
