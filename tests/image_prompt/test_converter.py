"""Images to prompts: the official computation, other inverses, blends, towers that are not CLIP's."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, CLIPModel

import dsd_fast as dsd
from dsd_fast.engine.clip import ClipSpace
from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter, mapping
from dsd_fast.image_prompt.captions import SETS, captions_of
from dsd_fast.images import ImageError
from dsd_fast.models.mini.scenes import HELD_OUT, scene
from tests.tiny import tiny_clip, tiny_pipeline

# Of sums of a hundred float32 products, each rounded, through three layers.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(scope="module")
def converter(model):
    return ImagePromptConverter(model)


@pytest.fixture(scope="module")
def pictures():
    draw = np.random.default_rng(0)
    return [scene(3).image, *(draw.integers(0, 256, (*size, 3), np.uint8) for size in ((97, 64), (70, 113)))]


def official(model, images, norm, cut):
    """(N, E), as the official script computes it, one image at a time, but in float64 where it has half."""
    clip = model.clip
    processor = AutoImageProcessor.from_pretrained(clip.name_or_path)
    text, visual = clip.text_projection.weight.double(), clip.visual_projection.weight.double()
    inverse = torch.linalg.pinv(text, atol=cut)
    rows = []
    for image in images:
        with torch.no_grad():
            pooled = clip.vision_model(processor(images=image, return_tensors="pt")["pixel_values"]).pooler_output
        u = inverse @ (visual @ pooled[0].double())
        rows.append(norm * u / u.norm())
    return torch.stack(rows)


def close(got, want, tolerance=CLOSE):
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance * float(want.abs().max()))


def test_vectors_are_those_of_the_official_script(model, pictures):
    converter = ImagePromptConverter(model, config=ImagePromptConfig(cut=0.3, norm=27.5, batch=2))
    prompt = converter.convert(pictures)
    close(prompt.vectors, official(model, pictures, 27.5, 0.3))
    assert prompt.names == ("0", "1", "2")
    assert converter.map.inverse.kept == int((torch.linalg.svdvals(model.clip.text_projection.weight) > 0.3).sum())
    assert prompt.settings["cut"] == 0.3
    assert prompt.settings["norm"] == 27.5


def test_the_norm_is_that_of_the_captions_ends(model, converter, pictures):
    states = model.encode_prompts(captions_of("scenes"))
    ends = states.states[torch.arange(len(states)), states.lengths - 1]
    want = float(ends.double().norm(dim=1).mean())
    assert converter.map.norm == pytest.approx(want, rel=5e-4)
    close(converter.convert(pictures).vectors.norm(dim=1), torch.full((3,), converter.map.norm))
    close(converter.convert(pictures, norm=2.0).vectors.norm(dim=1), torch.full((3,), 2.0))


@pytest.mark.parametrize("inverse", ["ridge", "prior"])
def test_other_inverses(model, pictures, inverse):
    config = ImagePromptConfig(inverse=inverse, cut=0.5)
    converter = ImagePromptConverter(model, config=config)
    w = model.clip.text_projection.weight.double()
    with torch.no_grad():
        z = ClipSpace(model, resize="crop").of_images(pictures).double()
    if inverse == "ridge":
        u = torch.linalg.solve(w.mT @ w + 0.25 * torch.eye(128, dtype=torch.float64), w.mT) @ z.mT
    else:
        states = model.encode_prompts(captions_of("scenes"))
        e = states.states[torch.arange(len(states)), states.lengths - 1].double()
        m = e.mT @ e / len(e)
        seen = w @ m @ w.mT + 0.25 * m.trace() / 128 * torch.eye(128, dtype=torch.float64)
        u = m @ w.mT @ torch.linalg.inv(seen) @ z.mT
    close(converter.convert(pictures).vectors, converter.map.norm * F.normalize(u.mT, dim=1))
    assert converter.map.settings()["kept"] is None


def test_a_prior_that_is_alike_in_all_directions_is_a_ridge():
    w, basis = (torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    states = torch.linalg.qr(basis).Q * 8**0.5  # of second moment I
    torch.testing.assert_close(mapping.prior(w, states)(0.5).matrix, mapping.ridge(w)(0.5).matrix)


def test_without_a_cut_what_rounding_left_of_nothing_is_left_out():
    w = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w[0] = w[1]
    inverse = mapping.truncated(w)(0.0)
    assert inverse.kept == 7
    torch.testing.assert_close(inverse.matrix, torch.linalg.pinv(w))


def test_the_cut_that_is_chosen_finds_captions_better_than_none(model):
    # Of other captions than it was chosen on, from their embeddings with noise.
    texts = tuple(scene(seed).caption for seed in range(5000, 5100))
    space = ClipSpace(model)
    with torch.no_grad():
        e, z = space.text_states(texts).double(), space.of_texts(texts).double()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = F.normalize(z + 0.5 * noise / 128**0.5, dim=1)
    for inverse in ("truncated", "ridge", "prior"):
        chosen = ImagePromptConverter(model, config=ImagePromptConfig(inverse=inverse)).map.inverse
        w = model.clip.text_projection.weight.double()
        plain = F.cosine_similarity(torch.linalg.solve(w, z.mT).mT, e, dim=1).mean()
        assert float(F.cosine_similarity(z @ chosen.matrix.mT, e, dim=1).mean()) > float(plain) + 0.3


def test_clip_l_has_the_official_constants(model, monkeypatch):
    vision = model.clip.config.vision_config
    sizes = (128, vision.hidden_size, vision.num_hidden_layers, vision.patch_size)
    monkeypatch.setattr(mapping, "_VIT_L", sizes)
    # Its own norm is 11.2: another network of these sizes.
    told = ImagePromptConverter(model).map.settings()
    assert told["norm"] == pytest.approx(11.18, abs=0.01)
    monkeypatch.setattr(mapping, "_NORM", 12.0)
    told = ImagePromptConverter(model).map.settings()
    assert (told["norm"], told["cut"], told["kept"]) == (12.0, 0.3, 107)
    assert ImagePromptConverter(model, config=ImagePromptConfig(inverse="ridge")).map.settings()["cut"] != 0.3


def test_edits_keep_words_and_add_states(model, converter, pictures):
    texts = ["a red ring", "", "a small blue cross left of a red ring"]
    prompt = converter.edit(pictures, texts, alpha=0.5)
    own, h = model.encode_prompts(texts), converter.convert(pictures).vectors
    for number, end in enumerate((own.lengths - 1).tolist()):
        close(prompt.embeds[number, :end], own.states[number, :end])
        close(prompt.embeds[number, end:], h[number] + 0.5 * own.states[number, end:])
    kept = converter.convert(pictures, texts)
    close(kept.embeds[2, int(own.lengths[2]) - 1 :], h[2].expand(len(own.states[2]) - int(own.lengths[2]) + 1, -1))
    assert kept == converter.edit(pictures, texts, alpha=0)


def test_blends_mix_before_the_length(converter, pictures):
    # Of embeddings of unit length, so that none counts more than its weight.
    with torch.no_grad():
        embeds = ClipSpace(converter.model, resize="crop").of_images(pictures[:2])
    one, two = embeds.double() @ converter.map.inverse.matrix.mT
    got = converter.blend([pictures[:2], pictures[:1]], [[0.75, 0.25], [2.0]], names=("mixed", "one"))
    want = F.normalize(torch.stack([0.75 * one + 0.25 * two, one]), dim=1)
    close(got.vectors, converter.map.norm * want)
    assert got.names == ("mixed", "one")
    close(converter.blend([pictures[:2]]).vectors, converter.map.norm * F.normalize((one + two)[None], dim=1))
    away = converter.blend([pictures[:2]], [1.0, -0.5], "a red ring", alpha=0.6)
    assert (away.alpha, len(away.ends)) == (0.6, 1)
    for weights, message in (
        ([1.0], r"weights: got \[1.0\] for 2 images of groups\[0\]"),
        ([1.0, float("nan")], "expected one number each"),
        ([[0.5, 0.5], [1.0]], "weights: got 2 for 1 groups"),
        ([0.0, 0.0], "cancel each other"),
    ):
        with pytest.raises(ValueError, match=message):
            converter.blend([pictures[:2]], weights)
    with pytest.raises(ValueError, match=r"groups\[0\] is empty"):
        converter.blend([[]])


def test_vectors_have_a_gradient_through_norm_and_map(model):
    with torch.inference_mode():
        converter = ImagePromptConverter(model, config=ImagePromptConfig(cut=0.5))
        assert converter.map.norm > 0
        assert len(converter.map.matrix) == 128
    pooled = torch.randn(2, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    vectors, none = converter.vectors_of(pooled)
    assert none is None
    torch.testing.assert_close(vectors, converter.vectors_of(3 * pooled)[0])
    weigh = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    want = converter.map.norm * F.normalize(pooled @ converter.map.matrix.clone().mT, dim=1)
    got, wanted = (torch.autograd.grad((each * weigh).sum(), pooled)[0] for each in (vectors, want))
    close(got, wanted)


class Constant(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.ones(128))

    def forward(self, prepared):
        return self.weight.expand(len(prepared), -1)


def test_settings_are_the_same_on_every_machine(model, monkeypatch):
    """Another processor, or more threads, adds in another order."""
    one = ImagePromptConverter(model).settings()
    states = mapping.StateMap._clip_states
    monkeypatch.setattr(mapping.StateMap, "_clip_states", lambda *args: states(*args) * (1 + 1e-9))
    real = mapping.truncated
    monkeypatch.setattr(mapping, "truncated", lambda projection: real(projection * (1 + 1e-15)))
    assert ImagePromptConverter(model).settings() == one
    assert one["norm"] == 11.18


def test_another_vision_tower_is_used(converter, pictures):
    got = converter.with_vision(Constant(converter.vision.config)).convert(pictures).vectors
    assert torch.equal(got[0], got[1])
    assert not torch.equal(got[0], converter.convert(pictures).vectors[0])


def test_what_is_refused(model, converter, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"clip: got None, and mini has none; expected a CLIPModel, a folder"):
        ImagePromptConverter(model.with_clip(None))
    for given, message in (
        ({"alpha": float("inf")}, "alpha: got inf, expected a finite number"),
        ({"norm": 0}, "norm: got 0, expected a finite number above 0"),
        ({"names": ("a",)}, "names: got 1 for 3 images"),
    ):
        with pytest.raises(ValueError, match=message):
            converter.edit(pictures, "", **given)
    broken = iter(())  # of which none may be asked for
    for prompts, message in (
        ([""], "prompts: got 1 for 3 images"),
        (["", "word " * 30, ""], r"prompts\[1\]: the prompt has"),
        (["", "", 3], r"prompts\[2\]: got int"),
        (None, "prompts: got NoneType, expected a text"),
    ):
        with pytest.raises(ValueError, match=message):
            converter.convert([broken] * 3, prompts)
    with pytest.raises(ValueError, match="images: got one"):
        converter.convert(pictures[0])
    with pytest.raises(ImageError, match="source is a NoneType"):
        converter.convert([pictures[0], None])
    assert len(converter.convert([])) == 0
    # Resized, 64 × 1,920,000 pixels.
    thin = np.zeros((1, 30_000, 3), np.uint8)
    assert [type(row) for row in next(converter.mapped_chunks([None, thin]))] == [ImageError] * 2
    with pytest.raises(ValueError, match=r"cut: got 100, expected one below CLIP's largest singular value, \d"):
        ImagePromptConverter(model, config=ImagePromptConfig(cut=100)).convert(pictures)
    for field, value in (("inverse", "exact"), ("cut", -1), ("norm", 0), ("captions", "words"), ("batch", 0)):
        with pytest.raises(ValueError, match=f"{field}: got"):
            ImagePromptConfig(**{field: value})


def test_numbers_that_are_not_finite_are_an_error_of_their_image(converter, pictures):
    class Overflow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, prepared):
            pooled = prepared.mean((1, 2, 3), keepdim=True)[..., 0, 0].expand(-1, 128).clone()
            pooled[1] = float("inf")
            return pooled

    (chunk,) = converter.with_vision(Overflow()).mapped_chunks(pictures)
    assert [isinstance(row, ImageError) for row in chunk] == [False, True, False]
    assert str(chunk[1]).startswith("CLIP makes no finite numbers of image 1")


def test_the_preprocessing_is_the_files(model, tmp_path, pictures):
    model.clip.save_pretrained(tmp_path)
    said = {"size": 70, "crop_size": 64, "resample": 2, "image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(said | {"image_processor_type": "CLIPImageProcessor"})
    )
    converter = ImagePromptConverter(model, tmp_path)
    for image in pictures:
        want = AutoImageProcessor.from_pretrained(tmp_path)(images=image, return_tensors="pt")["pixel_values"]
        close(next(converter.prepared([image]))[None], want, 1e-6)
    # As a whole processor is saved by transformers 5.
    nested = {"processor_class": "CLIPProcessor", "image_processor": said | {"image_mean": [0.3] * 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    shifted = next(ImagePromptConverter(model, tmp_path).prepared([image]))
    close(shifted[None], want + 0.1 / 0.2, 1e-6)
    (tmp_path / "processor_config.json").unlink()
    for wrong, message in (
        ("{", "cannot be read as the config"),
        ('{"crop_size": 32}', r"makes pictures of \(32, 32\)"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            ClipSpace(converter.model)


def penultimate(encoder):
    """The same tower without its last layer, as SD 2.x has it."""
    layers = getattr(encoder, "text_model", encoder).encoder.layers
    del layers[-1]
    encoder.config.num_hidden_layers -= 1
    return encoder


def test_a_tower_that_is_not_clips_is_fitted_to_captions():
    pipe, clip = tiny_pipeline("sd15"), tiny_clip()
    inside = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    inside.load_state_dict(clip.text_model.state_dict(), strict=False)
    exact = ImagePromptConverter(dsd.from_pipeline(pipe, clip=clip))
    assert exact.map.exact
    assert exact.map.quality == {}
    penultimate(pipe.text_encoder)
    model = dsd.from_pipeline(pipe, clip=clip)
    config = ImagePromptConfig(captions=captions_of("things")[:512])
    converter = ImagePromptConverter(model, config=config)
    assert not converter.map.exact
    told = converter.settings()
    assert told["inverse"] == "fitted"
    for given in ({"cut": 0.5}, {"inverse": "ridge"}):
        with pytest.raises(ValueError, match=r"inverse, cut: got .* fitted to captions takes the place of an inverse"):
            ImagePromptConverter(model, config=ImagePromptConfig(captions=config.captions, **given))
    assert told["quality"]["r2"] > 0.2
    # Held-out captions, by hand.
    texts, out = config.captions, np.arange(512) % 8 == 0
    with torch.no_grad():
        states = model.encode_prompts(texts)
        e = states.states[torch.arange(512), states.lengths - 1].double().numpy()
        z = ClipSpace(model).of_texts(texts).double().numpy()
    x, y = z[~out], e[~out]
    b = np.linalg.solve(x.T @ x / len(x) + (0.9**-2 - 1) / 16 * np.eye(16), x.T @ y / len(x))
    error = z[out] @ b - e[out]
    r2 = 1 - (error**2).sum() / ((e[out] - e[~out].mean(0)) ** 2).sum()
    assert told["quality"]["r2"] == pytest.approx(r2, rel=5e-4)


def test_sdxl_has_pooled_states_of_their_own_length(pictures):
    model = dsd.from_pipeline(tiny_pipeline("sdxl"), clip=tiny_clip())
    converter = ImagePromptConverter(model, config=ImagePromptConfig(captions=captions_of("things")[:256]))
    with torch.no_grad():
        states = model.encode_prompts(captions_of("things")[:256])
        more = model.encode_prompts(["", "red dog", "cat"]).pooled
    prompt = converter.edit(pictures, ["", "red dog", "cat"], alpha=0.5)
    bare = converter.convert(pictures)
    assert bare.vectors.shape == (3, 56)
    close(bare.pooled.norm(dim=1), states.pooled.norm(dim=1).mean().expand(3), 5e-4)
    close(prompt.pooled, bare.pooled + 0.5 * more)
    assert converter.settings()["quality"].keys() == {"r2", "cosine", "pooled_r2", "pooled_cosine"}


def test_a_map_that_finds_nothing_is_refused():
    # Whose embeddings tell of the texts' first words alone, which its captions share.
    model = dsd.from_pipeline(tiny_pipeline("sd21"), clip=tiny_clip())
    with pytest.raises(ValueError, match=r"finds those of others no better than their mean does \(R² -"):
        ImagePromptConverter(model, config=ImagePromptConfig(captions=("dog", "cat", *(f"{n}" for n in range(6)))))


def test_captions_that_are_too_long_are_left_out_of_sets_alone(model):
    # Its tokenizer has 24 tokens, and not the words of "things".
    converter = ImagePromptConverter(dsd.from_pipeline(model.to_pipeline(), clip=model.clip))
    assert converter.map.settings()["captions"] == "things"
    assert converter.map.norm == pytest.approx(11.18, rel=0.02)
    texts = (*"abcdefg", "word " * 30)
    with pytest.raises(ValueError, match=r"captions\[7\]: the prompt has \d+ tokens"):
        ImagePromptConverter(model, config=ImagePromptConfig(captions=texts))


def test_sets_of_captions_are_the_same_and_leave_held_out_pairs_alone():
    assert len(captions_of("things")) == 1024
    assert captions_of("things")[0] == SETS["things"]()[0]
    for colour, shape in HELD_OUT:
        assert not any(f"{colour} {shape}" in text for text in captions_of("scenes"))


def test_a_clip_by_folder_takes_the_models_type(model, tmp_path):
    model.clip.save_pretrained(tmp_path)
    half = dsd.load("mini", dtype="bfloat16")
    converter = ImagePromptConverter(half, tmp_path)
    assert isinstance(converter.model.clip, CLIPModel)
    assert converter.model.clip.dtype == torch.bfloat16
    assert half.clip is not converter.model.clip
    assert converter.map.exact
    assert converter.convert([scene(3).image]).vectors.dtype == torch.bfloat16
