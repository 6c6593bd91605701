"""Deep activations kept over some steps: stock diffusers with hooks that give a module's earlier output again."""

import math
from contextlib import contextmanager
from functools import cache

import diffusers
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.diffusion import RowNoise, named_scheduler, noise
from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler
from dsd_fast.models.controlnet import Control
from dsd_fast.models.mini.scenes import scene
from dsd_fast.unet import Plan
from tests.models.test_controlnet import net_for
from tests.tiny import tiny_pipeline

PROMPTS, SEEDS = ["a dog", "a red cat", "a cat"], [0, 2**40, 7]
# Float32 sums in another order, magnified by guidance and steps.
CLOSE = 1e-4
# Of each network, by branch: the module whose output is kept.
KEPT = {
    ("sd15", 0): lambda unet: unet.up_blocks[3].attentions[1],
    ("sd15", 2): lambda unet: unet.up_blocks[2].upsamplers[0],
    ("sdxl", 1): lambda unet: unet.up_blocks[2].resnets[0],
}


@cache
def pipeline(family):
    return tiny_pipeline(family)


@cache
def model(family):
    return dsd.from_pipeline(pipeline(family))


def sampler(family, controls=(), **config):
    return Sampler(model(family), GenerateConfig(**{"steps": 6, "guidance": 4.0, **config}), controls=controls)


def latents(made, rows):
    return made.latents([made.resolve(row) for row in rows])


def rows_of(**options):
    return [GenerateRow(prompt, seed, **options) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]


def assert_close(got, want, tolerance=CLOSE):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@contextmanager
def kept_over(unet, module, interval):
    """Inside, all of the network runs, but of that module's outputs those of each ``interval``-th call count."""
    calls, stored = -1, None

    def count(*_):
        nonlocal calls
        calls += 1

    def replace(module, given, output):
        nonlocal stored
        if calls % interval == 0:
            stored = output
        return stored

    handles = unet.register_forward_pre_hook(count), module.register_forward_hook(replace)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stock(pipe, made, **options):
    """The stock pipeline's latents of the three rows."""
    before, pipe.scheduler = pipe.scheduler, made.model.new_scheduler()
    try:
        return pipe(
            PROMPTS,
            latents=torch.stack([noise(seed, 0, (4, 16, 16)) for seed in SEEDS]),
            num_inference_steps=made.config.steps,
            guidance_scale=made.config.guidance,
            output_type="latent",
            **options,
        ).images
    finally:
        pipe.scheduler = before


@pytest.fixture
def sent(monkeypatch):
    """(entry, rows, memory budget) of each stream of a plan."""
    seen, stream = [], Plan.stream

    def recorded(self, *arguments, **options):
        seen.append((self.enter, len(options["latent_index"]), options["memory_budget"]))
        return stream(self, *arguments, **options)

    monkeypatch.setattr(Plan, "stream", recorded)
    return seen


@pytest.mark.parametrize(
    ("family", "branch", "interval", "scheduler"),
    [("sd15", 0, 3, "pndm"), ("sd15", 2, 2, "ddim"), ("sdxl", 1, 3, "dpm++2m")],
)
def test_rows_are_stock_diffusers_with_the_same_activations_kept(family, branch, interval, scheduler, sent):
    made = sampler(family, scheduler=scheduler, cache_interval=interval, cache_branch_id=branch)
    got = latents(made, rows_of())
    calls = 7 if scheduler == "pndm" else 6
    entry = made.engine.program.entries[branch]
    # PNDM's repeated timestep counts as a call.
    assert sent == [(entry if number % interval else None, 6, None) for number in range(calls)]
    pipe = pipeline(family)
    with kept_over(pipe.unet, KEPT[family, branch](pipe.unet), interval):
        want = stock(pipe, made)
    assert_close(got, want)
    assert_close(latents(made, rows_of()[1:2]), got[1:2])
    whole = latents(sampler(family, scheduler=scheduler), rows_of())
    assert (want - whole).abs().max() > 100 * CLOSE * want.abs().max()


def test_what_is_kept_counts_in_the_budget(sent):
    config = {"scheduler": "ddim", "cache_interval": 2, "cache_branch_id": 2}
    made, size = sampler("sd15", memory_budget=1_500_000, **config), (16, 16)
    rows = [GenerateRow("a dog", seed) for seed in SEEDS]
    # Two texts' keys and five rows of 32 · 16 · 16 float32 numbers, twice, which are a quarter at most.
    row = 2 * 32 * 16 * 16 * 4
    assert made.engine.rows_kept(2, size) == (5, 5 * row)
    got = latents(made, rows)
    assert [each[1:] for each in sent] == [(count, 1_500_000 - count * row) for count in [4] * 6 + [2] * 6]
    assert_close(got, latents(sampler("sd15", **config), rows))
    # They leave so much to the rest.
    one = made.engine.noise_plan.run_bytes(1, *size, 77)
    taken = made.engine.rows_kept(2, size)[1]
    texts = [made.engine.texts_together(made.engine.noise_plan, size, held) for held in (0, taken, 1_500_000 - one)]
    assert texts == [2, 2, 1]
    assert made.rows_at_once(made.resolve(rows[0])) == 1


