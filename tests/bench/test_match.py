"""The suite `match`, small: every rung gives the reference's scores with the rows and FLOPs that it claims."""

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.bench import Case, Context, Quality
from dsd_fast.bench.measure import count_flops
from dsd_fast.bench.suites import match, match_rungs
from dsd_fast.bench.suites.shared import middles, mini, rivals
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from dsd_fast.models.processor import units
from dsd_fast.reference import matching as reference


@pytest.fixture(scope="module")
def context():
    return Context()


@pytest.fixture(scope="module")
def job(context):
    return match._job(context, 2, 3, 2)


@pytest.fixture(scope="module")
def right(job):
    """The reference's scores, and how they spread."""
    scores = reference.score(job.pipe, job.images, job.captions, timesteps=2)
    assert scores.std() > 100 * match.SCORE_TOLERANCE
    return scores


RUNGS = [
    ("pair by pair", 24, 2),
    ("VAE once per image", 24, 2),
    ("text encoder once per caption", 24, 2),
    ("captions in one batch", 24, 6),
    ("unconditional row once", 16, 4),
    ("the same rows by the plan", 16, 4),
    ("text keys and values once", 16, 4),
    ("text-free layers once", 16, 4),
    ("Matcher", 16, 16),
]


def test_the_ladders_rungs(job):
    found = [(side.name, side.sizes["rows"], side.batch) for side in match_rungs.ladder(job)]
    assert found == RUNGS
    for side in match_rungs.ladder(job):
        assert {"images": 2, "captions": 3, "timesteps": 2}.items() <= side.sizes.items()


@pytest.mark.parametrize("place", range(len(RUNGS)), ids=[name for name, _, _ in RUNGS])
def test_a_rung_gives_the_references_scores_by_the_rows_that_it_claims(job, right, place, monkeypatch):
    side = match_rungs.ladder(job)[place]
    batches = []
    monkeypatch.setattr(torch.nn.Conv2d, "forward", counted(job.model.unet.conv_out, batches))
    scores = side.run()
    assert scores.shape == (2, 3)
    assert match._difference(scores, right) <= match.SCORE_TOLERANCE
    assert (sum(batches), max(batches)) == (side.sizes["rows"], side.batch)


def counted(module, batches):
    """The class's forward, which notes the batches of one module: the last convolution sees each row once."""
    forward = torch.nn.Conv2d.forward

    def run(self, sample):
        if self is module:
            batches.append(len(sample))
        return forward(self, sample)

    return run


def test_each_saving_saves_flops(job):
    flops = [count_flops(side.run)[1] for side in match_rungs.ladder(job)]
    vae_once, text_once, batched, free_once, planned_rows, keys_once, prefix_once, matcher = flops[1:]
    assert flops[0] > vae_once > text_once == batched > free_once == planned_rows > keys_once > prefix_once == matcher
    # Of the last: the plan's own count for 4 noised latents, 4 texts and 16 rows, beside the VAE and the text encoder.
    size = {"height": 16, "width": 16, "tokens": job.pipe.tokenizer.model_max_length}
    planned = job.plan.flops(latents=4, texts=4, rows=16, **size)
    others = count_flops(lambda: (match_rungs._clean(job), match_rungs._texts(job)))[1]
    assert prefix_once == planned + others


@pytest.mark.parametrize("sections", [("down", "mid", "up"), ("mid",)])
def test_stopping_early_gives_the_references_attention_term(context, monkeypatch, sections):
    monkeypatch.setattr(match, "_job", lambda context, *sizes: job)
    job = match.Job(mini(context), *pictures(1, 2), 2)
    work = match._stop_early(sections, context)
    wanted = work.oracle()
    if len(sections) == 3:
        whole = reference.score(job.pipe, job.images, job.captions, timesteps=2, noise_weight=0)
        torch.testing.assert_close(wanted, whole, rtol=1e-6, atol=1e-6)
    (full, full_flops), (short, short_flops) = (count_flops(side.run) for side in work.sides)
    for scores in (full, short):
        assert work.difference(scores, wanted) <= match.SCORE_TOLERANCE
    assert short_flops < (0.8 if len(sections) == 3 else 0.5) * full_flops


def pictures(images, captions):
    scenes = [scene(EVAL_SEED + i) for i in range(max(images, captions))]
    return [each.image for each in scenes[:images]], [each.caption for each in scenes[:captions]]


