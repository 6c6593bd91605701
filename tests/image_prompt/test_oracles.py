"""The converter against its formulas, written again in float64, and against the official way."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter
from dsd_fast.reference import image_prompt as reference

PROMPTS = ["", "a red circle", "a small blue ring left of a large green square"]
# Some of the singular values are below it, most above.
CUT, NORM = 0.3, 27.5


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini", local_files_only=True)


@pytest.fixture(scope="module")
def converter(model):
    return ImagePromptConverter(model, config=ImagePromptConfig(cut=CUT, norm=NORM))


@pytest.fixture(scope="module")
def pooled(model):
    """Pooled states like those of images, (4, V) float64."""
    return torch.randn(
        4, model.clip.config.vision_config.hidden_size, generator=torch.Generator().manual_seed(0)
    ).double()


def pictures():
    """Upright, lying and square; larger and smaller than CLIP's input."""
    draw = np.random.default_rng(2).integers
    coarse = [draw(0, 255, (*size, 3), dtype=np.uint8) for size in ((13, 8), (5, 9), (4, 4))]
    return [Image.fromarray(each).resize((each.shape[1] * 11, each.shape[0] * 11)) for each in coarse]


def weights(model):
    return (part.weight.detach().double() for part in (model.clip.text_projection, model.clip.visual_projection))


def test_the_map_is_that_of_an_explicit_decomposition(model, converter, pooled):
    text, vision = weights(model)
    values, vectors = torch.linalg.eigh(text.T @ text)  # W_T = U S Vᵀ: V S² Vᵀ
    kept = values.clamp(min=0).sqrt() > CUT
    assert 0 < kept.sum() < len(kept)
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T @ text.T
    torch.testing.assert_close(converter.map.matrix, inverse @ vision, rtol=0, atol=1e-9 * float(inverse.abs().max()))
    u = converter.map.mapped(pooled)
    # What is projected again is the part of the image's embedding that lies in the kept left singular space.
    embeds = torch.nn.functional.normalize(pooled @ vision.T, dim=1)
    left = text @ vectors[:, kept] / values[kept].sqrt()
    torch.testing.assert_close(u @ text.T, embeds @ left @ left.T, rtol=0, atol=1e-9)


def test_vectors_have_the_norm_whatever_the_length_of_the_pooled_state(converter, pooled):
    vectors, more = converter.vectors_of(pooled)
    assert more is None
    torch.testing.assert_close(vectors.norm(dim=1), torch.full((4,), NORM), rtol=1e-6, atol=0)
    torch.testing.assert_close(converter.vectors_of(1000 * pooled)[0], vectors, rtol=0, atol=1e-5)
    torch.testing.assert_close(converter.vectors_of(pooled, 3.0)[0], vectors * 3 / NORM, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("call", "alpha"), [("convert", 0.0), ("edit", 0.6), ("edit", 0.0)])
def test_states_are_the_official_ones(model, converter, call, alpha):
    options = {} if call == "convert" else {"alpha": alpha}
    pipe = model.to_pipeline()
    found = getattr(converter, call)(pictures(), PROMPTS, **options).embeds
    right = getattr(reference, call)(pipe, model.clip, pictures(), PROMPTS, **options, cut=CUT, norm=NORM)
    # float32, of numbers up to 20: towers whose batches are of other sizes.
    torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
    texts = [model.encode_prompts([text]) for text in PROMPTS]
    vectors = converter.vectors_of(converter.pooled(torch.stack(list(converter.prepared(pictures())))))[0]
    for row, text in enumerate(texts):
        for place in range(found.shape[1]):
            own = text.states[0, place]
            wanted = own if place < int(text.lengths) - 1 else vectors[row] + alpha * own
            torch.testing.assert_close(found[row, place], wanted, rtol=0, atol=1e-5)


def test_an_image_is_itself_whatever_goes_with_it(converter):
    together = converter.convert(pictures(), PROMPTS)
    for number, (image, prompt) in enumerate(zip(pictures(), PROMPTS, strict=True)):
        alone = converter.convert([image], prompt)
        torch.testing.assert_close(alone.embeds, together[number].embeds, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["convert", "edit"])
def test_arguments_have_the_same_names(name):
    """What the reference has besides: a pipeline, its CLIP, and the settings."""
    theirs = inspect.signature(getattr(reference, name)).parameters
    ours = inspect.signature(getattr(ImagePromptConverter, name)).parameters
    assert set(theirs) - set(ours) == {"pipe", "clip", "recipe"}
    assert [each for each in theirs if each in ours] == [each for each in ours if each in theirs]
    assert all(theirs[each].default == ours[each].default for each in theirs if each in ours)
    settings = set(inspect.signature(reference.vectors).parameters) & set(
        inspect.signature(ImagePromptConfig).parameters
    )
    assert settings == {"cut", "norm"}