def test_residuals_of_controlnets_are_those_of_each_step():
    control = Control(net_for(model("sd15").unet, 1, (4, 8, 8)), None, 0.7)
    picture = Image.fromarray(scene(3).image)
    made = sampler("sd15", [control], scheduler="ddim", cache_interval=2, cache_branch_id=2)
    got = latents(made, rows_of(conditions=(picture,)))
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **{**pipeline("sd15").components, "controlnet": control.net}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    with kept_over(pipe.unet, KEPT["sd15", 2](pipe.unet), 2):
        want = stock(pipe, made, image=[picture] * 3, controlnet_conditioning_scale=0.7)
    assert_close(got, want)


@torch.no_grad()
def test_rows_that_enter_the_interval_of_guidance_run_whole_and_start_anew(sent):
    """Against a plain loop that runs one row at a time, each with an activation of its own."""
    made = sampler("sd15", scheduler="ddim", steps=9, cache_interval=3, guidance_interval=(0.7, 3.0))
    pipe, schedule = pipeline("sd15"), made.model.schedule
    row = made.resolve(GenerateRow("a dog", 5))
    got = made.latents([row])

    embeds = pipe.encode_prompt("a dog", "cpu", 1, True, negative_prompt="")
    states = {"conditional": embeds[0], "unconditional": embeds[1]}
    kept, name, whole = {}, "", True

    def replace(module, given, output):
        return kept.setdefault(name, output) if whole else kept[name]

    scheduler = named_scheduler("ddim", made.model.new_scheduler())
    scheduler.set_timesteps(9)
    z, age, ran = noise(5, 0, (4, 16, 16))[None], math.inf, []
    handle = KEPT["sd15", 0](pipe.unet).register_forward_hook(replace)
    try:
        for t in scheduler.timesteps:
            asked = ["unconditional", "conditional"] if 0.7 < schedule.sigma(int(t)) <= 3.0 else ["conditional"]
            whole = age >= 3 or not {*asked} <= kept.keys()
            if whole:
                kept.clear()
                age = 0
            age += 1
            ran.append((whole, len(asked)))
            outputs = {}
            for name in asked:
                outputs[name] = pipe.unet(z, t, states[name]).sample
            eps = outputs["conditional"]
            if len(asked) == 2:
                eps = outputs["unconditional"] + 4.0 * (eps - outputs["unconditional"])
            z = scheduler.step(eps, t, z).prev_sample
    finally:
        handle.remove()
    assert_close(got, z)
    assert [(entry is None, rows) for entry, rows, _ in sent] == ran
    # Whole at the start, where the unconditional row joins, and three calls later; it leaves without one.
    assert ran == [
        *((True, 1), (False, 1)),
        *((True, 2), (False, 2), (False, 2)),
        *((True, 2), (False, 1), (False, 1)),
        (True, 1),
    ]


def test_when_a_row_runs_whole_does_not_depend_on_the_rows_beside_it():
    interval = {"scheduler": "ddim", "guidance_interval": (0.7, 3.0)}
    rows = [GenerateRow("a dog", 5, guidance=guidance) for guidance in (4.0, 1.0)]
    made, plain = (sampler("sd15", cache_interval=number, **interval) for number in (3, 1))
    assert len({made.group(made.resolve(row)) for row in rows}) == 2
    assert len({plain.group(plain.resolve(row)) for row in rows}) == 1
    with pytest.raises(ValueError, match="rows: got 2 of 2 groups"):
        latents(made, rows)


def test_a_row_without_guidance_among_others_and_another_walk_of_one_prediction():
    made = sampler("sd15", scheduler="ddim", cache_interval=2)
    rows = [GenerateRow("a dog", 1), GenerateRow("a cat", 2, guidance=1.0)]
    both = latents(made, rows)
    for number, row in enumerate(rows):
        assert_close(both[number : number + 1], latents(made, [row]))
    engine = made.engine
    texts, text_of = engine.texts(["a dog"])
    predict = engine.predict(texts, text_of, cache_interval=4)
    start = RowNoise([3]).start((4, 16, 16))
    walks = [dsd.diffusion.sample(made.model.new_scheduler(), predict, start, steps=6) for _ in range(2)]
    assert torch.equal(*walks)
    # The shallow steps read the whole network's keys.
    assert len(texts._kept) == 2
    assert len({id(keys) for keys in texts._kept.values()}) == 1


def test_branches_that_a_network_does_not_have_are_refused():
    with pytest.raises(ValueError, match="cache_branch_id: got 12, expected 0 to 11 for this network"):
        sampler("sd15", cache_interval=2, cache_branch_id=12)
