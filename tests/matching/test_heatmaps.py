"""Heat maps: equal to attention written out by diffusers, a map per word, and pointing at objects."""

import inspect
import math

import numpy as np
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.images import ImageError
from dsd_fast.matching import official_layers
from dsd_fast.matching.heatmaps import map_layers
from dsd_fast.matching.localisation import object_words, pointing, pointing_game
from dsd_fast.matching.words import positions, words
from dsd_fast.models.mini.scenes import EVAL_SEED, Scene, SceneObject, scene
from dsd_fast.models.offsets import token_offsets
from dsd_fast.reference import matching as reference
from dsd_fast.unet import UNetProgram
from tests.matching.test_matcher import Counted, matcher, pictures
from tests.tiny import FAMILIES, load_tiny_lora, tiny_pipeline

TIMES = [40, 500, 901]
CAPTION = "A  cat's red-hot DOG, are you a dog? café"
WORDS = ["A", "cat's", "red-hot", "DOG", "are", "you", "a", "dog", "café"]


def close(found, wanted, relative=1e-5):
    """Equal words and places, and maps equal to a share of the largest value."""
    assert [(word, span) for word, span, _ in found] == [(word, span) for word, span, _ in wanted]
    for (_, _, ours), (_, _, theirs) in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert float(np.abs(ours - theirs).max()) <= relative * float(theirs.max())


