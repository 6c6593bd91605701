"""The gate on the mini model: both parts, what they say together, and the files."""

import copy
import csv
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from rich.console import Console
from scipy.stats import spearmanr

import dsd_fast
from dsd_fast.diffusion import noise
from dsd_fast.engine import Engine
from dsd_fast.engine.clip import ClipSpace
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.features.gate import GateResult, Guide, GuideResult, gate
from dsd_fast.features.gate.guide import latent_distance
from dsd_fast.features.gate.sheet import contact_sheet
from dsd_fast.features.inputs import Prompts
from dsd_fast.features.shift import inputs_of, measure_shift
from dsd_fast.features.shift_result import ShiftResult
from dsd_fast.images import load_batch
from dsd_fast.jobs import weights_hash
from dsd_fast.models.controlnet import Control, load_controlnet
from dsd_fast.models.mini.scenes import scene
from tests.tiny import tiny_pipeline

LAYERS = ("up-level1-repeat0-vit-block0-cross-q", "up-level1-repeat1-vit-block0-cross-q")
SCENES = [scene(1_000_000_000 + seed) for seed in range(12)]
IMAGES = [each.image for each in SCENES]
CAPTIONS = [each.caption for each in SCENES]
TECHNIQUES = (
    Technique("true captions", prompts=CAPTIONS),
    Technique("others' captions", prompts=CAPTIONS[1:] + CAPTIONS[:1]),
    Technique("denoised", denoise_from=550, denoise_steps=3),
)
RED = Technique("red", prompts="a red circle")
STEPS = 8


@pytest.fixture(scope="module")
def model():
    return dsd_fast.load("mini")


@pytest.fixture(scope="module")
def extractor(model):
    return FeatureExtractor(model, LAYERS, (200, 500))


@pytest.fixture(scope="module")
def found(extractor):
    return gate(extractor, IMAGES, TECHNIQUES, steps=STEPS, shown=3)


@pytest.fixture(scope="module")
def rows(found):
    return {row["technique"]: row for row in found.rows()}


def test_true_captions_are_accepted_and_wrong_ones_are_not(rows):
    true, wrong, denoised = (rows[each.name] for each in TECHNIQUES)
    assert (true["accepted"], wrong["accepted"]) == (True, False)
    assert (true["take"], wrong["take"]) == (True, False)
    for gain in ("vae_gain", "clip_gain"):
        assert true[gain] > 0 > wrong[gain]
    assert true["score_gain"] > max(0, wrong["score_gain"])
    # It changes the latents that features are taken from, and no img2img.
    assert denoised["accepted"] is None
    assert denoised["vae_gain"] == denoised["clip_gain"] == 0


def test_rows_are_ranked_by_the_score(found, extractor):
    rows = found.rows()
    assert [row["score_gain"] for row in rows] == sorted((row["score_gain"] for row in rows), reverse=True)
    # float32 in other batches, see test_shift.py.
    scores = measure_shift(extractor, IMAGES[:3], [Technique("baseline", prompts="")]).scores
    np.testing.assert_allclose(found.shift.scores[:1, ..., :3], scores, atol=1e-4)
    for row in rows:
        k = found.shift.techniques.index(row["technique"])
        scores = found.shift.scores[[0, k]].mean((1, 2, 3))
        assert row["score"] == pytest.approx(scores[1])
        assert row["score_gain"] == pytest.approx(scores[1] - scores[0])
        assert row["score_gain_low"] < row["score_gain"] < row["score_gain_high"]


