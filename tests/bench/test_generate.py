"""The suite `generate`: its sides agree, and its counts are those of what runs."""

import pytest

from dsd_fast.bench.case import Context
from dsd_fast.bench.run import checked
from dsd_fast.bench.suites import generate


@pytest.mark.parametrize(("make", "sampler"), [(generate.latents, "dpm++2m"), (generate.images, "ddim")])
def test_sides_give_what_the_stock_pipeline_gives(monkeypatch, make, sampler):
    monkeypatch.setattr(generate, "STEPS", 2)
    work = make(sampler, 1, Context("cpu"))
    flops, differences = checked(work)
    assert differences[1] <= work.tolerance
    # What does not depend on the text runs once.
    assert 0 < flops[1] < flops[0]


def test_flops_at_real_size_are_less_the_more_is_left_out():
    figures = {figure.name: figure.value for figure in generate.flops(Context("cpu"))}
    stock, whole = figures["diffusers, two rows at every step"], figures["guidance at every step"]
    assert 0.9 * stock < whole < stock
    for kind in ("", "guidance where 0.5 < σ and "):
        kept = [figures[f"{kind or 'deep activations '}kept for {count} steps"] for count in (2, 3)]
        # Of the steps between whole ones some work is left.
        assert whole / 3 < kept[1] < kept[0] < whole
