"""Matching: the official score exactly, each pair by itself, and nothing computed twice."""

from collections import Counter
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.diffusion import noise
from dsd_fast.images import ImageError
from dsd_fast.matching import official_layers
from dsd_fast.reference import matching as reference
from dsd_fast.unet import UNetProgram
from dsd_fast.unet.inductor import Inductor
from tests.images.files import refilled
from tests.tiny import FAMILIES, load_tiny_lora, tiny_pipeline

CAPTIONS = ["a red dog", "a cat", "the ball", "are you a dog"]
TIMES = [40, 500, 901]


def pictures(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (48, 40, 3), dtype=np.uint8) for _ in range(count)]


def matcher(pipe, **settings):
    return dsd.Matcher(dsd.from_pipeline(pipe), dsd.MatchConfig(**({"timesteps": TIMES} | settings)))


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def sd15():
    return tiny_pipeline("sd15")


@pytest.mark.parametrize(
    ("family", "prediction_type", "noise_weight"),
    [
        ("sd15", "epsilon", 1),
        ("sd15", "v_prediction", 1),
        ("sd21", "v_prediction", 1),
        ("sdxl", "epsilon", 1),
        # Attention alone, to which what the network predicts is nothing.
        ("sd15", "epsilon", 0),
    ],
)
@pytest.mark.newest
def test_official_score_equals_the_reference(family, prediction_type, noise_weight):
    pipe = tiny_pipeline(family, prediction_type=prediction_type)
    images = pictures(2)
    got = matcher(pipe, official=True, noise_weight=noise_weight, seed=7).score(images, CAPTIONS)
    want = reference.score(pipe, images, CAPTIONS, timesteps=TIMES, noise_weight=noise_weight, seed=7)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_official_grid_of_timesteps_and_other_sizes(sd15):
    images = pictures(1)
    got = dsd.Matcher(dsd.from_pipeline(sd15), dsd.MatchConfig(official=True)).score(images, CAPTIONS)
    torch.testing.assert_close(got, reference.score(sd15, images, CAPTIONS), rtol=0, atol=1e-4)
    assert matcher(sd15, timesteps=50).timesteps == reference.official_timesteps(50)
    odd = matcher(sd15, image_size=(52, 36)).score(images, CAPTIONS)
    assert odd.shape == (1, 4)
    assert odd.isfinite().all()


def test_default_scores_rank_texts_as_the_official_ones(pipe):
    images = pictures(3)
    default, official = (matcher(pipe, official=value).score(images, CAPTIONS) for value in (False, True))
    assert torch.equal(default.argsort(1), official.argsort(1))
    # They differ by the unconditional row's attention, one number per image.
    shift = official - default
    assert float(shift.abs().min()) > 0.1
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-4)


def scores_of_one_pair(score):
    """The same pair alone, first, last and in the middle of others, in other orders."""
    images, needle = pictures(2, seed=1), pictures(1, seed=2)[0]
    seen = []
    for place in (0, 1, 2):
        crowd = [*images[:place], needle, *images[place:]]
        seen.append(float(score(crowd, CAPTIONS)[place, 1]))
        seen.append(float(score(crowd[::-1], CAPTIONS[::-1])[2 - place, 2]))
    seen.append(float(score([needle], [CAPTIONS[1]])[0, 0]))
    return seen


def test_a_pairs_score_does_not_depend_on_what_else_is_scored(sd15):
    for settings in ({}, {"official": True}, {"memory_budget": 3_000_000}):
        seen = scores_of_one_pair(matcher(sd15, **settings).score)
        assert max(seen) - min(seen) <= 1e-5 * max(abs(x) for x in seen)


def test_the_official_batch_mean_fails_the_needle_test(sd15):
    seen = scores_of_one_pair(
        lambda images, captions: reference.score(sd15, images, captions, timesteps=TIMES, batch_mean=True)
    )
    assert max(seen) - min(seen) > 1e-3 * max(abs(x) for x in seen)


