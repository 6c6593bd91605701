"""Generation on a CUDA device."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

import dsd_fast as dsd
from dsd_fast.generation.export import generate_to
from dsd_fast.generation.files import read_images
from dsd_fast.jobs import read_index

pytestmark = pytest.mark.gpu

ROWS = [
    dsd.GenerateRow("a large red circle", 3, guidance=3.0),
    dsd.GenerateRow("a small blue ring", 4, guidance=1.0),
    dsd.GenerateRow("a photo of the digit three", 5, negative_prompt="a cross", guidance=4.0, guidance_rescale=0.5),
]
# Of a latent, relative to the largest: each of the steps adds a float32 prediction's 2e-5, which guidance magnifies.
FLOAT32 = 1e-3


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


def latents(model, runtime=None, **options):
    sampler = dsd.Sampler(model, dsd.GenerateConfig(steps=4, **options))
    if runtime is not None:
        sampler.compile(runtime)
    return sampler.latents([sampler.resolve(row) for row in ROWS]).cpu()


@pytest.mark.parametrize("options", [{"scheduler": "ddim"}, {"scheduler": "euler-a"}, {"cache_interval": 2}], ids=str)
def test_latents_are_those_of_the_cpu(model, on_cpu, options):
    wanted = latents(on_cpu, **options)
    assert (latents(model, **options) - wanted).abs().max() <= FLOAT32 * wanted.abs().max()


def test_recorded_steps_are_eager_ones(model):
    wanted = latents(model, scheduler="ddim")
    assert (latents(model, "cudagraph", scheduler="ddim") - wanted).abs().max() <= FLOAT32 * wanted.abs().max()


def test_a_folder_holds_the_images_that_come_without_one(model, tmp_path):
    sampler = dsd.Sampler(model, dsd.GenerateConfig(steps=4))
    generate_to(sampler, ROWS, tmp_path, shard_rows=2)
    made = list(dsd.generate(model, ROWS, dsd.GenerateConfig(steps=4)))
    for image, row in zip(made, read_index(tmp_path).to_pylist(), strict=True):
        ((content, _),) = read_images(tmp_path, [row["id"]])
        with Image.open(io.BytesIO(content)) as kept:
            assert np.abs(np.asarray(kept, int) - np.asarray(image, int)).max() <= 1
