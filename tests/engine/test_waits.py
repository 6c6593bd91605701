"""Where the host waits for the device: a committed list for each call that loops, of a device that is not there.

Each call takes several micro-batches, images or steps: what waits in its loop would be counted more than once.
"""

from contextlib import nullcontext
from functools import partial

import diffusers
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.diffusion import denoise, img2img, invert, sample
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.features.gate.guide import Guide
from dsd_fast.features.host import on_host
from dsd_fast.features.inputs import Prompts
from dsd_fast.features.shift import ShiftMeter
from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler
from dsd_fast.jobs import read_tensors
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.matching.fitting import loop
from dsd_fast.matching.score import PairScorer
from dsd_fast.models.controlnet import Control
from dsd_fast.unet import UNetProgram
from tests.matching.fitting.parts import SIDE, TEXTS, groups, pictures, pipeline
from tests.models.test_controlnet import net_for
from tests.pretend import CUDA, pretended, to_device
from tests.tiny import CROSS_ATTENTION_DIM, tiny_clip, trained_like

IMAGES = pictures(4)
TOKENS = 77

# What remains, with the reason. A read of one's own answer comes once a call, behind all that was computed for it.
TEXTS_TO_HOST = {"models/prompts.py PromptStates.to: a copy to the host": 2}  # captions are kept in host memory
SCORES = {"matching/score.py TermsBehind.done: an event with nothing behind it": 1}  # the last chunk's
OUT = {"unet/output.py Output.fill: an event with nothing behind it": 1}  # the last micro-batch's
FEATURES = {"features/host.py _arrived: an event with nothing behind it": 1}  # the last chunk's
HEATMAP = {
    "models/prompts.py PromptStates.to: a copy to the host": 1,
    "matching/heatmaps.py _token_maps: a copy to the host": 1,
}
SHIFT = {"features/shift.py _numbers: a copy to the host": 2}  # diffs, and the anchor's
GUIDE = {"features/gate/guide.py Guide.result: a copy to the host": 1}
UNIPC = "diffusion/sampling.py _run: a copy to the device that blocks"
# A fit begins with PEFT's layers moved to the device, with captions and latents read, with the sizes of weights of
# heads; it ends with a record of the losses and with those weights. Its steps wait for nothing.
FIT = {
    "engine/lora.py add_lora: a copy to the device that blocks": 32,
    "matching/fitting/learned.py Learned._learn_prompt: a copy to the device that blocks": 1,
    "matching/fitting/learned.py Learned._learn_heads: _local_scalar_dense": 1,
    "matching/fitting/learned.py Learned.finished.<locals>.<dictcomp>: tolist": 4,
    "engine/encoding.py Encoding.encode_sources.<locals>.<listcomp>: an event with nothing behind it": 1,
    "training/descent.py Descent._read: an event with nothing behind it": 1,
    "models/prompts.py PromptStates.to: a copy to the host": 4,
}