def test_micro_batches_and_groups_of_texts_do_not_change_scores(sd15):
    images = pictures(5)
    whole = matcher(sd15).score(images, CAPTIONS)
    plan = matcher(sd15)._scorer.plan
    # Room for one row and the keys of two texts, of which half the budget holds one.
    keys = plan.encode_text(torch.zeros(2, 77, 24)).nbytes
    tight = matcher(sd15, memory_budget=plan.run_bytes(1, 16, 16, 77) + keys)
    texts, budget = tight._scorer.encode_texts(CAPTIONS), tight.config.memory_budget
    groups = list(texts.groups(tight._scorer.plan, torch.arange(len(CAPTIONS) + 1), (16, 16), budget))
    assert [len(own) for own, _, _ in groups] == [1] * (len(CAPTIONS) + 1)
    torch.testing.assert_close(tight.score(images, CAPTIONS), whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
    short = matcher(sd15, memory_budget=plan.run_bytes(1, 16, 16, 77))
    with pytest.raises(ValueError, match=r"memory_budget: .* cannot hold the texts' keys"):
        short.score(images, CAPTIONS)


def test_default_settings_take_a_row_of_any_size(sd15, monkeypatch):
    want = matcher(sd15).score(pictures(2), CAPTIONS)
    monkeypatch.setattr("dsd_fast.unet.stream.CPU_BUDGET", 1000)
    got = matcher(sd15).score(pictures(2), CAPTIONS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


class Counted:
    """Rows through the parts of a pipeline while ``with`` lasts."""

    def __init__(self, pipe):
        self.rows = Counter()
        parts = {
            "shared": pipe.unet.conv_in,
            "text-dependent": pipe.unet.mid_block.resnets[0].conv1,
            "unet out": pipe.unet.conv_out,
            "keys": pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k,
            "vae": pipe.vae.encoder.conv_in,
            "text encoder": pipe.text_encoder.get_submodule("text_model.final_layer_norm")
            if hasattr(pipe.text_encoder, "text_model")
            else pipe.text_encoder.final_layer_norm,
        }
        self.handles = [
            module.register_forward_hook(lambda m, args, out, name=name: self.rows.update({name: len(args[0])}))
            for name, module in parts.items()
        ]

    def __enter__(self):
        return self.rows

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def test_each_thing_is_computed_once(sd15):
    images, steps = pictures(5), len(TIMES)
    latents, rows = 5 * steps, 5 * steps * len(CAPTIONS)
    with Counted(sd15) as seen:
        matcher(sd15).score(images, CAPTIONS)
    assert seen == {
        "shared": latents,
        "text-dependent": rows + latents,
        "unet out": rows + latents,
        "keys": len(CAPTIONS) + 1,
        "vae": 5,
        "text encoder": len(CAPTIONS) + 1,
    }
    with Counted(sd15) as seen:
        reference.score(sd15, images, CAPTIONS, timesteps=TIMES)
    assert seen["shared"] == seen["unet out"] == 2 * rows
    assert seen["vae"] == rows


@pytest.mark.parametrize("at_once", [1, 2])
def test_keys_are_made_once_whatever_the_number_of_chunks(sd15, at_once):
    m = matcher(sd15)
    m._scorer.images_at_once = at_once
    images = pictures(5)
    with Counted(sd15) as seen:
        m.score(images, CAPTIONS)
        assert seen["keys"] == len(CAPTIONS) + 1
        m.predict([(image, caption) for image in images for caption in CAPTIONS[:2]])
        assert seen["keys"] == len(CAPTIONS) + 1 + 3


def test_keys_that_do_not_fit_together_are_made_for_the_texts_a_chunk_needs(sd15):
    images = pictures(4)
    pairs = [(images[i], CAPTIONS[i]) for i in range(4)]
    want = matcher(sd15).predict(pairs)
    plan = matcher(sd15)._scorer.plan
    keys = plan.encode_text(torch.zeros(2, 77, 24)).nbytes
    tight = matcher(sd15, memory_budget=plan.run_bytes(1, 16, 16, 77) + keys)
    tight._scorer.images_at_once = 1
    with Counted(sd15) as seen:
        got = tight.predict(pairs)
    # One text and the unconditional one for each of the four chunks of one image.
    assert seen["keys"] == 8
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_without_the_noise_term_there_is_no_unconditional_row_and_the_network_stops(sd15):
    with Counted(sd15) as seen:
        matcher(sd15, noise_weight=0, layers=["mid-vit-block0-cross"]).score(pictures(2), CAPTIONS)
    assert seen["text-dependent"] == 2 * len(TIMES) * len(CAPTIONS)
    assert seen["unet out"] == 0
    assert seen["text encoder"] == len(CAPTIONS)


def test_without_the_attention_term_no_layer_scores(sd15):
    noise_only = matcher(sd15, attention_weight=0)
    assert noise_only.layers == {}
    want = reference.score(sd15, pictures(2), CAPTIONS, timesteps=TIMES, attention_weight=0)
    torch.testing.assert_close(noise_only.score(pictures(2), CAPTIONS), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("noise_weight", [0.3, 2.0])
def test_weights_of_the_two_terms(sd15, noise_weight):
    want = reference.score(
        sd15, pictures(1), CAPTIONS, timesteps=TIMES, attention_weight=0.25, noise_weight=noise_weight
    )
    got = matcher(sd15, attention_weight=0.5, noise_weight=noise_weight).score(pictures(1), CAPTIONS)
    # The reference's attention term is twice its weight times the mean over the text's row and the unconditional one.
    got, want = got - got[:, :1], want - want[:, :1]
    other = reference.score(sd15, pictures(1), CAPTIONS, timesteps=TIMES, attention_weight=0.25, noise_weight=0)
    torch.testing.assert_close(got, want + other - other[:, :1], rtol=0, atol=1e-4)


def attention_alone(pipe, image, caption, t, seed, weights, *, mask=None, pool="mean"):
    """Σ over layers and heads of weight · score, one timestep, one pair, through the program."""
    model = dsd.from_pipeline(pipe)
    program = UNetProgram(model.unet)
    plan = program.plan(scores=list(weights), pool=pool)
    with torch.no_grad():
        pixels = dsd.images.load_batch([image], model.image_size)
        z = model.encode_images(pixels)
        z = model.schedule.add_noise(z, noise(seed, 0, z.shape[1:]), t)
        encoded = model.encode_prompts([caption])
        if mask is not None:
            mask = torch.arange(77)[None] < encoded.lengths[:, None]
        out = plan.run(z, t, plan.encode_text(encoded.states, score_mask=mask))
    return sum(float((out.scores[name][0] * torch.as_tensor(w)).sum()) for name, w in weights.items())


@pytest.mark.parametrize(
    ("settings", "weights", "options"),
    [
        ({"layers": ["mid-vit-block0-cross"]}, {"mid-vit-block0-cross": [0.25] * 4}, {}),
        (
            {"layers": {"mid-vit-block0-cross": 2.0, "up-level1-repeat0-vit-block0-cross": [1.0, 0.0, -1.0, 0.5]}},
            {"mid-vit-block0-cross": [0.5] * 4, "up-level1-repeat0-vit-block0-cross": [1.0, 0.0, -1.0, 0.5]},
            {},
        ),
        ({"layers": ["mid-vit-block0-cross"], "tokens": "real"}, {"mid-vit-block0-cross": [0.25] * 4}, {"mask": True}),
        ({"layers": ["mid-vit-block0-cross"], "pool": "max"}, {"mid-vit-block0-cross": [0.25] * 4}, {"pool": "max"}),
        ({"layers": ["mid-vit-block0-cross"], "pool": 0.1}, {"mid-vit-block0-cross": [0.25] * 4}, {"pool": 0.1}),
    ],
    ids=["one layer", "weights", "real tokens", "max", "temperature"],
)
def test_layers_weights_tokens_and_pooling(sd15, settings, weights, options):
    image = pictures(1)[0]
    got = matcher(sd15, timesteps=[300], noise_weight=0, attention_weight=3.0, seed=4, **settings)
    want = [3.0 * attention_alone(sd15, image, caption, 300, 4, weights, **options) for caption in CAPTIONS]
    torch.testing.assert_close(got.score([image], CAPTIONS)[0], torch.tensor(want), rtol=1e-5, atol=1e-5)


def test_draws_and_timesteps_average(sd15):
    images = pictures(2)
    parts = []
    for k, t in enumerate([100, 100, 700, 700]):
        one = noise(9, k, (4, 16, 16))[None]
        parts.append(reference.score(sd15, images, CAPTIONS, timesteps=[t], noise=one))
    got = matcher(sd15, timesteps=[100, 700], draws=2, seed=9)
    assert got.timesteps == [100, 100, 700, 700]
    official = got.score(images, CAPTIONS)
    want = torch.stack(parts).mean(0)
    torch.testing.assert_close(official - official[:, :1], want - want[:, :1], rtol=0, atol=1e-4)


def test_seeds_give_each_image_its_own_noise(sd15):
    images = pictures(3)
    seeded = matcher(sd15).score(images, CAPTIONS, seeds=[5, 6, 5])
    for row, seed in enumerate([5, 6, 5]):
        alone = matcher(sd15, seed=seed).score([images[row]], CAPTIONS)[0]
        torch.testing.assert_close(seeded[row], alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="seeds: got 2, expected one per image"):
        matcher(sd15).score(images, CAPTIONS, seeds=[1, 2])


def test_predict_is_the_entries_of_score_and_encodes_each_part_once(sd15):
    images = pictures(3)
    pairs = [(images[i], CAPTIONS[j]) for i, j in [(2, 1), (0, 0), (2, 3), (2, 1), (1, 0)]]
    scores = matcher(sd15).score(images, CAPTIONS)
    with Counted(sd15) as seen:
        got = matcher(sd15).predict(pairs)
    want = torch.stack([scores[i, j] for i, j in [(2, 1), (0, 0), (2, 3), (2, 1), (1, 0)]])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert seen["vae"] == 3
    assert seen["text encoder"] == 3 + 1
    assert matcher(sd15).predict([]).shape == (0,)


@pytest.mark.parametrize("kind", ["array", "tensor", "pillow"])
def test_a_buffer_may_be_filled_again(sd15, kind):
    images, m = pictures(4), matcher(sd15)
    want = m.score(images, CAPTIONS)
    torch.testing.assert_close(m.score(refilled(kind, images), CAPTIONS), want, rtol=0, atol=1e-5)
    assert m.rank(text=CAPTIONS[0], images=refilled(kind, images)) == m.rank(text=CAPTIONS[0], images=images)
    # Each image twice: the second time it is no other one.
    pairs = ((image, CAPTIONS[n % 4]) for n, image in enumerate(refilled(kind, [*images, *images])))
    with Counted(sd15) as seen:
        got = m.predict(pairs)
    torch.testing.assert_close(got, want.diagonal().repeat(2), rtol=0, atol=1e-5)
    assert seen["vae"] == 4


def test_rank_both_ways(sd15):
    images, m = pictures(4), matcher(sd15)
    scores = m.score(images, CAPTIONS)
    ranked = m.rank(image=images[1], texts=CAPTIONS)
    assert [entry["corpus_id"] for entry in ranked] == scores[1].argsort(descending=True).tolist()
    assert ranked[0]["score"] == pytest.approx(float(scores[1].max()), abs=1e-5)
    ranked = m.rank(text=CAPTIONS[2], images=images, top_k=2)
    assert [entry["corpus_id"] for entry in ranked] == scores[:, 2].argsort(descending=True).tolist()[:2]
    with pytest.raises(ValueError, match="rank: give image= and texts="):
        m.rank(image=images[0], images=images)
    with pytest.raises(ValueError, match="top_k: got 0"):
        m.rank(text="a", images=images, top_k=0)


def test_a_bad_image_is_given_back_or_raised(sd15, tmp_path):
    images = [pictures(1)[0], tmp_path / "missing.png", pictures(1, seed=3)[0]]
    found = dict(matcher(sd15).score_iter(images, CAPTIONS))
    assert isinstance(found[1], ImageError)
    want = matcher(sd15).score([images[0], images[2]], CAPTIONS)
    torch.testing.assert_close(torch.stack([found[0], found[2]]), want, rtol=0, atol=1e-5)
    with pytest.raises(ImageError, match="missing"):
        matcher(sd15).score(images, CAPTIONS)
    # Nothing is scored in vain beside it.
    with Counted(sd15) as seen, pytest.raises(ImageError, match="missing"):
        matcher(sd15).predict([(image, "a") for image in images])
    assert seen["shared"] == 0
    assert [type(x) for _, x in matcher(sd15).score_iter(images[1:2], CAPTIONS)] == [ImageError]


def test_images_are_read_only_as_far_as_they_are_needed(sd15):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield pictures(1)[0]

    m = matcher(sd15, timesteps=[5])
    m._scorer.images_at_once = 4
    stream = m.score_iter(endless(), ["a"])
    next(stream)
    assert len(taken) < 40


def test_an_adapter_belongs_to_its_matcher(tmp_path):
    """In the UNet and in the text encoder, whichever is active on the pipeline."""
    pipe = tiny_pipeline("sd15")
    images = pictures(1)
    want = {(): reference.score(pipe, images, CAPTIONS, timesteps=TIMES)}
    for name, seed in (("a", 1), ("b", 2)):
        load_tiny_lora(pipe, "sd15", tmp_path / name, seed=seed, adapter_name=name)
        pipe.set_adapters(name)
        want[name] = reference.score(pipe, images, CAPTIONS, timesteps=TIMES)
    assert float((want["a"] - want["b"]).abs().max()) > 1e-3
    model, config = dsd.from_pipeline(pipe), dsd.MatchConfig(timesteps=TIMES, official=True)
    matchers = {name: dsd.Matcher(model, config, adapter=name) for name in want}
    for active in ("a", "b"):
        pipe.set_adapters(active, 0.5)
        for name, m in matchers.items():
            torch.testing.assert_close(m.score(images, CAPTIONS), want[name], rtol=0, atol=1e-4)
    # As it goes to another process.
    again = ForkingPickler.loads(ForkingPickler.dumps(matchers["a"]))
    torch.testing.assert_close(again.score(images, CAPTIONS), want["a"], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="adapter: the model has no adapter 'c'; it has a, b"):
        dsd.Matcher(model, config, adapter="c")


def test_without_an_adapter_named_each_call_takes_what_is_active(tmp_path):
    pipe = tiny_pipeline("sd15")
    for name, seed in (("a", 1), ("b", 2)):
        load_tiny_lora(pipe, "sd15", tmp_path / name, seed=seed, adapter_name=name)
    m = matcher(pipe, official=True)
    for active in ("a", "b"):
        pipe.set_adapters(active)
        want = reference.score(pipe, pictures(1), CAPTIONS, timesteps=TIMES)
        torch.testing.assert_close(m.score(pictures(1), CAPTIONS), want, rtol=0, atol=1e-4)


def test_parts_of_different_types():
    pipe = tiny_pipeline("sd15")
    want = matcher(pipe).score(pictures(1), CAPTIONS)
    pipe.unet.double()
    torch.testing.assert_close(matcher(pipe).score(pictures(1), CAPTIONS), want, rtol=0, atol=1e-4)


def test_an_overflow_ranks_last(sd15, monkeypatch):
    m = matcher(sd15)
    monkeypatch.setattr(m, "score", lambda images, texts: torch.tensor([[0.5, float("nan"), 2.0]]))
    assert [entry["corpus_id"] for entry in m.rank(image=pictures(1)[0], texts=["a", "b", "c"])] == [2, 0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": [1000]}, "timesteps"),
        ({"timesteps": 0}, "timesteps"),
        ({"timesteps": []}, "timesteps"),
        ({"layers": "some"}, "layers: got 'some'"),
        ({"layers": []}, "layers: got none"),
        ({"layers": ["mid-vit-block1-cross"]}, "unknown id 'mid-vit-block1-cross'.*mid-vit-block0-cross"),
        ({"layers": {"mid-vit-block0-cross": [1.0, 2.0]}}, "layers: 'mid-vit-block0-cross' has 4 heads, got"),
        ({"attention_weight": 0, "noise_weight": 0}, "nothing to score with"),
        ({"noise_weight": float("nan")}, "noise_weight: got nan"),
        ({"draws": 0}, "draws: got 0"),
        ({"tokens": "some"}, "tokens: got 'some'"),
        ({"pool": 0.0}, "pool: got 0.0"),
        ({"official": True, "tokens": "real"}, "official: the official score has tokens='all', got 'real'"),
        ({"official": True, "noise_weight": 2}, "official: the official score has noise_weight 0 or 1"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed: got 4294967296"),
        ({"draws": 1.5}, "draws: got 1.5"),
        ({"memory_budget": 3e6}, "memory_budget: got 3000000.0"),
        ({"image_size": 64}, "image_size: got 64"),
        ({"image_size": (50, 48)}, "image_size"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_settings_are_named(sd15, settings, message):
    with pytest.raises(ValueError, match=message):
        matcher(sd15, **settings)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("a dog", "captions: expected a sequence of strings"),
        ([], "captions: got none"),
        ([1], "captions"),
        (["dog " * 80], "prompts"),
    ],
)
def test_bad_captions_are_named(sd15, captions, message):
    with pytest.raises(ValueError, match=message):
        matcher(sd15).score(pictures(1), captions)


def test_paths_as_strings_are_refused(sd15):
    with pytest.raises(ValueError, match="images"):
        matcher(sd15).score("picture.png", CAPTIONS)
    with pytest.raises(ValueError, match="images: got one ndarray"):
        matcher(sd15).score(pictures(1)[0], CAPTIONS)
    with pytest.raises(ImageError, match="pathlib"):
        matcher(sd15).score(["picture.png"], CAPTIONS)


def test_all_layers_are_every_cross_attention(sd15):
    ids = UNetProgram(sd15.unet).score_ids
    named, listed = (matcher(sd15, noise_weight=0, layers=layers) for layers in ("all", list(ids)))
    assert named.layers.keys() == set(ids)
    assert torch.equal(named.score(pictures(2), CAPTIONS), listed.score(pictures(2), CAPTIONS))


def test_official_layers_of_every_family():
    counts = {family: len(official_layers(UNetProgram(tiny_pipeline(family).unet))) for family in FAMILIES}
    assert counts == {"sd15": 6, "sd21": 6, "sdxl": 6}


def test_compiled_scores_are_the_same(sd15):
    images = pictures(2)
    plain = matcher(sd15)
    compiled = matcher(sd15)
    # Traced as ever, but no code is generated.
    compiled._scorer.program.inductor = Inductor("eager")
    assert compiled.compile("inductor") is compiled
    torch.testing.assert_close(compiled.score(images, CAPTIONS), plain.score(images, CAPTIONS), rtol=0, atol=1e-4)
    assert compiled._scorer.plan.runtime == "inductor"
    with pytest.raises(ValueError, match="runtime: got 'fast'"):
        compiled.compile("fast")
    with pytest.raises(ValueError, match="'cudagraph' needs a network on a CUDA device"):
        compiled.compile("cudagraph")
