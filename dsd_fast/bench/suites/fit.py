"""Few-shot adaptation of matching: a step beside the official one and, in a checkout, what adaptation brings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from dsd_fast.bench.case import Case, Context, Figure, Group, Quality, Suite, UnavailableError
from dsd_fast.bench.checkout import experiment
from dsd_fast.bench.suites import fit_steps as steps


def _steps() -> Iterator[Case]:
    for layers in steps.LAYERS:
        yield Case(f"step/mini/{layers}", "step", partial(steps.work, partial(steps.mini_step, layers=layers)))
    yield Case("step/sd21-base/all", "step", partial(steps.work, steps.sd21_step), devices=("cuda",))


def _experiments() -> tuple[Sequence[Group], Sequence[Quality]]:
    """Groups and cases of the repository's ``benchmarks/suites/fit.py``; elsewhere one case, which says so when run."""
    try:
        found = experiment("fit")
    except UnavailableError as reason:
        return [], [Quality("experiments", "step", partial(_missing, str(reason)), long=True)]
    return found.GROUPS, found.CASES


def _missing(reason: str, _: Context) -> Sequence[Figure]:
    raise UnavailableError(reason)


_GROUPS, _CASES = _experiments()

suite = Suite(
    name="fit",
    groups=[
        Group(
            "step",
            "A step of adaptation to an image and five texts, a LoRA on all attention layers or on cross-attention",
        ),
        Group(
            "dtype", "bfloat16 beside float32: a step of adaptation to an image and five texts, all attention layers"
        ),
        *_GROUPS,
    ],
    cases=[*_steps(), Case("dtype/step", "dtype", steps.types, repeats=15), *_CASES],
)
