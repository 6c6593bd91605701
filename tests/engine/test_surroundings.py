"""What the caller's program is under (types, devices, modes) changes no answer of the main calls."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dsd_fast as dsd
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.features.gate import gate
from dsd_fast.features.pca import PCA
from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler
from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter
from dsd_fast.models.controlnet import Control, load_controlnet
from tests.surroundings import SURROUNDINGS

IMAGES = [np.full((64, 64, 3), colour, np.uint8) for colour in ((220, 30, 30), (30, 60, 220))]
TEXTS = ["a large red circle", "a large blue circle"]
GROUPS = [(IMAGES[0], TEXTS, 0), (IMAGES[1], TEXTS, 1)]
LAYER = "up-level1-repeat0-vit-out"


def matcher(model, **settings):
    return dsd.Matcher(model, dsd.MatchConfig(**({"timesteps": [500]} | settings)), adapter=())


def loaded(folder):
    model = dsd.load("mini")
    model.load_lora("mini", "lora")
    return dsd.Matcher(model, dsd.MatchConfig(timesteps=[500])).score(IMAGES, TEXTS)


def scored(folder):
    model = dsd.from_pipeline(MODEL.to_pipeline())
    one = matcher(model, timesteps=4)
    ranked = [each["score"] for each in one.rank(text=TEXTS[0], images=IMAGES)]
    return torch.cat([one.score(IMAGES, TEXTS).flatten(), one.predict([(IMAGES[0], TEXTS[1])]), like(ranked)])


def mapped(folder):
    return torch.from_numpy(np.stack([each[2] for each in matcher(MODEL).heatmap(IMAGES[0], TEXTS[0])]))


def extracted(folder):
    way = dsd.Technique(
        controls=(Control(load_controlnet(), condition=None),), denoise_from=300, denoise_steps=2, adapter=()
    )
    features = dsd.FeatureExtractor(MODEL, [LAYER], timesteps=(50,), technique=way).extract(IMAGES, TEXTS[0])[LAYER]
    return PCA.fit(features[:, 0], 2).transform(features[:, 0])


def exported(folder):
    way = dsd.Technique(inversion=True, adapter=())
    dsd.FeatureExtractor(MODEL, [LAYER], timesteps=(50,), technique=way).extract_to(folder / "features", IMAGES[:1])
    (shard,) = (folder / "features").rglob("*.safetensors")
    return torch.cat([value.flatten() for _, value in sorted(load_file(shard, device="cpu").items())])


def guided(folder):
    extractor = dsd.FeatureExtractor(MODEL, [LAYER], timesteps=(50,))
    control = dsd.Technique("edges", prompts=TEXTS[0], controls=(Control(load_controlnet(), condition=None),))
    result = gate(extractor, IMAGES[:1], [control], steps=3)
    return like([value for row in result.rows() for value in row.values() if isinstance(value, float)])


def generated(folder):
    row = GenerateRow(TEXTS[0], 1, image=IMAGES[0], conditions=(IMAGES[0],), guidance_rescale=0.5)
    made = []
    for name in ("pndm", "lcm"):
        config = GenerateConfig(steps=2, guidance=3.0, scheduler=name, adapter=(), guidance_interval=(1.0, 9.0))
        one = Sampler(MODEL, config, controls=[Control(load_controlnet(), condition=None)])
        made.append(one.latents([one.resolve(GenerateRow(TEXTS[1]))]))
    return torch.cat([each.flatten() for each in (*made, one.pixels([one.resolve(row)]))])


def fitted(folder):
    config = dsd.FitConfig(steps=2, batch_size=2, lora_dropout=0.2)
    one = matcher(MODEL)
    one.fit(GROUPS, method=("lora", "prompt", "heads"), config=config, validation=GROUPS, out=folder, progress=False)
    return torch.cat([one.score(IMAGES, TEXTS), dsd.Matcher.load(folder, MODEL).score(IMAGES, TEXTS)])


def converted(folder):
    shapes = ("circle", "ring", "cross", "square")
    texts = tuple(f"a {colour} {shape}" for colour in ("red", "blue") for shape in shapes)
    config = ImagePromptConfig("prior", captions=texts)
    one = ImagePromptConverter(MODEL, config=config)
    one.convert_to(folder, IMAGES[:1])
    again = ImagePrompt.load(folder)
    pooled = one.pooled(torch.stack(list(one.prepared(IMAGES[1:]))))
    return torch.cat([again.embeds, one.edit(IMAGES, TEXTS, 0.5).embeds, one.vectors_of(pooled)[0].expand(1, 24, -1)])


def like(values):
    return torch.tensor(values, dtype=torch.float32, device="cpu")


CALLS = (loaded, scored, mapped, extracted, exported, guided, generated, fitted, converted)
MODEL = None


@pytest.fixture(scope="module", autouse=True)
def model():
    global MODEL
    MODEL = dsd.load("mini")
    MODEL.load_lora("mini", "lora")
    yield
    MODEL = None


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    return {call: call(tmp_path_factory.mktemp("plain")) for call in CALLS}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_the_main_calls_answer_as_ever(call, surroundings, plain, tmp_path):
    with ExitStack() as stack:
        for context in surroundings():
            stack.enter_context(context)
        got = call(tmp_path)
    want = plain[call]
    assert want.isfinite().all()
    assert (got.dtype, got.device, got.is_inference() and not got.requires_grad) == (
        want.dtype,
        want.device,
        got.is_inference(),
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_what_was_made_in_inference_mode_is_fitted_or_named():
    config = dsd.FitConfig(steps=1, batch_size=2)
    with torch.inference_mode():
        model = dsd.load("mini")
        model.load_lora("mini", "lora")
        one = dsd.Matcher(model, dsd.MatchConfig(timesteps=[500]))
        one.score(IMAGES, TEXTS)
    one.fit(GROUPS, method=("lora", "prompt", "heads"), config=config, progress=False)
    with torch.inference_mode():
        model.unet.conv_in.weight = torch.nn.Parameter(model.unet.conv_in.weight.clone(), requires_grad=False)
    with pytest.raises(ValueError, match=r"fit: unet\.conv_in\.weight was made under torch\.inference_mode"):
        dsd.Matcher(model, dsd.MatchConfig(timesteps=[500])).fit(GROUPS, method="lora", config=config, progress=False)
