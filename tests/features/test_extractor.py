"""FeatureExtractor against plans run by hand, torch's own functions, and itself asked in other ways."""

import itertools
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dsd_fast
from dsd_fast.diffusion import noise
from dsd_fast.features import PCA, FeatureExtractor, Technique
from dsd_fast.features.shift import measure_shift
from dsd_fast.images import ImageError, load_batch, to_picture, to_tensor
from dsd_fast.jobs import read_index, read_tensors
from dsd_fast.models.mini.scenes import COLOURS, SHAPES, scene
from dsd_fast.reference import features as reference
from dsd_fast.unet import UNetProgram
from tests.images.files import refilled
from tests.tiny import tiny_pipeline

LAYERS = ("up-level0-repeat1-res-out", "up-level1-repeat0-vit-block0-cross-q")
# Convolutions are not equal to the bit across batch sizes. Outputs are sums of at most 9 · 1,280 products, and errors
# of rounding grow with the root of their number: 2⁻²⁴ · √11,520 = 6.4e-6 of the largest value.
BATCH = 1e-5


@pytest.fixture(scope="module")
def model():
    return dsd_fast.load("mini")


@pytest.fixture(scope="module")
def images():
    return [scene(1_000_000_000 + seed).image for seed in range(5)]


def close(got, want, tolerance=BATCH):
    assert got.shape == want.shape
    error, scale = (got.double() - want.double()).abs().max(), want.double().abs().max()
    assert error <= tolerance * scale, f"{error:.3g} at a scale of {scale:.3g}"


def by_hand(model, image, prompt, t, layers=LAYERS, seed=0, draw=0):
    """One image at one timestep, alone."""
    plan = UNetProgram(model.unet).plan(features=layers)
    with torch.no_grad():
        clean = model.encode_images(to_tensor(dsd_fast.images.load_image(image), model.image_size)[None])
        states = model.encode_prompts([prompt])
        text = plan.encode_text(states.states, states.pooled)
        epsilon = noise(seed, draw, clean.shape[1:])[None]
        z = clean if t == 0 else model.schedule.add_noise(clean, epsilon, t)
        out = plan.run(z, t, text, time_ids=model.time_ids(*model.image_size))
    return {name: value[0] for name, value in out.features.items()}


def test_every_image_timestep_and_prompt_is_what_it_is_alone(model, images):
    prompts = ["a red circle", "", "a photo of the digit three", "a red circle", "a blue ring"]
    found = FeatureExtractor(model, LAYERS, [500, 0, 50]).extract(images, prompts, seed=3)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        LAYERS[0]: (5, 3, 128, 4, 4),
        LAYERS[1]: (5, 3, 96, 8, 8),
    }
    for (n, image), (s, t) in itertools.product(enumerate(images), enumerate((500, 0, 50))):
        want = by_hand(model, image, prompts[n], t, seed=3)
        for name in LAYERS:
            close(found[name][n, s], want[name])


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_other_families(family):
    model = dsd_fast.from_pipeline(tiny_pipeline(family))
    height, width = model.image_size
    pictures = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    layers = [UNetProgram(model.unet).score_ids[-1] + "-q", "unet-out"]
    found = FeatureExtractor(model, layers, [50, 981]).extract(list(pictures), "a cat")
    for n, (s, t) in itertools.product(range(2), enumerate((50, 981))):
        want = by_hand(model, pictures[n], "a cat", t, layers)
        for name in layers:
            close(found[name][n, s], want[name])


def test_seeds_of_images_and_kept_draws(model, images):
    extractor = FeatureExtractor(model, LAYERS, [200, 50], draws=3, keep_draws=True)
    found = extractor.extract(images[:2], seeds=[7, 9])
    assert found[LAYERS[0]].shape == (2, 2, 3, 128, 4, 4)
    for (n, seed), d in itertools.product(enumerate((7, 9)), range(3)):
        want = by_hand(model, images[n], "", 50, seed=seed, draw=d)
        close(found[LAYERS[0]][n, 1, d], want[LAYERS[0]])
    mean = FeatureExtractor(model, LAYERS, [200, 50], draws=3).extract(images[:2], seeds=[7, 9])
    for name in LAYERS:
        close(mean[name], found[name].mean(2))


