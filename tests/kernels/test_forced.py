"""What a forward pass is forced to, its backward pass takes too, in whatever thread: torch has one for each GPU."""

import importlib
import threading

import pytest
import torch

from dsd_fast.kernels.add_layer_norm import add_layer_norm
from dsd_fast.kernels.common import backend
from dsd_fast.kernels.cross_attention_score import cross_attention_score
from dsd_fast.kernels.geglu import geglu
from dsd_fast.kernels.group_norm_silu import group_norm_silu
from dsd_fast.kernels.noise_latents import noise_latents
from dsd_fast.kernels.token_maps import token_maps
from tests.kernels.elementwise import INTERPRETED

INDEX = torch.tensor([0, 1])
FACTOR = torch.full((1,), 0.5)
CALLS = {
    "cross_attention_score": lambda x: cross_attention_score(x, x, x, heads=2)[0],
    "token_maps": lambda x: token_maps(x, x, INDEX[:, None], INDEX, None, None, heads=2, scale=0.5),
    "geglu": geglu,
    "add_layer_norm": lambda x: add_layer_norm(x, None, None, None)[1],
    "group_norm_silu": lambda x: group_norm_silu(x[..., None], None, None, 1),
    "noise_latents": lambda x: noise_latents(x[:, None], torch.ones(1, 1, 1, 1, *x.shape[1:]), FACTOR, FACTOR),
}
WITH_A_C_FORM = list(CALLS)[:2]
FORCED = "triton" if INTERPRETED else "reference"


def in_another_thread(call):
    result = []
    thread = threading.Thread(target=lambda: result.append(call()))
    thread.start()
    thread.join()
    return result[0]


@pytest.fixture
def backwards(monkeypatch):
    """The implementations of operators that differentiate, as they do so; by default an attention operator's is C++."""
    ran = []

    def watch(module, name, kind):
        original = module.backward
        monkeypatch.setattr(module, "backward", lambda *args, **kw: ran.append((name, kind)) or original(*args, **kw))

    for name in CALLS:
        watch(importlib.import_module(f"dsd_fast.kernels.{name}.reference"), name, "reference")
        if INTERPRETED:
            watch(importlib.import_module(f"dsd_fast.kernels.{name}.kernel"), name, "triton")
    kinds = ("cpu", "reference", *(["triton"] if INTERPRETED else []))
    monkeypatch.setattr(backend, "available", lambda device, dtype: kinds)
    return ran


# Plain torch of the memory-bound operators is differentiated by torch, not by them.
@pytest.mark.parametrize("name", CALLS if INTERPRETED else WITH_A_C_FORM)
@pytest.mark.parametrize("by", ["force", "environment"])
def test_the_gradient_is_of_the_implementation_that_was_forced(name, by, backwards, monkeypatch):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if by == "force":
        with backend.force(FORCED):
            y = CALLS[name](x)
    else:
        with monkeypatch.context() as patch:
            patch.setenv("DSD_FAST_BACKEND", FORCED)
            y = CALLS[name](x)
    (dx,) = in_another_thread(lambda: torch.autograd.grad(y.square().sum(), x))
    # The kernels of token_maps are differentiated by those of cross_attention_score.
    assert backwards[0] == (name, FORCED)
    assert {kind for _, kind in backwards} == {FORCED}
    assert dx.abs().max() > 0


@pytest.mark.skipif(INTERPRETED, reason="the same whatever is forced")
@pytest.mark.parametrize("name", WITH_A_C_FORM)
def test_a_compiled_gradient_too(name, backwards):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with backend.force(FORCED):
        y = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")(x)
    in_another_thread(lambda: torch.autograd.grad(y.square().sum(), x))
    assert backwards == [(name, FORCED)]


@pytest.mark.skipif(INTERPRETED, reason="the same whatever is forced")
def test_what_the_backward_pass_does_not_have_is_an_error_that_says_where_it_was_forced(backwards, monkeypatch):
    x = torch.zeros(2, 3, 4, requires_grad=True)
    with backend.force("reference"):
        y = CALLS["token_maps"](x)
    monkeypatch.setattr(backend, "available", lambda device, dtype: ("cpu",))
    with pytest.raises(ValueError, match="in the forward pass: operator token_maps has no 'reference' implementation"):
        torch.autograd.grad(y.sum(), x)
