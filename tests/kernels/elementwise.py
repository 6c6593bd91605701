"""What the tests of the memory-bound operators share: the rule for errors, and a process that interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsd_fast.kernels.common import backend

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The public function in plain torch, and the registered operator, which on a CPU is plain torch; or the kernels.
KINDS = ["triton"] if INTERPRETED else ["reference", "operator"]
PUBLIC_KINDS = ["triton"] if INTERPRETED else ["reference"]
# Interpreting takes long, and rounds bfloat16 in a way of its own.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


def run_interpreted(*files):
    """The tests of files in a process that interprets kernels: Triton reads the variable when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout


def forced(kind, name, call):
    """``call()`` with the implementation ``kind``, and proof that it ran."""
    with backend.force(kind):
        result = call()
    assert backend.last(name) == kind
    return result


def assert_forward_mode(kind, name, call, plain, x):
    """Tangents pass through plain torch, and the kernels, which would drop them, refuse them."""
    tangent = torch.ones_like(x)
    with backend.force(kind):
        if kind == "triton":
            with pytest.raises(NotImplementedError, match=f"{name}: got an input with a forward-mode tangent"):
                torch.func.jvp(call, (x,), (tangent,))
        else:
            want = torch.func.jvp(plain, (x,), (tangent,))
            torch.testing.assert_close(torch.func.jvp(call, (x,), (tangent,)), want)


def assert_as_good_as_torch(ours, plain, truth):
    """Errors are at most twice plain torch's, and one unit in the last place of the largest result.

    NumPy, which interprets kernels, adds the n ≤ 256 rows of a tile one after another, where a GPU adds them as a tree
    and torch by halves: √n roundings of a sum, by chance, instead of about one.
    """
    largest = max(x.numel() for x in truth.values())
    for name, x in ours.items():
        assert x.dtype == plain[name].dtype, name
        assert x.shape == truth[name].shape, name
        if not x.numel():
            continue
        error, limit = (float((y.double() - truth[name]).abs().max()) for y in (x, plain[name]))
        roundings = 256**0.5 if INTERPRETED and x.numel() < largest else 1
        limit = 2 * limit + roundings * float(truth[name].abs().max()) * torch.finfo(x.dtype).eps
        assert error <= limit, f"{name}: an error of {error:.2e}, expected at most {limit:.2e}"


def draw(*shape, seed, dtype=torch.float64, scale=1.0, offset=0.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale + offset).to(dtype)


def leaf(x, kind=None):
    """A leaf of the same values and strides, perhaps of another type."""
    x = x.detach()
    return (x if kind is None else x.to(kind)).requires_grad_()