def test_the_budget_changes_nothing_but_rounding(model, images):
    plain = FeatureExtractor(model, LAYERS, [50, 200], draws=2)
    row = plain.plan.run_bytes(1, 16, 16, 24)
    tight = FeatureExtractor(model, LAYERS, [50, 200], draws=2, memory_budget=16 * row)
    prompts = ["", "a red circle", "a blue ring", "", "a green cross"]
    first, second = plain.extract(images, prompts), tight.extract(images, prompts)
    assert tight.images_at_once() < len(images)
    for name in LAYERS:
        close(second[name], first[name])
    again = tight.extract(images, prompts)
    assert all(torch.equal(second[name], again[name]) for name in LAYERS)


def test_only_what_is_asked_for_runs(model):
    extractor = FeatureExtractor(model, LAYERS)
    assert extractor.plan.steps[-1].name == LAYERS[1]


def test_on_the_way_out(model, images):
    raw = FeatureExtractor(model, LAYERS).extract(images)
    extractor = FeatureExtractor(model, LAYERS, resize=(6, 10), normalize=True, dtype="float16")
    found = extractor.extract(images)
    assert extractor.shapes == {LAYERS[0]: (128, 6, 10), LAYERS[1]: (96, 6, 10)}
    for name in LAYERS:
        resized = F.interpolate(raw[name][:, 0], size=(6, 10), mode="bilinear", align_corners=False)
        # Half precision rounds by 2⁻¹¹ of a value.
        assert found[name].dtype == torch.float16
        close(found[name][:, 0], F.normalize(resized, dim=1), 2**-11 + BATCH)
    means = FeatureExtractor(model, LAYERS, pool="mean").extract(images)
    largest = FeatureExtractor(model, LAYERS, pool="max").extract(images)
    smaller = FeatureExtractor(model, LAYERS, resize=2).extract(images)
    for name in LAYERS:
        close(means[name], raw[name].mean((-2, -1), keepdim=True))
        close(largest[name], raw[name].amax((-2, -1), keepdim=True))
        close(smaller[name][:, 0], F.avg_pool2d(raw[name][:, 0], 2))


def test_pca_is_fitted_to_images_and_used_from_then_on(model, images):
    raw = FeatureExtractor(model, LAYERS, [50, 200]).extract(images)
    extractor = FeatureExtractor(model, LAYERS, [50, 200])
    fitted = extractor.fit_pca(images, 4)
    found = extractor.extract(images)
    for name in LAYERS:
        want = PCA.fit(raw[name], 4)
        projected = torch.stack([want.transform(each) for each in raw[name]])
        # The fit sees features that differ by rounding; components turn by that over the gap of their variances.
        close(found[name], projected, 1e-3)
        assert extractor.shapes[name][0] == 4
    given = FeatureExtractor(model, LAYERS, [50, 200], pca=fitted).extract(images)
    assert all(torch.equal(given[name], found[name]) for name in LAYERS)


def test_attention_is_aggregated_from_whole_maps(model, images):
    found = FeatureExtractor(model, [], [200], attention=["up_cross", "down_self", "mid_cross"]).extract(
        images[:2], "a"
    )
    parts = []
    for place, kind, side in (("up-level0", "cross", 4), ("up-level1", "cross", 8)):
        names = [f"{place}-repeat{repeat}-vit-block0-{kind}-map" for repeat in (0, 1)]
        parts.append((names, side))
    parts += [(["down-level1-repeat0-vit-block0-self-map"], 8), (["down-level2-repeat0-vit-block0-self-map"], 4)]
    parts.append((["mid-vit-block0-cross-map"], 4))
    ids = [name for names, _ in parts for name in names]
    maps = FeatureExtractor(model, ids, [200]).extract(images[:2], "a")
    wanted = []
    for names, side in parts:
        mean = torch.stack([maps[name][:, 0].mean(1) for name in names]).mean(0)
        grid = mean.transpose(1, 2).unflatten(2, (side, side))
        wanted.append(F.interpolate(grid, size=(16, 16), mode="nearest"))
    assert list(found) == ["attn"]
    close(found["attn"][:, 0], torch.cat(wanted, 1))