@pytest.mark.parametrize("one_latent", [False, True])
def test_a_call_of_the_network(context, one_latent):
    work = match._latency(3, one_latent, context)
    stock, ours = (side.run() for side in work.sides)
    assert stock.shape == (3, 4, 16, 16)
    assert work.difference(ours, stock) <= match.PREDICTION_TOLERANCE
    # Rows of one latent differ by their texts, others by their latents too.
    assert work.difference(stock[:1], stock[1:2]) > 1e-3
    assert [side.batch for side in work.sides] == [3, 3]


@pytest.mark.parametrize("held_out", [False, True])
def test_quality_is_how_often_the_reference_puts_the_true_caption_first(context, monkeypatch, held_out):
    monkeypatch.setattr(match, "SCENES", 6)
    monkeypatch.setattr(match, "_SCENES_AT_ONCE", 4)
    (figure,) = match._quality("some scenes", 2, held_out, context)
    pipe, right = dsd.load("mini").to_pipeline(), 0
    for i in range(6):
        drawn = scene(EVAL_SEED + i, held_out=held_out)
        scores = reference.score(pipe, [drawn.image], [drawn.caption, *rivals(drawn).values()], timesteps=[250, 750])[0]
        right += int(scores.argmax() == 0)
    assert (figure.name, figure.n, figure.value) == ("some scenes, T = 2", 6, right / 6)
    assert figure.seconds > 0
    assert figure.sizes == {"timesteps": 2}


def test_types_are_compared_on_the_same_call(context):
    work = match._rows_types(2, context)
    by = " and ".join(units(torch.bfloat16))
    assert [(side.name, side.dtype) for side in work.sides] == [
        ("plan, keys made anew, float32", "float32"),
        ("plan, keys made anew, bfloat16" + (f" by {by}" if by else ""), "bfloat16"),
    ]
    right, result = (side.run() for side in work.sides)
    assert (right.dtype, result.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(right, match._latency(2, False, context).sides[1].run(), rtol=0, atol=0)
    # Half a place of bfloat16 is 2e-3 of a value: more is the network's, less would be another type's.
    assert 1e-3 < work.difference(result, right) <= work.tolerance


def test_scores_of_types_are_compared(context, monkeypatch):
    job = match._job
    monkeypatch.setattr(match, "_job", lambda context, images, captions, *rest: job(context, 2, 3, *rest))
    work = match._matcher_types(context)
    right, result = (side.run() for side in work.sides)
    wanted = dsd.Matcher(mini(context), dsd.MatchConfig(timesteps=4, official=True)).score(*pictures(2, 3))
    assert torch.equal(right, wanted)
    assert 1e-3 < work.difference(result, right) <= work.tolerance
    assert [side.dtype for side in work.sides] == ["float32", "bfloat16"]


def test_quality_in_two_types(context, monkeypatch):
    monkeypatch.setattr(match, "SCENES", 6)
    figures = match._quality_types(context)
    first = []
    for dtype in ("float32", "bfloat16"):
        matcher = dsd.Matcher(mini(context, dtype), dsd.MatchConfig(timesteps=[250, 750]))
        drawn = [scene(EVAL_SEED + i) for i in range(6)]
        first.append([int(matcher.score([s.image], [s.caption, *rivals(s).values()]).argmax()) for s in drawn])
    wanted = [*(places.count(0) / 6 for places in first), sum(map(int.__eq__, *first)) / 6]
    assert [figure.value for figure in figures] == wanted
    assert [figure.name for figure in figures] == [
        "new scenes, float32", "new scenes, bfloat16", "new scenes, the same answer in both",
    ]  # fmt: skip


def test_the_suite_has_what_it_promises():
    cases = {case.name: case for case in match.suite.cases}
    assert {"headline", "headline-batched", "waterfall"} <= cases.keys()
    assert [name for name in cases if name.startswith("rows/")] == [f"rows/{2**k}" for k in range(7)]
    assert [name for name in cases if name.startswith("texts/")] == [f"texts/{2**k}" for k in range(7)]
    counts = [int(name.rpartition("/")[2]) for name in cases if name.startswith("quality/new-scenes/")]
    assert counts == [1, 2, 4, 8, 16]
    assert match.SCENES >= 1000
    # From 6 repeats on the interval of a ratio covers 95 %.
    assert all(case.repeats >= 6 for case in cases.values() if isinstance(case, Case))
    assert all(isinstance(case, Quality) == ("quality" in name.split("/")) for name, case in cases.items())


def test_middles_are_those_of_equal_parts():
    assert middles(1) == [500]
    assert middles(4) == [125, 375, 625, 875]
    assert middles(3, 12) == [2, 6, 10]
