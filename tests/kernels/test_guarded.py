"""No kernel reads or writes out of bounds, and none depends on the order of its programs (promise 6).

Every operator's kernels are interpreted under the guard of guard.py. Triton reads TRITON_INTERPRET when it is imported:
the tests run in a process that has it, which one test starts.
"""

import functools
import importlib

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterError

from dsd_fast.kernels.add_layer_norm import add_layer_norm
from dsd_fast.kernels.common import backend, kernel
from dsd_fast.kernels.cross_attention_score import cross_attention_score
from dsd_fast.kernels.geglu import geglu
from dsd_fast.kernels.group_norm_silu import group_norm_silu
from dsd_fast.kernels.noise_latents import noise_latents
from dsd_fast.kernels.pack_features import pack_features
from dsd_fast.kernels.token_maps import token_maps
from tests.kernels.attention import attend, draw, gradients, options
from tests.kernels.elementwise import INTERPRETED, run_interpreted
from tests.kernels.guard import guarded
from tests.repository.source import ROOT, module_name

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of the first test")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="it starts this process")
def test_all_in_a_process_that_interprets():
    run_interpreted(__file__)


def attention(*sizes, dtype=torch.float16, **chosen):
    leaves, rest = options(torch.Generator().manual_seed(0), *sizes, dtype=dtype, **chosen)
    return gradients(functools.partial(attend, cross_attention_score, **rest), leaves, 1)


def maps(*sizes, count, **chosen):
    g = torch.Generator().manual_seed(0)
    leaves, rest = options(g, *sizes, output=False, dtype=torch.float16, **chosen)
    tokens = torch.randint(sizes[3], (sizes[0], count), generator=g)
    heads, index, length = rest["heads"], rest["index"], rest["length"]
    call = lambda q, k, _, bias: (token_maps(q, k, tokens, index, length, bias, heads=heads, scale=0.2),)  # noqa: E731
    return gradients(call, leaves, 1)


def results(call, *shapes, layout=torch.contiguous_format):
    """Results and gradients of float16 inputs, the first of a layout."""
    g = torch.Generator().manual_seed(0)
    leaves = [None if shape is None else draw(g, *shape, dtype=torch.float16) for shape in shapes]
    leaves[0] = leaves[0].contiguous(memory_format=layout)
    return gradients(call, leaves, 1)


def group_norm(shape, layout, groups, parameters=True):
    call = lambda x, weight, bias, shift: (group_norm_silu(x, weight, bias, groups, shift=shift),)  # noqa: E731
    others = (shape[1:2], shape[1:2], shape[:2]) if parameters else (None,) * 3
    return results(call, shape, *others, layout=layout)


def noised(*noise):
    signal, sigma = torch.tensor([0.5, 0.6, 0.7]), torch.tensor([0.1, 0.2, 0.3])
    return results(lambda x, noise: (noise_latents(x, noise, signal, sigma),), (2, 4, 9, 60), (*noise, 2, 4, 9, 60))


def packed(shape, size, mode, normalize):
    """Into rows of a buffer that lies between others."""
    x = draw(torch.Generator().manual_seed(0), *shape, dtype=torch.float16)
    out = torch.zeros(5, shape[1], *size, dtype=torch.float16)
    rows = torch.tensor([3, 1, 4])
    pack_features(x.contiguous(memory_format=torch.channels_last), out, rows, mode=mode, normalize=normalize)
    return [out]


# Every kernel, with parts of tiles and of blocks wherever there are tiles; of two images or rows at least.
CASES = {
    "attention, every option": lambda: attention(3, 70, 2, 77, 2, 40, biased=True, masked=True, limited=True),
    "attention, own texts": lambda: attention(2, 70, 2, 21, 2, 3, index=False, mean=True, masked=True),
    "attention, the score alone": lambda: attention(3, 70, 2, 77, 1, 64, output=False, mean=True),
    "attention, a loop over keys": lambda: attention(2, 67, 2, 133, 2, 8, limited=True, biased=True),
    "attention, wide heads": lambda: attention(2, 35, 2, 21, 2, 160, masked=True),
    "attention, float32": lambda: attention(2, 35, 2, 21, 2, 40, dtype=torch.float32, biased=True, mean=True),
    "maps": lambda: maps(2, 70, 2, 21, 2, 40, count=17, biased=True, limited=True),
    "group norm": lambda: group_norm((2, 70, 13, 11), torch.channels_last, 2),
    "group norm, contiguous": lambda: group_norm((2, 20, 20, 17), torch.contiguous_format, 5),
    "group norm, x alone": lambda: group_norm((2, 6, 3, 2), torch.channels_last, 3, parameters=False),
    "geglu": lambda: results(lambda x: (geglu(x),), (3, 5, 2 * 307)),
    "layer norm": lambda: results(add_layer_norm, (5, 13, 70), (5, 13, 70), (70,), (70,)),
    "layer norm, x alone": lambda: results(lambda x: add_layer_norm(x, None, None, None)[1:], (9, 997)),
    "noise": lambda: noised(2, 3),
    "noise, shared": lambda: noised(1, 1),
    "features, bilinear": lambda: packed((3, 70, 9, 7), (11, 13), "bilinear", False),
    "features, area": lambda: packed((3, 9, 9, 7), (4, 5), "area", True),
    "features, the largest": lambda: packed((3, 9, 9, 7), (4, 5), "max", False),
    "features, two passes": lambda: packed((3, 521, 4, 3), (4, 3), "nearest", True),
}