@pytest.mark.parametrize("layers", ["up-finest", "all"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.newest
def test_maps_equal_those_of_stock_attention_processors(family, layers):
    pipe, image = tiny_pipeline(family), pictures(1)[0]
    found = matcher(pipe, seed=7).heatmap(image, CAPTION, layers=layers)
    assert [word for word, _, _ in found] == WORDS
    assert all(CAPTION[slice(*span)] == word for word, span, _ in found)
    size = dsd.from_pipeline(pipe).image_size
    for _, _, values in found:
        assert values.shape == size
        assert values.dtype == np.float32
        assert 0 <= float(values.min()) < float(values.max()) <= 1
    close(found, reference.heatmap(pipe, image, CAPTION, layers=layers, timesteps=TIMES, seed=7))


def test_maps_of_the_mini_model_equal_the_references():
    model, drawn = dsd.load("mini"), scene(EVAL_SEED + 3)
    for layers in ("up-finest", "all"):
        found = dsd.Matcher(model, dsd.MatchConfig(timesteps=5)).heatmap(drawn.image, drawn.caption, layers=layers)
        close(found, reference.heatmap(model.to_pipeline(), drawn.image, drawn.caption, layers=layers, timesteps=5))


def test_spans_layers_and_other_sizes_equal_the_references():
    pipe, image = tiny_pipeline("sd15"), pictures(1)[0]
    spans = ["dog", "RED-hot dog", (3, 8)]
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    found = matcher(pipe).heatmap(image, CAPTION, spans=spans, layers=["mid-vit-block0-cross"])
    assert [span for _, span, _ in found] == [(17, 20), (32, 35), (9, 20), (3, 8)]
    close(found, reference.heatmap(pipe, image, CAPTION, spans=spans, layers=[path], timesteps=TIMES))
    odd = matcher(pipe, image_size=(52, 36))
    latent = odd._scorer.engine.encode_images([dsd.images.to_tensor(dsd.images.load_image(image), (52, 36))])
    found = odd.heatmap(image, CAPTION, layers="all")
    assert found[0][2].shape == (52, 36)
    close(found, reference.heatmap(pipe, image, CAPTION, layers="all", timesteps=TIMES, latents=latent))


def test_a_span_is_the_mean_over_its_tokens_and_repeated_words_differ():
    m, image = matcher(tiny_pipeline("sd21")), pictures(1)[0]
    by_word = {span: values for _, span, values in m.heatmap(image, "a dog, a red dog")}
    assert list(by_word) == [(0, 1), (2, 5), (7, 8), (9, 12), (13, 16)]
    for first, second in (((0, 1), (7, 8)), ((2, 5), (13, 16))):
        assert float(np.abs(by_word[first] - by_word[second]).max()) > 1e-4
    (_, _, phrase), (_, _, comma) = m.heatmap(image, "a dog, a red dog", spans=["red dog", (5, 6)])
    # "red" and "dog" are a token each in the tiny vocabulary.
    np.testing.assert_allclose(phrase, (by_word[9, 12] + by_word[13, 16]) / 2, rtol=1e-5)
    assert float(comma.max()) > 0


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_all_tokens_of_a_pixel_sum_to_one(family):
    pipe, image = tiny_pipeline(family), pictures(1)[0]
    m = matcher(pipe)
    from dsd_fast.matching import heatmaps

    states = m._scorer.encode_texts([CAPTION], unconditional=False)
    latent = m._scorer.engine.encode_images([dsd.images.to_tensor(dsd.images.load_image(image), m._scorer.engine.size)])
    every = heatmaps._token_maps(m._scorer, latent, states, range(77), "all")
    torch.testing.assert_close(every.sum(0), torch.ones(m._scorer.engine.size), rtol=1e-5, atol=0)


def test_the_memory_budget_and_the_draws_count():
    pipe, image = tiny_pipeline("sd15"), pictures(1)[0]
    whole = matcher(pipe).heatmap(image, CAPTION, layers="all")
    plan = UNetProgram(pipe.unet).plan(maps=UNetProgram(pipe.unet).score_ids)
    keys = plan.encode_text(torch.zeros(1, 77, 24)).nbytes
    least = plan.run_bytes(1, 16, 16, 77, map_tokens=30) + keys
    seen = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    close(matcher(pipe, memory_budget=least).heatmap(image, CAPTION, layers="all"), whole)
    handle.remove()
    assert seen == [1, 1, 1]
    with pytest.raises(ValueError, match="memory_budget"):
        matcher(pipe, memory_budget=keys).heatmap(image, CAPTION)
    drawn = matcher(pipe, timesteps=[500], draws=2).heatmap(image, "a dog")
    noise = torch.stack([dsd.diffusion.noise(0, k, (4, 16, 16)) for k in range(2)])
    close(drawn, reference.heatmap(pipe, image, "a dog", timesteps=[500, 500], noise=noise))


def test_the_network_stops_after_the_last_layer_and_runs_no_unconditional_row():
    pipe, rows = tiny_pipeline("sd15"), []
    pipe.unet.mid_block.resnets[0].conv1.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    pipe.unet.conv_out.register_forward_hook(lambda m, args, out: rows.append("out"))
    matcher(pipe).heatmap(pictures(1)[0], CAPTION)
    assert rows == [len(TIMES)]


def test_captions_share_the_images_latent_and_need_no_unconditional_text():
    pipe, image = tiny_pipeline("sd15"), pictures(1)[0]
    m, captions = matcher(pipe), ["a dog", "the ball", "?!"]
    with Counted(pipe) as seen:
        found = m.heatmaps(image, captions)
    # Nothing is computed for the caption without words.
    assert (seen["vae"], seen["text encoder"], seen["shared"]) == (1, 2, 2 * len(TIMES))
    assert found[2] == []
    for own, caption in zip(found, captions, strict=True):
        # Without the counting hooks norms are the compiled library's, which rounds elsewhere.
        close(own, m.heatmap(image, caption), relative=1e-6)
    assert m.heatmaps(image, []) == []
    with pytest.raises(ValueError, match="captions: expected a sequence of strings"):
        m.heatmaps(image, "a dog")


def test_what_refuses_maps_is_found_before_there_is_an_image(monkeypatch):
    pipe, image = tiny_pipeline("sd15"), pictures(1)[0]
    program = UNetProgram(pipe.unet)
    plan = program.plan(maps=map_layers(program, "up-finest"))
    offsets = token_offsets([pipe.tokenizer], CAPTION, 77)
    count = len({token for span in words(CAPTION) for token in positions(span, offsets)})
    least = plan.run_bytes(1, 16, 16, 77, map_tokens=count) + plan.encode_text(torch.zeros(1, 77, 24)).nbytes
    captions, enough, tight = ["?!", CAPTION, "a dog"], matcher(pipe, memory_budget=least), least - 1
    with Counted(pipe) as seen:
        enough.check_heatmaps(captions)
        matcher(pipe, memory_budget=tight).check_heatmaps(["?!", "a dog"])
        with pytest.raises(ValueError, match=f"memory_budget: {tight:,} bytes cannot hold"):
            matcher(pipe, memory_budget=tight).check_heatmaps(captions)
    assert seen["vae"] == seen["shared"] == 0
    # The same bound as that of the maps themselves.
    assert len(enough.heatmap(image, CAPTION)) == len(WORDS)
    with pytest.raises(ValueError, match=f"memory_budget: {tight:,} bytes cannot hold"):
        matcher(pipe, memory_budget=tight).heatmap(image, CAPTION)
    m = matcher(pipe)
    m.check_heatmaps([])
    for given, layers, message in (
        (["a", "dog " * 80], "all", "prompts"),
        (["a"], "finest", "layers: got 'finest'"),
        ("a", "all", "captions: expected a sequence of strings"),
    ):
        with pytest.raises(ValueError, match=message):
            m.check_heatmaps(given, layers=layers)
    monkeypatch.setattr(type(pipe.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="does not tell which characters a token stands for"):
        m.check_heatmaps(["a"])


def test_an_adapter_belongs_to_its_matcher(tmp_path):
    pipe, image = tiny_pipeline("sd15"), pictures(1)[0]
    plain = reference.heatmap(pipe, image, CAPTION, timesteps=TIMES)
    load_tiny_lora(pipe, "sd15", tmp_path, adapter_name="a")
    adapted = reference.heatmap(pipe, image, CAPTION, timesteps=TIMES)
    assert max(float(np.abs(x[2] - y[2]).max()) for x, y in zip(plain, adapted, strict=True)) > 1e-4
    model, config = dsd.from_pipeline(pipe), dsd.MatchConfig(timesteps=TIMES)
    close(dsd.Matcher(model, config, adapter=()).heatmap(image, CAPTION), plain)
    pipe.disable_lora()
    close(dsd.Matcher(model, config, adapter="a").heatmap(image, CAPTION), adapted)


def test_layers_by_name():
    program = UNetProgram(tiny_pipeline("sdxl").unet)
    assert map_layers(program, "all") == list(program.score_ids)
    finest = map_layers(program, "up-finest")
    assert finest == [name for name in program.score_ids if name.startswith("up-level1-")]
    assert len(finest) == 6
    assert map_layers(program, official_layers(program)) == official_layers(program)


def test_captions_without_words_and_bad_arguments():
    m, image = matcher(tiny_pipeline("sd15")), pictures(1)[0]
    assert m.heatmap(image, "") == m.heatmap(image, " ?! ") == []
    for arguments, message in (
        ({"caption": ["a"]}, "caption: got list, expected a string"),
        ({"caption": "dog " * 80}, "prompts"),
        ({"spans": ["cat"]}, "spans: 'cat' is not in the caption 'a dog'"),
        ({"spans": [(1, 2)]}, r"spans: the characters ' ' at \(1, 2\) have no tokens"),
        ({"layers": "finest"}, "layers: got 'finest', expected 'up-finest', 'all'"),
        ({"layers": []}, r"layers: got \[\]"),
        ({"layers": ["mid"]}, "unknown id 'mid'"),
    ):
        with pytest.raises(ValueError, match=message):
            m.heatmap(image, **{"caption": "a dog", **arguments})
    with pytest.raises(ImageError, match="pathlib"):
        m.heatmap("picture.png", "a dog")


def toy_scene(caption, *objects):
    made = []
    for colour, shape, corner in objects:
        mask = np.zeros((64, 64), bool)
        mask[corner : corner + 8, corner : corner + 16] = True
        made.append(SceneObject(colour, shape, "small", mask, (0, 0, 1, 1), {}, False))
    return Scene(0, np.zeros((64, 64, 3), np.uint8), caption, tuple(made), None)


def peak(y, x):
    values = np.zeros((64, 64), np.float32)
    values[y, x] = 1
    return values


def test_pointing_counts_maxima_inside_masks():
    drawn = toy_scene("a red ring left of a blue cross", ("red", "ring", 0), ("blue", "cross", 32))
    words = object_words(drawn)
    assert [(word.kind, drawn.caption[slice(*word.span)]) for word in words] == [
        ("colour", "red"), ("shape", "ring"), ("colour", "blue"), ("shape", "cross"),
    ]  # fmt: skip
    peaks = [peak(7, 15), peak(8, 15), peak(32, 32), peak(0, 0)]
    maps = [("", word.span, values) for word, values in zip(words, peaks, strict=True)]
    # Maps of other words are ignored.
    maps.append(("a", (0, 1), peak(0, 0)))
    found = pointing([drawn], [maps])
    assert {kind: (p.right, p.n) for kind, p in found.items()} == {"colour": (2, 2), "shape": (0, 2)}
    assert found["colour"].chance == found["shape"].chance == 8 * 16 / 64**2
    assert math.isnan(pointing([], [])["shape"].chance)
    with pytest.raises(ValueError, match=r"maps: got \(8, 8\), expected the masks' size \(64, 64\)"):
        pointing([drawn], [[(word, span, values[:8, :8]) for word, span, values in maps]])
    with pytest.raises(KeyError):
        pointing([drawn], [maps[:2]])


def test_shape_words_of_the_mini_model_point_at_their_objects():
    """n = 40 and a chance of about 7 %: a share above one half is out of a random map's reach."""
    m = dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=4))
    found = pointing_game(m, [scene(EVAL_SEED + 700_000 + i, objects=1) for i in range(40)])
    assert found["shape"].n == found["colour"].n == 40
    assert 0.02 < found["shape"].chance < 0.15
    assert found["shape"].right / 40 > 0.5


def test_the_reference_takes_the_same_arguments():
    ours, theirs = (inspect.signature(call).parameters for call in (dsd.Matcher.heatmap, reference.heatmap))
    assert list(ours)[1:3] == list(theirs)[1:3] == ["image", "caption"]
    for name in list(ours)[3:]:
        assert (ours[name].default, ours[name].kind) == (theirs[name].default, theirs[name].kind)
