import numpy as np
import pytest
import torch

import dsd_fast as dsd
from benchmarks.suites import image_prompts
from benchmarks.suites.image_prompts import DOMAINS
from benchmarks.suites.mini_card import judge
from benchmarks.suites.mini_card.judge import Seen
from dsd_fast.bench.case import Context
from dsd_fast.image_prompt import TuneConfig
from dsd_fast.models.mini.scenes import EVAL_SEED, HELD_OUT


@pytest.fixture(scope="module")
def context():
    """Of an untrained judge."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = judge._Judge().eval()
    context, model = Context(), dsd.load("mini")
    context.shared("mini, float32", lambda: model)
    context.shared("judge", lambda: network)
    return context


def test_what_a_picture_keeps_of_a_reference():
    references = DOMAINS["scenes"](2, EVAL_SEED)
    first, second = references.attributes
    assert references.captions[0] == f"a {first['size']} {first['colour']} {first['shape']}"
    other = next(size for size in ("small", "large") if size != second["size"])
    found = [
        Seen({first["colour"]: (first["shape"], first["size"])}, {}, None),
        Seen({second["colour"]: (second["shape"], other)}, {}, None),
    ]
    assert references.kept(found).tolist() == [[True, True, True], [True, True, False]]
    two = Seen({"red": ("ring", "small"), "blue": ("ring", "small")}, {}, None)
    assert not references.kept([two, Seen({}, {}, None)]).any()
    assert references.rolled().captions == references.captions[::-1]


def test_domains_are_apart():
    assert not any((x["colour"], x["shape"]) in HELD_OUT for x in DOMAINS["scenes"](20, EVAL_SEED).attributes)
    assert all((x["colour"], x["shape"]) in HELD_OUT for x in DOMAINS["held-out pairs"](20, EVAL_SEED).attributes)
    digits = DOMAINS["digits"]
    shown, asked = digits(4, image_prompts.TUNE_SEED), digits(4, EVAL_SEED)
    assert not any(np.array_equal(a, b) for a in shown.images for b in asked.images)
    assert digits(1, EVAL_SEED).kept([Seen({}, {}, digits(1, EVAL_SEED).attributes[0]["digit"])]).all()


def test_the_way_is_what_is_reached_between_least_and_most():
    right, most, least = (np.arange(20)[:, None] < count for count in (14, 18, 6))
    figure = image_prompts._way("scenes", "ridge", right, most, least)
    assert figure.value == pytest.approx((14 - 6) / (18 - 6))
    assert figure.low < figure.value < figure.high


def test_cases_make_the_figures_of_their_tables(context, monkeypatch):
    monkeypatch.setattr(image_prompts, "N", 200)
    monkeypatch.setattr(image_prompts, "STEPS", 2)
    few = TuneConfig(steps=1, batch_size=1, prompt_tokens=0)
    figures = [
        *image_prompts.kept("digits", context, n=3),
        *image_prompts.tuned("scenes", context, n=3, shown=12, config=few),
        *image_prompts.customized(context, n=2, scenes=2, config=few),
        *image_prompts.edited(context, n=2),
        *image_prompts.matched(context, n=8),
    ]
    names = [each.name for each in figures]
    assert len(set(names)) == len(names)
    assert {
        "digits, truncated: of the way",
        "digits, linear probe of CLIP's vector, of 600 pictures: attributes",
    } <= set(names)
    assert {"scenes, tuned: of what was left", "one picture, tuned: more than before"} <= set(names)
    assert {"image prompts: all", "CLIP's cosine of images: shape"} <= set(names)
