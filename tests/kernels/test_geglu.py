"""GEGLU against float64, plain, registered and interpreted."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from dsd_fast.kernels.common import backend, elementwise
from dsd_fast.kernels.geglu import geglu
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

OPERATOR = torch.ops.dsd_fast.geglu.default

# Empty rows and columns, one number, primes, less and more than a tile of 8 rows of 256, three leading dimensions.
SHAPES = [(0, 6), (3, 0), (1, 2), (7, 2 * 37), (11, 2 * 300), (2, 3, 5, 8), (6,)]


def written_out(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def run(kind, x):
    return OPERATOR(x) if kind == "operator" else forced(kind, "geglu", lambda: geglu(x))


def results(call, x):
    y = call(x)
    dy = draw(*y.shape, seed=1).to(y.dtype)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(kind, dtype, shape):
    x = draw(*shape, seed=0, dtype=dtype, scale=3)
    ours = results(lambda x: run(kind, x), leaf(x))
    assert ours["y"].is_contiguous()
    assert_as_good_as_torch(ours, results(written_out, leaf(x)), results(written_out, leaf(x, torch.float64)))


@pytest.mark.parametrize("kind", KINDS)
def test_far_tails_stay_finite(kind):
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0, 30.0, -30.0, 1e4, -1e4]], requires_grad=True)
    ours = results(lambda x: run(kind, x), x)
    torch.testing.assert_close(ours["y"], torch.tensor([[30.0, 0.0, 1e4, 0.0]]), rtol=0, atol=0)
    assert ours["dx"].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    x = draw(4, 6, 10, seed=0, dtype=torch.float32)
    wide = torch.zeros(4, 6, 30)
    wide[..., 10:20] = x
    want = results(lambda x: run(kind, x), leaf(x))
    for other in (wide[..., 10:20], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        got = results(lambda x: run(kind, x), leaf(other))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    # A gradient that is one number everywhere has strides of 0.
    x = leaf(x)
    (got,) = torch.autograd.grad(run(kind, x).sum(), x)
    (want,) = torch.autograd.grad(written_out(x).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("call", [geglu, OPERATOR], ids=["reference", "operator"])
def test_gradcheck(call):
    assert torch.autograd.gradcheck(call, (draw(3, 5, 8, seed=0).requires_grad_(),))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_opcheck(shape):
    x = draw(*shape, seed=0, dtype=torch.float32)
    opcheck(OPERATOR, (leaf(x),))
    opcheck(OPERATOR, (leaf(torch.stack([x, x], dim=-1)[..., 0]),))


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_compiles_and_exports_whole(kind):
    class Module(torch.nn.Module):
        def forward(self, x):
            return geglu(x)

    x = leaf(draw(3, 8, seed=0, dtype=torch.float32))
    torch._dynamo.reset()
    with backend.force(kind):
        compiled = results(torch.compile(geglu, fullgraph=True, backend="aot_eager"), x)
        torch.testing.assert_close(compiled, results(geglu, x), rtol=0, atol=0)
        graph = torch.export.export(Module(), (x,)).graph
    opaque = [str(node.target) for node in graph.nodes if "dsd_fast" in str(node.target)]
    assert opaque == (["dsd_fast.geglu.default"] if kind == "triton" else [])


def test_bad_input_is_refused_by_name():
    for x in (torch.zeros(3, 5), torch.tensor(1.0), torch.zeros(2, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"x: got .* expected \(\.\.\., 2·N\) of a floating-point type"):
            geglu(x)


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_forward_mode_is_plain_torchs_alone(kind):
    x = draw(3, 8, seed=0, dtype=torch.float32)
    assert_forward_mode(kind, "geglu", geglu, written_out, x)


def test_plain_torch_unless_a_kernel_is_asked_for():
    geglu(torch.zeros(2, 4, dtype=torch.bfloat16))
    assert backend.last("geglu") == "reference"
    geglu(torch.zeros(2, 4, requires_grad=True))
    assert backend.last("geglu") == "reference"
    # One pass without gradients is the compiled library's.
    geglu(torch.zeros(2, 4))
    assert backend.last("geglu") == ("cpu" if elementwise.prefers_native("geglu") else "reference")
    # Never in float64.
    with backend.force("triton"), pytest.raises(ValueError, match="geglu has no 'triton' implementation"):
        geglu(torch.zeros(2, 4, dtype=torch.float64))