def test_techniques_share_the_vae_and_the_texts(model, images, monkeypatch):
    counts = {"vae": 0, "text": 0}
    for name, module in (("vae", model.vae.encoder), ("text", model.text_encoders[0])):
        forward = module.forward

        def counted(*args, _name=name, _forward=forward, **options):
            counts[_name] += len(args[0])
            return _forward(*args, **options)

        monkeypatch.setattr(module, "forward", counted)
    techniques = [Technique(), Technique(inversion=True), Technique(prompts="a red circle"), Technique(denoise_from=60)]
    extractor = FeatureExtractor(model, LAYERS)
    found = extractor.extract_each(images, techniques, "a picture")
    assert counts == {"vae": len(images), "text": 2}
    monkeypatch.undo()
    for technique, each in zip(techniques, found, strict=True):
        alone = FeatureExtractor(model, LAYERS, technique=technique).extract(images, "a picture")
        for name in LAYERS:
            close(each[name], alone[name])


def test_a_text_encoder_that_changed_is_asked_again(images):
    model = dsd_fast.load("mini")
    extractor = FeatureExtractor(model, LAYERS)
    before = extractor.extract(images[:1], "a red circle")
    model.text_encoders[0].get_input_embeddings().weight.data.mul_(1.5)
    after = extractor.extract(images[:1], "a red circle")
    assert (before[LAYERS[1]] - after[LAYERS[1]]).abs().max() > 1e-3


def test_a_way_down_in_few_steps_is_each_timesteps_own(model, images):
    few = Technique(denoise_from=100, denoise_steps=3)
    # The way to 40 passes 80 and 60, in other steps than theirs.
    both = FeatureExtractor(model, LAYERS, [40, 60, 80], technique=few).extract(images[:2])
    for s, t in enumerate((40, 60, 80)):
        alone = FeatureExtractor(model, LAYERS, [t], technique=few).extract(images[:2])
        for name in LAYERS:
            close(both[name][:, s], alone[name][:, 0])


def test_denoising_passes_all_timesteps_and_leaves_the_clean_latent_alone(model, images):
    way = FeatureExtractor(model, LAYERS, [40, 0, 50], technique=Technique(denoise_from=60)).extract(images[:2])
    alone = FeatureExtractor(model, LAYERS, [50], technique=Technique(denoise_from=60)).extract(images[:2])
    plain = FeatureExtractor(model, LAYERS, [0, 50]).extract(images[:2])
    for name in LAYERS:
        close(way[name][:, 2], alone[name][:, 0])
        close(way[name][:, 1], plain[name][:, 0])
        assert (way[name][:, 2] - plain[name][:, 1]).abs().max() > 1e-2