def small_unet():
    """One block with cross-attention in each part: what loops is the host."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=CROSS_ATTENTION_DIM["sd15"],
        attention_head_dim=2,
    )
    return trained_like(unet, 0).eval()


class Place:
    """A tiny model on the host or on the device, and micro-batches of three rows there."""

    def __init__(self, moved):
        move = to_device if moved else (lambda value: value)
        self.move, self.device = move, CUDA if moved else torch.device("cpu")
        pipe = pipeline()
        pipe.unet = small_unet()
        net = net_for(pipe.unet, 1)
        parts = (pipe.unet, pipe.vae, pipe.text_encoder, net, tiny_clip())
        unet, _, _, net, clip = (move(part.requires_grad_(False)) for part in parts)
        self.model = dsd.from_pipeline(pipe)
        self.model.clip, self.control = clip, Control(net, None, 0.1)
        self.program = UNetProgram(unet)
        self.plan = self.program.plan(features=["mid-vit-out"], scores=self.program.score_ids[-2:], noise_pred=True)
        self.budget = 3 * self.plan.run_bytes(3, SIDE, SIDE, TOKENS)
        self.matcher = dsd.Matcher(self.model, dsd.MatchConfig(timesteps=[300, 700], memory_budget=self.budget))

    def extractor(self, **options):
        layers = ["up-level0-repeat0-res-out", "up-level1-repeat1-vit-out"]
        return FeatureExtractor(self.model, layers, timesteps=[50, 200], memory_budget=self.budget, **options)

    def request(self, rows):
        g = torch.Generator().manual_seed(0)
        latents = torch.randn(rows, 4, SIDE, SIDE, generator=g)
        states = self.move(torch.randn(2, TOKENS, CROSS_ATTENTION_DIM["sd15"], generator=g))
        text = self.plan.encode_text(states, score_mask=torch.ones(2, TOKENS, dtype=torch.bool), lengths=[TOKENS, 9])
        return {"latents": self.move(latents), "text": text, "text_index": torch.arange(rows) % 2}


def run(place):
    return [place.plan.run(timesteps=10, **place.request(4)).noise_pred]


def streamed(place):
    rows = place.plan.stream(timesteps=10, **place.request(8), memory_budget=place.budget)
    return [torch.cat([out.noise_pred for _, out in rows])]


def streamed_out(place, here=False):
    out = place.plan.empty_output(8, SIDE, SIDE)
    if here:
        out = out._map(lambda value: torch.empty(value.shape))
    place.plan.stream(timesteps=10, **place.request(8), out=out, memory_budget=place.budget)
    return [value for _, value in out.tensors()]


def score(place):
    return [place.matcher.score(IMAGES, TEXTS[:2])]


def predict(place):
    return [place.matcher.predict([(image, TEXTS[number]) for number, image in enumerate(IMAGES)])]


def heatmap(place):
    return [torch.from_numpy(drawn) for _, _, drawn in place.matcher.heatmap(IMAGES[0], TEXTS[0], layers="all")]


def extract(place, images=2, **options):
    return list(place.extractor(**options).extract(IMAGES[:images], TEXTS[:images]).values())


def extracted_to_host(place):
    chunks = place.extractor().extract_chunks(IMAGES[:3], chunk=1)
    return [value for chunk, _ in on_host(chunks) for value in chunk.features[0].values()]


def controlled(place):
    return extract(place, technique=Technique(controls=[place.control]))


def shifted(place):
    extractor = place.extractor()
    meter, prompts = ShiftMeter(extractor, [Technique("a"), Technique("b", prompts=TEXTS[0])]), Prompts("")
    for inputs, _ in extractor.encode(IMAGES[:2], prompts, chunk=1):
        meter.add(inputs, prompts)
    return [torch.from_numpy(meter.result().diffs)]


def guided(place):
    extractor = place.extractor()
    guide = Guide(extractor.engine, [Technique("a")], steps=5, strength=0.5, guidance=2.0, shown=0)
    for inputs, _ in extractor.encode(IMAGES[:2], Prompts(""), chunk=1):
        guide.add(inputs, Prompts(""))
    return [torch.from_numpy(guide.result().distances)]


def generated(place):
    config = GenerateConfig(steps=4, guidance=3.0, guidance_interval=(0.0, 9.0), memory_budget=place.budget)
    sampler = Sampler(place.model, config)
    rows = [GenerateRow(text, seed=1, guidance_rescale=0.5) for text in TEXTS[:2]] + [GenerateRow("", guidance=1.0)]
    return [sampler.pixels([sampler.resolve(row) for row in rows])]


def fitted(place):
    told = []
    settings = dsd.MatchConfig(timesteps=[300], memory_budget=place.budget)
    history = dsd.Matcher(place.model, settings).fit(
        groups(),
        ["lora", "prompt", "heads"],
        config=dsd.FitConfig(steps=3, batch_size=2, micro_batch=1),
        callback=lambda step, loss, record: told.append((step, loss)),
        progress=False,
    )
    assert [step for step, loss in told if loss is not None] == [1, 2, 3]
    return [torch.tensor([loss for _, loss in told if loss is not None]), torch.tensor(history.records[-1].loss)]


DOWN = Technique(denoise_from=210, denoise_steps=2)
CALLS = {
    "run": (run, {}),
    "stream": (streamed, {}),
    "stream, out on the device": (streamed_out, {}),
    "stream, out in host memory": (partial(streamed_out, here=True), OUT),
    "score": (score, TEXTS_TO_HOST | SCORES),
    "predict": (predict, TEXTS_TO_HOST | SCORES),
    "heatmap": (heatmap, HEATMAP),
    "extract": (extract, {}),
    "extract, mean of draws": (partial(extract, draws=2), {}),
    "extract, controlled": (controlled, {}),
    "extract, denoised": (partial(extract, technique=DOWN), {}),
    "extract to the host": (extracted_to_host, FEATURES),
    "content shift": (shifted, SHIFT),
    "guide": (guided, GUIDE),
    "generate": (generated, {}),
    "fit": (fitted, FIT),
}
# What is read later than it is computed, or by another way than on the CPU: the numbers are compared.
COMPARED = {
    "stream, out in host memory",
    "stream, out on the device",
    "score",
    "predict",
    "heatmap",
    "guide",
    "fit",
    "generate",
}


@pytest.fixture(scope="module")
def there():
    with pretended():
        return Place(moved=True)


@pytest.fixture(scope="module")
def here():
    return Place(moved=False)


@pytest.fixture(autouse=True)
def one_image_a_chunk(monkeypatch):
    monkeypatch.setattr(PairScorer, "images_together", lambda *_: 1)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_waits_where_the_list_says(name, there, here):
    call, waits = CALLS[name]
    with pretended() as device:
        results = call(there)
        assert dict(device.waits) == waits
        results = [value.cpu() for value in results]
    for result, want in zip(results, call(here) if name in COMPARED else results, strict=True):
        assert not result.isnan().any()
        # Micro-batches of other sizes: sums of a thousand products or fewer, in another order.
        torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


# Of each step of diffusers' own schedulers. UniPC makes its coefficients on the device: its own business.
SCHEDULERS = ("PNDM", "DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samplers_wait_for_nothing(name):
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler, z = getattr(diffusers, f"{name}Scheduler")(**betas), torch.zeros(2, 4, 8, 8)
    results = []
    for move in (lambda x: x, to_device):
        with pretended() as device:
            noise = torch.ones(4, 8, 8)
            walked = img2img(scheduler, lambda x, t: x * 0.1, move(z), noise, strength=0.5, steps=10)
            sampled = sample(scheduler, lambda x, t: x * 0.1, move(z), steps=5)
            waits = set(device.waits)
            results.append([walked.cpu(), sampled.cpu()])
    assert waits == ({UNIPC} if name == "UniPCMultistep" else set())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inversion_and_denoising_wait_for_nothing(there):
    schedule = there.model.schedule
    with pretended() as device:
        z = to_device(torch.ones(2, 4, 8, 8))
        assert len(dict(invert(schedule, lambda x, t: x * 0.1, z, [50, 200, 400], exact=True))) == 3
        assert len(list(denoise(schedule, lambda x, t: x * 0.1, z, [500, 300, 100, 0]))) == 4
        assert not device.waits


def test_a_step_that_fails_is_told_late_and_changes_nothing(there, tmp_path, monkeypatch):
    """The host reads of the second step when the device has taken the third."""
    losses, calls = loop.losses, []

    def broken(*arguments):
        calls.append(arguments)
        return losses(*arguments) * (float("nan") if len(calls) == 2 else 1.0)

    config = dsd.MatchConfig(timesteps=[300], memory_budget=there.budget)
    kept = []
    with pretended():
        for steps in (1, 5):
            calls.clear()
            matcher = dsd.Matcher(there.model, config)
            out, settings = (
                tmp_path / str(steps),
                dsd.FitConfig(steps=steps, batch_size=1, warmup=0, schedule="constant"),
            )
            monkeypatch.setattr(loop, "losses", broken)
            with pytest.raises(FloatingPointError, match="step 2: the loss is nan") if steps > 1 else nullcontext():
                matcher.fit(groups(), ["prompt"], config=settings, out=out, progress=False)
            kept.append(read_tensors(out / "training.safetensors"))
    (one, about), (broke, state) = kept
    assert len(calls) == 3
    assert (about["step"], state["step"]) == (1, 1)
    assert one.keys() == broke.keys()
    assert all(torch.equal(one[name], broke[name]) for name in one)


def test_uploads_are_ones_own_and_pinned_where_the_driver_would_not_stage_them():
    small, large = torch.ones(8), torch.ones(64 << 10)
    with pretended() as device:
        for value in (small, large, large.pin_memory(), large.double()):
            sent = upload(value, CUDA, torch.float32)
            value.zero_()
            assert (sent.device, sent.dtype) == (CUDA, torch.float32)
            assert float(sent.inner.sum()) == len(value)
        assert not device.waits
        # The tool sees what is done without it.
        large.to(CUDA, non_blocking=True)
        small.to(CUDA)
        bool(sent[0])
        sent[torch.ones(len(sent), dtype=torch.bool)]
        assert sum(device.waits.values()) == 5
