"""The operators: attention with its score, token maps, the network's memory-bound pieces, and those around it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from dsd_fast.bench.case import Case, Group, Suite, Target, Work
from dsd_fast.bench.suites import ops_attention as attention
from dsd_fast.bench.suites import ops_elementwise as elementwise
from dsd_fast.bench.suites import ops_features as features
from dsd_fast.bench.suites import ops_rivals as rivals
from dsd_fast.bench.suites.ops_attention import Shape

CPU, CUDA = ("cpu",), ("cuda",)

# Sizes of SD 1.5's and 2.1's layers, of a few rows.
CPU_SHAPES = {
    "width-40": Shape(8, 1024, 8, 40),
    "width-80": Shape(8, 256, 8, 80),
    "width-64": Shape(4, 4096, 5, 64),
}
# On a CPU: the score for nothing, and twice the speed of the materialised form on long layers.
CPU_RATIO, CPU_MATERIALISED, LONG = 1.0, 2.0, 1024

CUDA_ROWS = 32
# The cross-attention layers of each architecture: positions, heads and width.
LAYERS = {
    "sd15": ((4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160)),
    "sd21": ((4096, 5, 64), (1024, 10, 64), (256, 20, 64), (64, 20, 64)),
    "sdxl": ((4096, 10, 64), (1024, 20, 64)),
}
# On a GPU, against the fastest SDPA without a score: as fast, at width 64 within a tenth; the share of the copy
# bandwidth, on long layers; times faster than the materialised form; times faster than FlexAttention, backward.
CUDA_RATIOS = {64: 1 / 1.1}
CUDA_COPY_SHARES = {40: 0.55, 64: 0.7, 80: 0.7}
CUDA_MATERIALISED, CUDA_FLEX = 5.0, 1.5

# Where launches are tried: positions and heads of a layer of each width.
TUNED_SHAPES = {40: (4096, 8), 64: (4096, 10), 80: (1024, 8), 160: (256, 8)}
# The kernels of the backward pass, and the widest head whose launch can be chosen.
BACKWARD_PARTS = {"query": 128, "text": 256}

# What a short run takes of the layers, by positions; of the elementwise pieces it takes the largest level.
SHORT_FORWARD = {"sd15": (4096, 1024, 256), "sd21": (4096,), "sdxl": (1024,)}
SHORT_OTHERS = {"sd15": (4096,), "sd21": (4096,)}
SHORT_LEVEL = "320x64"


def _cpu_cases() -> list[Case]:
    cases = []
    for name, shape in CPU_SHAPES.items():
        least = CPU_MATERIALISED if shape.length >= LONG else None
        forward = partial(attention.forward, shape, targets=(Target("ratio", CPU_RATIO),), least=least)
        cases.append(Case(f"cpu/forward/{name}", "cpu", forward, 15, CPU))
    for kind, prepare in (
        ("score-alone", attention.score_alone),
        ("token-maps", attention.maps),
        ("backward", attention.backward),
    ):
        for name, shape in CPU_SHAPES.items():
            cases.append(Case(f"cpu/{kind}/{name}", "cpu", partial(prepare, shape), 9, CPU))
    return cases


def _cuda_cases() -> list[Case]:
    cases = []
    for family, layers in LAYERS.items():
        for length, heads, width in layers:
            shape = Shape(CUDA_ROWS, length, heads, width, dtype="bfloat16")
            name, short = f"{family}/{length}", length in SHORT_FORWARD[family]
            few = length in SHORT_OTHERS.get(family, ())
            cases.append(_case("forward", name, _forward(shape), short))
            cases.append(_case("flex-backward", name, partial(rivals.flex_backward, shape, least=CUDA_FLEX), short=few))
            cases.append(_case("flex-forward", name, partial(rivals.flex_forward, shape)))
            cases.append(_case("backward", name, partial(attention.backward, shape), short=few))
            cases.append(_case("score-alone", name, partial(attention.score_alone, shape), short=few))
            cases.append(_case("token-maps", name, partial(attention.maps, shape), short=few))
    for width, (length, heads) in TUNED_SHAPES.items():
        shape = Shape(CUDA_ROWS, length, heads, width, dtype="bfloat16")
        cases.append(_case("tune", f"width-{width}", partial(rivals.launches, shape)))
        for part, widest in BACKWARD_PARTS.items():
            if width <= widest:
                launches = partial(rivals.launches, shape, table=f"{part.upper()}_LAUNCHES")
                cases.append(_case("tune", f"{part}/width-{width}", launches))
    half = Shape(CUDA_ROWS, 4096, 8, 40, dtype="float16")
    cases.append(_case("forward", "sd15/4096/float16", _forward(half)))
    return cases


def _forward(shape: Shape) -> partial[Work]:
    targets = [Target("ratio", CUDA_RATIOS.get(shape.width, 1.0))]
    if shape.width in CUDA_COPY_SHARES and shape.length >= LONG:
        targets.append(Target("copy_share", CUDA_COPY_SHARES[shape.width]))
    return partial(attention.forward, shape, targets=targets, least=CUDA_MATERIALISED)


def _case(kind: str, name: str, prepare: partial[Work], short: bool = False) -> Case:
    return Case(f"{kind}/{name}", kind, prepare, 15, CUDA, not short)


def _elementwise_cases() -> list[Case]:
    return [
        Case(
            f"elementwise/{name}/{kind}/{level}",
            "elementwise",
            partial(prepare, name, level, "bfloat16"),
            15,
            CUDA,
            level != SHORT_LEVEL,
        )
        for kind, prepare in (("forward", elementwise.forward), ("backward", elementwise.backward))
        for name in elementwise.PIECES
        for level in elementwise.LEVELS
    ]


def _feature_cases() -> list[Case]:
    prepared = {
        "noise-latents/forward": partial(features.noise_forward, "bfloat16"),
        "noise-latents/backward": partial(features.noise_backward, "bfloat16"),
    }
    for kind, normalize in (("plain", False), ("normalised", True)):
        for resize in features.RESIZES:
            for level in elementwise.LEVELS:
                prepare = partial(features.pack, resize, level, normalize, "bfloat16")
                prepared[f"pack-features/{kind}/{resize}/{level}"] = prepare
    return [
        Case(f"features/{name}", "features", prepare, 15, CUDA, not name.endswith(("forward", SHORT_LEVEL)))
        for name, prepare in prepared.items()
    ]


def _in_order(cases: Sequence[Case], groups: Sequence[Group]) -> list[Case]:
    """What a short run takes first, each part by group."""
    places = [group.name for group in groups]
    return sorted(cases, key=lambda case: (case.long, places.index(case.group)))


_SIZES = f"bfloat16, {CUDA_ROWS} rows, {Shape(1, 1, 1, 1).tokens} tokens"

_GROUPS = [
    Group("cpu", "Attention with its score on a CPU, float32"),
    Group("forward", f"Attention with its score, {_SIZES}"),
    Group("flex-backward", f"Gradients through output and score, beside FlexAttention, {_SIZES}"),
    Group("backward", f"Gradients through output and score, {_SIZES}"),
    Group("score-alone", f"The score alone, {_SIZES}"),
    Group("token-maps", f"Probabilities of {attention.MAP_TOKENS} tokens, {_SIZES}"),
    Group("elementwise", f"The network's memory-bound pieces, bfloat16, {elementwise.ROWS} rows of SD 1.5"),
    Group("features", f"What stands before and behind a network, bfloat16, {elementwise.ROWS} rows of SD 1.5"),
    Group("tune", f"Ways to launch the kernel beside the one that is taken, {_SIZES}"),
    Group("flex-forward", f"Attention with its score, beside FlexAttention, {_SIZES}"),
]

suite = Suite(
    name="ops",
    groups=_GROUPS,
    cases=_in_order([*_cpu_cases(), *_cuda_cases(), *_elementwise_cases(), *_feature_cases()], _GROUPS),
)