def test_more_images_than_memory_one_at_a_time_with_errors(model, images, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    sources = [images[0], bad, *images[1:], Path("missing.png")]
    extractor = FeatureExtractor(model, LAYERS)
    whole = extractor.extract(images)
    good = iter(range(len(images)))
    for number, found in extractor.extract_iter(iter(sources)):
        if number in (1, len(sources) - 1):
            assert isinstance(found, ImageError)
        else:
            n = next(good)
            close(found[LAYERS[1]], whole[LAYERS[1]][n])
    with pytest.raises(ImageError):
        extractor.extract(sources)


@pytest.mark.parametrize("kind", ["array", "frames", "files that are closed"])
def test_buffers_may_be_filled_again(model, images, kind, tmp_path):
    def drawn():
        return refilled(kind, arrays)

    arrays = [np.asarray(image) for image in images]
    extractor = FeatureExtractor(model, ["down-level0-repeat0-res-out"])
    (want,) = extractor.extract(arrays).values()
    close(*extractor.extract(drawn()).values(), want)
    for got, row in zip(extractor.extract_iter(drawn()), want, strict=True):
        close(*got[1].values(), row)
    for name, source in (("drawn", drawn()), ("given", arrays)):
        extractor.extract_to(tmp_path / name, source)
    ours, theirs = (read_tensors(*(tmp_path / name / "shards").iterdir())[0] for name in ("drawn", "given"))
    close(*ours.values(), *theirs.values())
    assert read_index(tmp_path / "drawn")["id"] == read_index(tmp_path / "given")["id"]
    components = [extractor.replaced().fit_pca(each, 2) for each in (drawn(), arrays)]
    torch.testing.assert_close(*(each["down-level0-repeat0-res-out"].mean for each in components))
    shifts = [measure_shift(extractor, each).scores for each in (drawn(), arrays)]
    np.testing.assert_allclose(*shifts, rtol=1e-4)


def test_chunks_without_a_usable_image(model, images, tmp_path):
    extractor = FeatureExtractor(model, LAYERS)
    missing = [tmp_path / "a.png", tmp_path / "b.png"]
    found = list(extractor.extract_chunks([*missing, images[0]], seeds=[1, 2, 3], chunk=2))
    assert [(part.numbers, sorted(part.errors)) for part in found] == [([], [0, 1]), ([2], [])]
    want = extractor.extract(images[:1], seeds=[3])
    for name in LAYERS:
        close(found[1].features[0][name], want[name])


def test_texts_of_many_prompts_stay_within_the_budget(model, images):
    small = {"image_size": (16, 16)}
    plain = FeatureExtractor(model, LAYERS, **small)
    text = plain.plan.encode_text(model.encode_prompts([""]).states.detach())
    budget = 4 * text.nbytes + 8 * plain.plan.run_bytes(1, 4, 4, 24)
    prompts = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    many = [images[number % len(images)] for number in range(len(prompts))]
    # More than all keys together leave room for.
    assert text.nbytes * len(prompts) > budget
    tight = FeatureExtractor(model, LAYERS, **small, memory_budget=budget)
    first, second = plain.extract(many, prompts), tight.extract(many, prompts)
    for name in LAYERS:
        close(second[name], first[name])


def test_strengths_of_adapters_are_those_of_the_request(images):
    model = dsd_fast.load("mini")
    model.load_lora("mini", "night")
    extractor = FeatureExtractor(model, LAYERS, technique=Technique(adapter="night"))
    before = extractor.extract(images[:1])
    model.unet.set_adapters(["night"], [0.25])
    fresh = FeatureExtractor(model, LAYERS, technique=Technique(adapter="night")).extract(images[:1])
    after = extractor.extract(images[:1])
    assert (after[LAYERS[1]] - before[LAYERS[1]]).abs().max() > 1e-3
    assert all(torch.equal(after[name], fresh[name]) for name in LAYERS)


def test_prompts_of_techniques_leave_nothing_behind(model, images):
    extractor = FeatureExtractor(model, LAYERS)
    for number in range(3):
        extractor.extract_each(images[:1], [Technique(prompts=[f"a red circle {number}"])])
    assert len(extractor._runs) == 1


def test_timesteps_are_those_that_the_network_is_told(model):
    # PNDM alone makes 51 of 50; its own walk from 60 passes 50.
    assert FeatureExtractor(model, LAYERS, [50], official_timesteps=True).timesteps == [51]
    walk = Technique(denoise_from=60)
    extractor = FeatureExtractor(model, LAYERS, [50, 0, 45], official_timesteps=True, technique=walk)
    scheduler = model.new_scheduler()
    scheduler.set_timesteps(1000)
    passed = [int(t) for t in scheduler.timesteps if t <= 60]
    assert extractor.timesteps == [min(t for t in passed if t >= asked) if asked else 0 for asked in (50, 0, 45)]


def test_a_changed_extractor_stays_compiled(model):
    compiled = FeatureExtractor(model, LAYERS).compile("inductor")
    assert compiled.replaced(timesteps=(60,)).runtime == "inductor"


def test_a_pickled_extractor_is_the_same(model, images):
    extractor = FeatureExtractor(model, LAYERS[:1], technique=Technique(prompts="a red circle"))
    again = ForkingPickler.loads(ForkingPickler.dumps(extractor))
    close(again.extract(images[:1])[LAYERS[0]], extractor.extract(images[:1])[LAYERS[0]])


def test_text_encoders_of_another_type(images):
    model = dsd_fast.load("mini", dtype="bfloat16")
    found = FeatureExtractor(model, LAYERS).extract(images[:1], "a red circle")
    model.text_encoders[0].float()
    again = FeatureExtractor(model, LAYERS).extract(images[:1], "a red circle")
    # Texts that are rounded once at the end instead of at each layer: half precision keeps 8 bits.
    close(again[LAYERS[1]].float(), found[LAYERS[1]].float(), 0.1)


def test_components_of_a_network_of_16_bits_are_rounded_as_they_are_written(images):
    model = dsd_fast.load("mini", dtype="bfloat16")
    extractor = FeatureExtractor(model, LAYERS)
    features = extractor.extract(images[:2])
    fitted = {name: PCA.fit(value[:, 0], 3) for name, value in features.items()}
    wide = FeatureExtractor(model, LAYERS, pca=fitted, dtype="float32").extract(images[:2])
    for name, value in features.items():
        right = fitted[name].transform(value[:, 0].double())
        # Sums of up to 128 products in float32, where one rounding to bfloat16 is 4e-3.
        close(wide[name][:, 0], right, 1e-6)


def test_features_lose_no_more_than_the_plain_ways(model, images):
    half = dsd_fast.load("mini", dtype="bfloat16")
    right, ours = (FeatureExtractor(each, LAYERS, [500]).extract(images[:2]) for each in (model, half))
    plain = reference.extract(half.to_pipeline(), images[:2], layers=LAYERS, timesteps=[500])
    for name, value in right.items():
        assert 0 < (ours[name] - value).norm() <= 2 * (plain[name] - value).norm()


def test_given_tensors_are_filled(model, images):
    extractor = FeatureExtractor(model, LAYERS, [50, 200])
    out = {name: torch.full((2, 2, *shape), float("nan")) for name, shape in extractor.shapes.items()}
    found = extractor.extract(images[:2], out=out)
    assert all(found[name] is out[name] for name in LAYERS)
    want = extractor.extract(images[:2])
    assert all(torch.equal(out[name], want[name]) for name in LAYERS)


def test_pictures_of_controls_are_the_bytes_that_were_decoded(images):
    for image, pixels in zip(images, load_batch(images, (64, 64)), strict=True):
        assert np.array_equal(np.asarray(to_picture(pixels)), image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["up-level9"]}, "features: unknown id 'up-level9'"),
        ({"layers": "practical-xl"}, "layers: 'practical-xl' is for another network"),
        ({"layers": "unknown"}, "layers: got 'unknown', expected one of practical, legacy, all"),
        ({"layers": []}, "layers: got none"),
        ({"timesteps": 50}, "timesteps: got the integer 50"),
        ({"timesteps": [1000]}, "timesteps holds 1000, expected 0 to 999"),
        ({"timesteps": []}, "timesteps: got none"),
        ({"timesteps": [1.5]}, "timesteps holds 1.5, expected integers"),
        ({"attention": ["left_cross"]}, "attention: got 'left_cross'"),
        ({"attention": "up_cross"}, "attention: got 'up_cross', expected a sequence"),
        ({"draws": 0}, "draws: got 0"),
        ({"image_size": (30, 64)}, r"image_size: got \(30, 64\), expected multiples of 4"),
        ({"pool": "sum"}, "pool: got 'sum'"),
        ({"pool": "mean", "resize": 2}, "resize, pool: both"),
        ({"resize": 0}, "resize: got 0"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"layers": ["mid-vit-block0-cross-map"], "normalize": True}, "cannot be resized"),
        ({"technique": Technique(adapter="none")}, "the model has no adapter 'none'"),
        ({"memory_budget": 1}, "memory_budget: 1 bytes cannot hold"),
    ],
)
def test_bad_settings_are_named(model, images, options, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(model, **{"layers": LAYERS, **options}).extract(images[:1])


def test_bad_requests_are_named(model, images):
    extractor = FeatureExtractor(model, LAYERS)
    for options, message in (
        ({"prompts": ["a", "b"]}, "prompts: got 2 for 5 images"),
        ({"prompts": ["a", "b", "c", "d", 1]}, r"prompts\[4\] is of type int"),
        ({"seeds": [1]}, "seeds: got 1 for 5 images"),
        ({"out": {}}, "out: holds nothing"),
        ({"out": extractor.extract(images[:1])}, r"out: .* expected \(5, 1, 128, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            extractor.extract(images, **options)
    # At the call, not at the first image.
    with pytest.raises(ValueError, match="images: got one ndarray"):
        extractor.extract_iter(images[0])
    for one in (images[0], Path("a.png")):
        with pytest.raises(ValueError, match="images: got one"):
            extractor.extract(one)
    with pytest.raises(ValueError, match="techniques: got none"):
        extractor.extract_each(images, [])
    with pytest.raises(ValueError, match="components: got 97, expected 1 to 96"):
        extractor.fit_pca(images, 97)
    with pytest.raises(ValueError, match="denoise_from: got 60, expected above the timesteps"):
        FeatureExtractor(model, LAYERS, [70], technique=Technique(denoise_from=60))
    with pytest.raises(ValueError, match="inversion draws no noise"):
        FeatureExtractor(model, LAYERS, draws=2, technique=Technique(inversion=True))


def test_controls_add_their_residuals_to_every_row(model, images):
    from dsd_fast.models.controlnet import Control, control_residuals

    controls = tuple(
        Control(each, scale=scale) for each, scale in ((tiny_net(model, 0), 0.5), (tiny_net(model, 1), 1.5))
    )
    prompts = ["a red circle", "", "a blue ring"]
    extractor = FeatureExtractor(model, LAYERS, [50, 200], draws=2, technique=Technique(controls=controls))
    found = extractor.extract(images[:3], prompts)
    plan = UNetProgram(model.unet).plan(features=LAYERS)
    for n, image in enumerate(images[:3]):
        with torch.no_grad():
            picture = dsd_fast.images.load_image(image)
            clean = model.encode_images(to_tensor(picture, (64, 64))[None])
            states = model.encode_prompts([prompts[n]]).states
            edges = [control.prepare(picture, (64, 64))[None] for control in controls]
            both = []
            for d in range(2):
                z = model.schedule.add_noise(clean, noise(0, d, clean.shape[1:])[None], 200)
                residuals = control_residuals(controls, edges, z, 200, states)
                both.append(plan.run(z, 200, plan.encode_text(states), residuals=residuals).features)
        for name in LAYERS:
            close(found[name][n, 1], (both[0][name][0] + both[1][name][0]) / 2)
    plain = FeatureExtractor(model, LAYERS, [50, 200], draws=2).extract(images[:3], prompts)
    assert (plain[LAYERS[0]] - found[LAYERS[0]]).abs().max() > 1e-2


def tiny_net(model, seed):
    from diffusers import ControlNetModel

    from tests.tiny import trained_like

    net = ControlNetModel.from_unet(model.unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 8, 8))
    return trained_like(net, seed).eval().requires_grad_(False)


def test_noise_of_a_schedulers_steps_is_of_the_images_seed(model, images):
    """Of a scheduler that draws at each step: by (seed, draw), whatever else is computed, and never what was drawn."""
    own = model.with_scheduler(diffusers.EulerAncestralDiscreteScheduler.from_config(model.scheduler_config))
    walk = Technique(denoise_from=53, adapter=())
    extractor = FeatureExtractor(
        own, LAYERS[:1], [50], official_timesteps=True, technique=walk, draws=2, keep_draws=True
    )
    (both,) = extractor.extract(images[:2], seeds=[7, 8]).values()
    (alone,) = extractor.extract(images[1:2], seeds=[8]).values()
    torch.testing.assert_close(alone, both[1:], rtol=0, atol=1e-5 * float(both.abs().max()))