@functools.cache
def computed(name, seed=None):
    """The results of a case, with three processors to share the work, and its guard."""
    with pytest.MonkeyPatch.context() as patch, backend.force("triton"), guarded(seed) as guard:
        patch.setattr(kernel, "processors", lambda device: 3)
        return CASES[name](), guard


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_in_bounds_without_a_race_and_equal_in_another_order(name):
    (want, forwards), (got, shuffled) = computed(name), computed(name, 0)
    assert forwards.orders == [sorted(order) for order in shuffled.orders]
    assert shuffled.orders != forwards.orders
    assert not any(x.isnan().any() for x in want)
    for x, y in zip(want, got, strict=True):
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@interpreted
def test_every_kernel_is_among_them():
    files = [file for file in (ROOT / "kernels").glob("*/*kernel.py") if file.parent.name != "common"]
    values = [value for file in files for value in vars(importlib.import_module(module_name(file))).values()]
    kernels = {f"{x.fn.__module__}.{x.fn.__name__}" for x in values if isinstance(x, InterpretedFunction)}
    kernels = {name for name in kernels if name.endswith("_kernel")}
    assert len(kernels) == 21
    assert set().union(*(computed(name)[1].launched for name in CASES)) == kernels


@triton.jit
def toy_kernel(p_out, p_x, n, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    """out = x by blocks, and what WHAT adds to it."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i, mask=i < n + (WHAT == "reads behind the end"), other=0.0)
    tl.store(p_out + i, b_x, mask=i < n + (WHAT == "writes behind the end"))
    if WHAT == "reads before the beginning":
        b_x = tl.load(p_x - 1 - tl.program_id(0))
    elif WHAT == "reads another tensor":
        b_x = tl.load(p_x + 2 * n)
    elif WHAT == "two programs write":
        tl.store(p_out + tl.program_id(0) * 0, 1.0)
    elif WHAT == "one store writes twice":
        tl.store(p_out + n + i // 2, b_x, mask=i < n)
    elif WHAT == "reads what another writes":
        b_x = tl.load(p_out + (i + BLOCK) % n, mask=i < n)
    elif WHAT == "counts":
        tl.atomic_add(p_out + n, 1.0)


def toy(what, seed=None, step=1, begin=20):
    """The toy on 10 elements, of a buffer in which its input and its output lie one behind the other."""
    buffer = torch.arange(40.0)
    with guarded(seed) as guard:
        out = buffer[begin : begin + (20 if what == "one store writes twice" else 10)]
        toy_kernel[(3,)](out, buffer[: 10 * step : step], 10, WHAT=what, BLOCK=4)
    return buffer, guard


@interpreted
def test_a_sound_kernel_passes_in_the_order_that_is_asked_for():
    buffer, guard = toy("nothing")
    assert torch.equal(buffer[20:30], torch.arange(10.0))
    assert guard.orders == [[0, 1, 2]]
    assert {tuple(toy("nothing", seed)[1].orders[0]) for seed in range(20)} >= {(2, 1, 0), (1, 2, 0), (2, 0, 1)}


@interpreted
@pytest.mark.parametrize(
    ("what", "said"),
    {
        "reads behind the end": r"loads what is no element of a tensor \(10,\)",
        "writes behind the end": r"stores to what is no element of a tensor \(10,\)",
        "reads before the beginning": r"loads what is no element of a tensor \(10,\)",
        "reads another tensor": r"loads what is no element of a tensor \(10,\)",
        "two programs write": "stores to an element twice",
        "one store writes twice": "stores to an element twice",
        "reads what another writes": "loads and stores to an element",
        "counts": "has an atomic operation",
    }.items(),
)
def test_what_a_kernel_must_not_do_is_seen(what, said):
    with pytest.raises(InterpreterError, match=rf"toy_kernel {said}"):
        toy(what)


@interpreted
def test_what_is_stored_to_is_not_loaded_by_another_name():
    with pytest.raises(InterpreterError, match="toy_kernel loads and stores to an element"):
        toy("nothing", begin=9)


@interpreted
def test_the_gaps_of_a_view_are_not_its_elements():
    with pytest.raises(InterpreterError, match=r"toy_kernel loads what is no element of a tensor \(10,\)"):
        toy("nothing", step=2)
