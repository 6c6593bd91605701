"""Images as prompts on a CUDA device."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

import dsd_fast as dsd
from dsd_fast.bench.case import Context
from dsd_fast.bench.suites import prompts as suite
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.image_prompt import ImagePromptConverter, TuneConfig
from dsd_fast.models.mini.scenes import scene
from dsd_fast.unet import UNetProgram

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# Of a prediction, relative to the largest, as in the tests of runtimes.
FLOAT32 = 5e-5
PICTURES = [Image.fromarray(scene(number).image) for number in range(5)]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def converter(device=None, dtype="float32"):
    return ImagePromptConverter(dsd.load("mini", device=device or DEVICE, dtype=dtype, local_files_only=True))


def test_prompts_are_those_of_the_cpu():
    here, there = converter(), converter("cpu")
    texts = ["", "a red circle", "a blue ring", "", "a small green square above a red cross"]
    for alpha in (0.0, 0.6):
        found, right = here.edit(PICTURES, texts, alpha), there.edit(PICTURES, texts, alpha)
        assert found.vectors.device.type == DEVICE
        # float32, of numbers of some units.
        torch.testing.assert_close(found.embeds.cpu(), right.embeds, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    found, right = converter(dtype=dtype).convert(PICTURES).vectors, converter("cpu").convert(PICTURES).vectors
    assert str(found.dtype) == f"torch.{dtype}"
    assert torch.cosine_similarity(found.cpu().float(), right).min() > (0.99 if dtype == "bfloat16" else 0.999)


@pytest.mark.parametrize("runtime", [None, "inductor", "cudagraph"])
def test_the_short_form_is_the_long_form(runtime):
    model = dsd.load("mini", device=DEVICE, local_files_only=True)
    program, generator = UNetProgram(model.unet), torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    prompt = ImagePrompt(
        vectors=2 * drawn(3, model.text_width),
        texts=drawn(2, 6, model.text_width),
        ends=torch.tensor([1, 6]),
        text_of=torch.tensor([0, 1, 0]),
    )
    latents, outputs, gradients = drawn(3, 4, 16, 16), [], []
    for states in (prompt.states(), prompt.states().expanded()):
        plan = program.plan(scores=program.score_ids, features=["mid-vit-out"], noise_pred=True)
        plan = plan if runtime is None else plan.compile(runtime)
        vectors = states.states.detach().requires_grad_(runtime is None)
        text = plan.encode_text(vectors, key_bias=states.key_bias, lengths=states.key_lengths)
        with torch.set_grad_enabled(runtime is None):
            # Twice: what was recorded is replayed.
            output = [plan.run(latents, [900, 500, 20], text) for _ in range(2)][-1]
        outputs.append(output)
        if runtime is None:
            total = output.noise_pred.square().sum() + sum(score.sum() for score in output.scores.values())
            gradients.append(torch.autograd.grad(total, vectors)[0])
    short, long = outputs
    pairs = [(short.noise_pred, long.noise_pred), *((short.scores[name], long.scores[name]) for name in long.scores)]
    pairs += [(short.features["mid-vit-out"], long.features["mid-vit-out"])]
    if gradients:
        # That of the one state is the sum over all that it stands for.
        pairs += [(gradients[0][row, end], gradients[1][row, end:].sum(0)) for row, end in enumerate((1, 6, 1))]
    for own, right in pairs:
        assert (own - right).abs().max() <= FLOAT32 * right.abs().max()


def test_images_of_one_batch_have_prompts_of_their_own():
    config = dsd.GenerateConfig(steps=4, guidance=3.0)

    def made(device):
        own = converter(device)
        images = own.convert(PICTURES[:2])
        rows = [dsd.GenerateRow(images[0], 1), dsd.GenerateRow("a red circle", 2), dsd.GenerateRow(images[1], 3)]
        pictures = list(dsd.generate(own.model, rows, config))
        return np.stack([np.asarray(picture) for picture in pictures]).astype(float)

    difference = np.abs(made(DEVICE) - made("cpu"))
    assert difference.mean() < 0.1
    assert (difference > 2).mean() < 0.01


def test_tuning_is_that_of_the_cpu():
    config = TuneConfig(steps=3, batch_size=2, prompt_tokens=2, rank=2)

    def losses(device):
        told = []

        def report(step, loss, record):
            told.extend([loss] if record is None else [])

        converter(device).finetune(PICTURES, config, callback=report, progress=False)
        return told

    here, there = losses(DEVICE), losses("cpu")
    assert here[0] == pytest.approx(there[0], rel=1e-3)
    # AdamW's first steps are the signs of gradients: single signs may differ.
    assert here == pytest.approx(there, rel=5e-2)


def test_the_suites_sides_are_right(monkeypatch):
    for work in (suite.conversion(suite.mini, 4, Context(DEVICE)), suite.step(Context(DEVICE))):
        right = work.sides[0].run()
        for side in work.sides:
            # Batches of other sizes take other kernels.
            assert work.difference(side.run(), right) <= 10 * work.tolerance
