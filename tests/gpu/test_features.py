"""Feature extraction on a CUDA device."""

import pytest
import torch

pytest.importorskip("diffusers")

import dsd_fast as dsd
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.features.inputs import Prompts
from dsd_fast.models.mini.scenes import scene

pytestmark = pytest.mark.gpu

IMAGES = [scene(1_000_000_000 + seed).image for seed in range(6)]
PROMPTS = ["", "a red circle", "a blue ring", "", "a photo of the digit three", "a red circle"]
TIMESTEPS = [0, 50, 500]
# float32 sums of at most 9 · 1,280 products, in another order: 2⁻²⁴ · √11,520, on both devices.
FLOAT32 = 2e-5


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini", device="cuda", local_files_only=True)


@pytest.fixture(scope="module")
def on_cpu():
    return dsd.load("mini", local_files_only=True)


def worst(found, wanted):
    """Largest difference of all features, each relative to its largest value."""
    pairs = [(found[name].cpu().double(), wanted[name].cpu().double()) for name in wanted]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"draws": 2, "resize": (16, 16), "normalize": True},
        {"attention": ["up_cross", "down_self"]},
        {"pool": "max"},
        {"technique": Technique(inversion=True)},
        {"technique": Technique(denoise_from=510, denoise_steps=4)},
    ],
    ids=str,
)
def test_features_are_those_of_the_cpu(model, on_cpu, options):
    here, there = (FeatureExtractor(each, timesteps=TIMESTEPS, **options) for each in (model, on_cpu))
    assert worst(here.extract(IMAGES, PROMPTS), there.extract(IMAGES, PROMPTS)) <= FLOAT32


@pytest.mark.parametrize("runtime", ["inductor", "cudagraph"])
def test_compiled_features_are_the_eager_ones(model, runtime):
    eager = FeatureExtractor(model, timesteps=TIMESTEPS).extract(IMAGES, PROMPTS)
    compiled = FeatureExtractor(model, timesteps=TIMESTEPS).compile(runtime)
    for _ in range(2):
        assert worst(compiled.extract(IMAGES, PROMPTS), eager) <= FLOAT32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_good_as_diffusers_own(on_cpu, dtype):
    from dsd_fast.reference import features as reference

    half = dsd.load("mini", device="cuda", dtype=dtype, local_files_only=True)
    exact = FeatureExtractor(on_cpu, timesteps=TIMESTEPS).extract(IMAGES)
    extractor = FeatureExtractor(half, timesteps=TIMESTEPS)
    stock = reference.extract(half.to_pipeline(), IMAGES, layers=extractor.layers, timesteps=TIMESTEPS, batch_size=6)
    # Both round at the same places, in another order: twice the error of the stock way, and one rounding of the type.
    floor = float(torch.finfo(getattr(torch, dtype)).eps)
    assert worst(extractor.extract(IMAGES), exact) <= 2 * worst(stock, exact) + floor


def test_a_tight_budget_and_repeats(model):
    extractor = FeatureExtractor(model, timesteps=TIMESTEPS)
    whole = extractor.extract(IMAGES, PROMPTS)
    row = extractor.plan.run_bytes(2, 16, 16, 24)
    tight = FeatureExtractor(model, timesteps=TIMESTEPS, memory_budget=8 * row)
    assert worst(tight.extract(IMAGES, PROMPTS), whole) <= FLOAT32
    again = extractor.extract(IMAGES, PROMPTS)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_an_extraction_waits_for_nothing(model):
    extractor, prompts = FeatureExtractor(model, timesteps=TIMESTEPS), Prompts(PROMPTS)
    (inputs, _), *_ = extractor.encode(IMAGES, prompts)
    found = extractor.features_of(inputs, prompts)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = extractor.features_of(inputs, prompts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(again[name], found[name]) for name in found)