def test_guide_is_img2img_by_hand(found, model):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline(**model.to_pipeline().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pixels = load_batch(IMAGES[4:5], model.image_size)
    with torch.no_grad():
        clean = model.encode_images(pixels)
        start = pipe.scheduler
        start.set_timesteps(STEPS)
        # Six of eight steps, int(0.8 · 8); the pipeline cannot be given noise, so its loop is written out.
        times = start.timesteps[2:]
        latents = start.add_noise(clean, noise(0, 0, clean.shape[1:])[None], times[:1])
        states = model.encode_prompts([CAPTIONS[4]]).states
        for t in times:
            output = model.unet(latents, t, encoder_hidden_states=states).sample
            latents = start.step(output, t, latents).prev_sample
        picture = model.decode_latents(latents)
        embeds = [model.clip.get_image_features(pixel_values=each) for each in (pixels, picture)]
        embeds = [getattr(each, "pooler_output", each) for each in embeds]
    vae, clip = found.guide.distances[1, :, 4]
    # float32, seven UNet calls in another batch.
    assert vae == pytest.approx(float((latents - clean).square().mean().sqrt()), rel=1e-3)
    assert clip == pytest.approx(1 - float(torch.cosine_similarity(*embeds)), abs=1e-3)


def test_guidance_of_the_empty_prompt_changes_nothing(model, extractor):
    # u + s (c - u) with c = u.
    empty = Technique("empty", prompts="")
    drawn = []
    for guidance in (1.0, 4.0):
        guide = Guide(extractor.engine, [empty, RED], steps=4, guidance=guidance, shown=0)
        for inputs in inputs_of(extractor, IMAGES[:2], [empty], Prompts(""), 0, None):
            guide.add(inputs, Prompts(""))
        drawn.append(guide.result().distances)
    np.testing.assert_allclose(drawn[0][0], drawn[1][0], rtol=1e-3)
    assert np.abs(drawn[0][1] - drawn[1][1]).min() > 0.01


def test_guidance_is_the_stock_pipelines():
    from diffusers import StableDiffusionXLImg2ImgPipeline

    # SDXL's absent prompt is zeros, which no text is.
    tiny = dsd_fast.from_pipeline(tiny_pipeline("sdxl"))
    pipe = StableDiffusionXLImg2ImgPipeline(**tiny.to_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    extractor = FeatureExtractor(tiny, "all", (500,))
    guide = Guide(extractor.engine, [RED], steps=4, guidance=3.0, shown=1)
    (inputs,) = inputs_of(extractor, IMAGES[:1], [RED], Prompts(""), 0, None)
    guide.add(inputs, Prompts(""))
    clean, epsilon = inputs.latents, inputs.noise[:, 0, 0]
    scheduler = pipe.scheduler
    scheduler.set_timesteps(4)
    # A latent that is given is taken as it is; three of four steps.
    start = scheduler.add_noise(clean, epsilon, scheduler.timesteps[1:2])
    size = inputs.pixels[0].shape[-2:]
    found = pipe(
        RED.prompts,
        image=start,
        strength=0.8,
        num_inference_steps=4,
        guidance_scale=3.0,
        original_size=size,
        target_size=size,
        latents=start,
        output_type="latent",
    ).images
    # float32, three steps of six UNet calls in another batch.
    assert guide.result().distances[0, 0, 0] == pytest.approx(float(latent_distance(found, clean)), rel=1e-3)


def test_the_guide_compiles_what_it_runs(model, extractor):
    plain, compiled = (
        Guide(extractor.engine, [RED], steps=2, shown=0, runtime=runtime) for runtime in (None, "inductor")
    )
    assert [guide._engines[0].noise_plan.runtime for guide in (plain, compiled)] == [None, "inductor"]
    with pytest.raises(ValueError, match="runtime: got 'fast'"):
        Guide(extractor.engine, [RED], runtime="fast")


def test_settings_say_what_was_asked_and_of_which_networks():
    own = dsd_fast.load("mini")
    own.load_lora("mini", "scenes")
    net = load_controlnet("mini")
    extractor = FeatureExtractor(own, LAYERS, (50,), official_timesteps=True, technique=Technique(adapter="scenes"))
    techniques = [Technique("lora", adapter="scenes"), Technique("control", controls=[Control(net, scale=0.5)])]
    found = json.loads(json.dumps(gate(extractor, IMAGES[:2], techniques, CAPTIONS[:2], guide=False).settings))
    assert (found["prompts"], found["revision"], found["anchor"]) == (CAPTIONS[:2], None, ["baseline", 801])
    assert found["extractor"]["timesteps"] == [51]
    assert "technique" not in found["extractor"]
    # Of the UNet and of the text encoder, which the file has nothing for; each strength that some layer has.
    scaling = {value for each in own.unet.modules() if hasattr(each, "lora_A") for value in each.scaling.values()}
    assert found["techniques"]["lora"]["adapters"] == [{"scenes": sorted(scaling)}, {}]
    assert found["baseline"]["adapters"] == [{}, {}]
    (control,) = found["techniques"]["control"]["controls"]
    assert (control["scale"], control["weights"]) == (0.5, weights_hash([net]))
    with torch.no_grad():
        net.controlnet_mid_block.bias += 1
        own.vae.quant_conv.bias += 1
    other = gate(extractor, IMAGES[:1], techniques[1:], guide=False).settings
    assert other["weights"] != found["weights"]
    assert other["techniques"]["control"]["controls"][0]["weights"] != control["weights"]


def test_controlnets_take_part_in_the_guide(model, extractor):
    net = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(8, 8, 8)).eval()
    techniques = [Technique("plain"), Technique("control", controls=[Control(net)])]

    def distances():
        guide = Guide(extractor.engine, techniques, steps=4, shown=0)
        for inputs in inputs_of(extractor, IMAGES[:2], techniques, Prompts(""), 0, None):
            guide.add(inputs, Prompts(""))
        assert guide.result().unchanged == (True, False)
        return guide.result().distances

    # A new ControlNet ends in zeros, and adds nothing.
    plain, control = distances()
    np.testing.assert_allclose(control, plain, rtol=1e-4)
    with torch.no_grad():
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            layer.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    plain, control = distances()
    assert np.abs(control - plain).min() > 1e-3


def test_without_a_clip_the_latents_alone_are_measured(model):
    bare = copy.copy(model)
    bare.clip = None
    found = gate(bare, IMAGES[:2], [RED], steps=2, shown=0)
    assert found.guide.spaces == ("vae",)
    assert found.guide.distances.shape == (2, 1, 2)
    assert "clip_gain" not in found.rows()[0]
    assert found.sheet() is None


def test_without_the_guide_the_score_decides(extractor):
    found = gate(extractor, IMAGES[:2], [RED], guide=False)
    (row,) = found.rows()
    assert found.guide is None
    assert row["accepted"] is None
    assert row["take"] == (row["score_gain_low"] > 0)
    assert found.agreement() == {}


def made(scores, distances, unchanged=None):
    """A result of one layer, timestep and space, (K, N) each."""
    scores, distances = np.asarray(scores, np.float64), np.asarray(distances, np.float64)
    names = tuple("abcdef"[: len(scores)])
    count = scores.shape[1]
    shift = ShiftResult(names, ("l",), (50,), 1 - scores[:, None, None], np.ones((1, count)), ("a", 800))
    same = unchanged or [k == 0 for k in range(len(scores))]
    return GateResult(shift, GuideResult(names, ("vae",), distances[:, None], tuple(same), [], [[]] * len(names)), {})


def test_agreement_is_spearmans():
    scores = [[0.5, 0.5], [0.6, 0.6], [0.1, 0.3], [0.7, 0.9], [0.6, 0.6]]
    distances = [[1.0, 1.0], [0.9, 0.7], [1.2, 1.2], [0.8, 0.9], [0.5, 0.5]]
    result = made(scores, distances)
    expected = spearmanr(np.mean(scores, 1), -np.mean(distances, 1)).statistic
    assert result.agreement()["vae"] == pytest.approx(expected)
    # Two that the guide cannot tell from the first leave three.
    kept = made(scores, distances, [True, True, False, False, True])
    assert kept.agreement()["vae"] == pytest.approx(1.0)
    assert made(scores[:2], distances[:2]).agreement() == {"vae": None}


def test_gains_are_shares_of_the_baselines_distance():
    result = made([[0.5] * 3] * 3, [[1.0, 2.0, 3.0], [0.5, 1.0, 1.5], [0.5, 1.0, 4.6]])
    value, low, high = result.guide.gains()
    np.testing.assert_allclose(value[:, 0], [0, 0.5, 1 - 6.1 / 6])
    # Half the distance of every image is half the distance of any resample.
    np.testing.assert_allclose([low[1, 0], high[1, 0]], 0.5)
    # The last is closer for two images and farther for one.
    assert low[2, 0] < 0 < high[2, 0]
    assert result.guide.accepted() == [None, True, None]
    assert [row["take"] for row in result.rows()] == [False, False]


UNSURE = (0.2, 0.2, 1.9, 1.1)


@pytest.mark.parametrize(
    ("vae", "clip", "accepted"),
    [
        (0.5, 0.5, True),
        (0.5, UNSURE, None),
        (0.5, 1.0, None),
        (UNSURE, UNSURE, None),
        (0.5, 1.5, False),
        (UNSURE, 1.5, False),
        (1.5, 1.5, False),
    ],
)
def test_the_guide_accepts_what_is_closer_and_rejects_what_is_farther(vae, clip, accepted):
    distances = np.ones((2, 2, 4))
    distances[1] = np.broadcast_to(vae, 4), np.broadcast_to(clip, 4)
    guide = GuideResult(("a", "b"), ("vae", "clip"), distances, (True, False), [], [[], []])
    assert guide.accepted() == [None, accepted]
    # Without a distance of the baseline there is no share of it.
    none = GuideResult(("a", "b"), ("vae",), np.zeros((2, 1, 4)), (True, False), [], [[], []])
    assert none.accepted() == [None, None]


def test_a_gain_in_score_is_not_taken_against_the_guide():
    # All gain the same; the guide rejects the second, accepts the third, and cannot tell the others.
    scores = [[0.5, 0.5]] + [[0.7, 0.8]] * 4
    distances = [[1.0, 1.0], [1.2, 1.2], [0.5, 0.5], [1.0, 1.0], [0.5, 1.4]]
    result = made(scores, distances, [True, False, False, True, False])
    rows = [(row["technique"], row["accepted"], row["take"]) for row in result.rows()]
    assert rows == [("b", False, False), ("c", True, True), ("d", None, True), ("e", None, True)]


def test_clip_takes_pictures_of_any_size(model):
    with torch.no_grad():
        space = ClipSpace(model)
        pixels = load_batch(IMAGES[:2], (64, 64))
        small, large = space.of_pixels(pixels), space.of_pixels(load_batch(IMAGES[:2], (128, 128)))
    torch.testing.assert_close(small.norm(dim=-1), torch.ones(2))
    # Enlarged by bicubic interpolation and reduced again: nearly the same picture.
    assert (small * large).sum(-1).min() > 0.95


def test_latent_distance_of_independent_noise():
    a, b = torch.randn(2, 3, 4, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    # √2, with a relative deviation of 1 / √(2 · 16,384) = 0.006.
    torch.testing.assert_close(latent_distance(a, b), torch.full((3,), 2**0.5), rtol=0.02, atol=0)
    assert torch.equal(latent_distance(a, a), torch.zeros(3))


def test_contact_sheet_shows_each_picture_in_its_place():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    pictures = [Image.new("RGB", (64, 32), colour) for colour in colours]
    sheet = contact_sheet([("first", pictures[:2]), ("second " * 9, pictures[2:])], [["a", "b"], ["c", "d"]])
    # 64 pixels are enlarged to 128; margins 12, lines 20.
    centres = [(x, y) for x in (12 + 64, 152 + 64) for y in (32 + 32, 32 + 64 + 32 + 32)]
    assert [sheet.getpixel(place) for place in centres] == colours
    assert sheet.size == (12 + 2 * 140, 32 + 2 * (64 + 32))
    with pytest.raises(ValueError, match=r"columns: got lengths \[1, 2\]"):
        contact_sheet([("a", pictures[:1]), ("b", pictures[:2])])


def test_files(found, tmp_path):
    folder = tmp_path / "new" / "gate"
    files = found.save(folder)
    assert {file.name for file in folder.iterdir()} == {file.name for file in files}
    content = json.loads((folder / "gate.json").read_text())
    assert content["techniques"] == found.rows()
    assert content["images"] == len(IMAGES)
    assert content["settings"]["guide"] == {"strength": 0.8, "steps": STEPS, "guidance": 1.0}
    assert content["settings"]["techniques"]["denoised"]["denoise_from"] == 550
    with (folder / "ranking.csv").open(newline="") as file:
        assert [row["technique"] for row in csv.DictReader(file)] == [row["technique"] for row in found.rows()]
    scores = pq.read_table(folder / "scores.parquet").to_pylist()
    assert len(scores) == found.shift.diffs.size
    row = next(
        each
        for each in scores
        if (each["technique"], each["layer"], each["timestep"], each["image"]) == ("denoised", LAYERS[1], 500, 7)
    )
    assert (row["diff"], row["score"]) == (found.shift.diffs[3, 1, 1, 7], found.shift.scores[3, 1, 1, 7])
    distances = pq.read_table(folder / "distances.parquet").to_pylist()
    assert distances[12 + 5]["clip"] == found.guide.distances[1, 1, 5]
    assert distances[12 + 5] | {"vae": 0, "clip": 0} == {
        "technique": "true captions",
        "image": 5,
        "vae": 0,
        "clip": 0,
    }
    with Image.open(folder / "contact-sheet.png") as sheet:
        # Input, baseline and two techniques, of 128 pixels; the denoised one has no pictures of its own.
        assert sheet.width == 12 + 4 * 140
        shown = np.asarray(sheet.convert("RGB"))[32 : 32 + 128, 12 : 12 + 128]
    np.testing.assert_array_equal(shown, np.kron(IMAGES[0], np.ones((2, 2, 1), np.uint8)))
    assert (folder / "scores.png").stat().st_size > 1000


def test_table(found):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    for row in found.rows():
        (line,) = [line for line in text.splitlines() if row["technique"] in line]
        assert f"{row['score']:.3f}" in line
        assert {True: "accepts", False: "rejects", None: "cannot tell"}[row["accepted"]] in line


def test_refusals(extractor, model):
    with pytest.raises(ValueError, match="techniques: got none"):
        gate(extractor, IMAGES[:1], [])
    with pytest.raises(ValueError, match=r"techniques: got \['baseline', 'baseline'\]"):
        gate(extractor, IMAGES[:1], [Technique("baseline", prompts="x")])
    with pytest.raises(ValueError, match="strength is 0, expected above 0"):
        Guide(Engine(model), [Technique()], strength=0)
    with pytest.raises(ValueError, match="images: got none"):
        gate(extractor, [], [RED])
