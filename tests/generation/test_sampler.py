"""Latents of rows against stock diffusers' pipelines, given the same noise."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.diffusion import SAMPLERS, NoiseSchedule, RowNoise, guidance_embedding, noise, scheduler_timesteps
from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler, to_uint8
from dsd_fast.models.controlnet import Control
from dsd_fast.models.mini.scenes import scene
from dsd_fast.reference import generation
from tests.models.test_controlnet import net_for
from tests.tiny import load_tiny_lora, tiny_pipeline, tiny_scheduler, tiny_unet

PROMPTS = ["a dog", "a red cat", "", "dog dog", "a cat on a red dog", "cat", "a dog"]
SMALL = (32, 32)
SEEDS = [0, 1, 5, 2**32 + 5, 2**63, 2**64 - 1, 9]
# The contract: of the largest value. Float32 sums in another order, magnified by guidance and steps.
CLOSE = 1e-4


@cache
def pipeline(name):
    family = {"lcm": "sd15", "v": "sd21"}.get(name, name)
    pipe = tiny_pipeline(family, prediction_type="v_prediction" if name == "v" else "epsilon")
    if name == "lcm":
        pipe.unet = tiny_unet("lcm")
        pipe.unet.register_to_config(sample_size=16)
    return pipe


@cache
def model(name):
    return dsd.from_pipeline(pipeline(name))


def sampler(name, controls=(), **config):
    return Sampler(model(name), GenerateConfig(**{"steps": 4, "guidance": 4.0, **config}), controls=controls)


def latents(made, *rows):
    return made.latents([made.resolve(row) for row in rows])


def picture(seed):
    return Image.fromarray(scene(seed).image)


def assert_close(got, expected):
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=CLOSE * float(expected.abs().max()))


def stock(made, name, row, **options):
    """The stock pipeline's latents of a row, with the settings of a sampler."""
    config, row = made.config, made.resolve(row)
    given = {
        "negative_prompt": row.negative_prompt,
        "steps": row.steps,
        "guidance": row.guidance,
        "guidance_rescale": row.guidance_rescale,
        "clip_skip": row.clip_skip,
        "size": row.size,
        "scheduler": made.model.new_scheduler(),
        "eta": config.eta,
        "noise": config.noise,
    }
    if row.image is not None:
        given |= {"images": [row.image], "strength": row.strength}
    if row.conditions:
        given |= {
            "controlnets": [each.net for each in made.controls],
            "conditions": [[each] for each in row.conditions],
        }
        given |= {"scales": [each.scale for each in made.controls]}
    if made.model.family == "sdxl":
        given |= {"original_size": row.original_size, "crop": row.crop, "target_size": row.target_size}
    return generation.generate(pipeline(name), [row.prompt], [row.seed], **given, latents=True, **options)


CASES = {
    **{name: ("lcm" if name == "lcm" else "sd15", {"scheduler": name}) for name in SAMPLERS},
    "ddim, eta": ("sd15", {"scheduler": "ddim", "eta": 0.7}),
    "own": ("sdxl", {}),
    "v": ("v", {"scheduler": "dpm++2m"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.newest
def test_seven_rows_are_each_alone_and_the_stock_pipeline(case):
    name, config = CASES[case]
    # In three steps a solver of second order takes one of its own.
    made = sampler(name, steps=3, image_size=SMALL, **config)
    rows = [GenerateRow(prompt, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    seven = latents(made, *rows)
    expected = generation.generate(
        pipeline(name), PROMPTS, SEEDS, steps=3, guidance=4.0, scheduler=made.model.new_scheduler(), latents=True,
        eta=made.config.eta, size=SMALL,
    )  # fmt: skip
    assert_close(seven, expected)
    assert_close(latents(made, rows[5]), seven[5:6])
    assert not torch.allclose(seven[0], seven[6], rtol=0, atol=0.1)


@pytest.mark.parametrize("scheduler", ["euler-a", "dpm++2m-sde", "lcm"])
def test_noise_of_steps_is_drawn_by_the_step(scheduler):
    """With an output of nothing the steps add what they draw: none of it is the start's, nor another step's."""
    made = sampler("sd15", scheduler=scheduler, steps=3)
    drawn = [noise(2**40, draw, (4, 16, 16)) for draw in range(4)]
    states = []

    def predict(z, t):
        states.append(z)
        return torch.zeros_like(z)

    rows = RowNoise([2**40])
    z = dsd.diffusion.sample(made.model.new_scheduler(), predict, rows.start((4, 16, 16)), steps=3, draws=rows)
    shares = torch.linalg.lstsq(torch.stack(drawn).flatten(1).T, z.flatten()[:, None]).solution.flatten()
    rest = z.flatten() - torch.stack(drawn).flatten(1).T @ shares
    assert float(rest.abs().max()) < 1e-4 * float(z.abs().max())
    # The last step of Euler a and LCM adds none.
    assert (shares[1:3].abs() > 1e-3).all()


def test_pndm_calls_the_network_once_more():
    made = sampler("sd15", scheduler="pndm", steps=30)
    assert len(scheduler_timesteps(made.model.new_scheduler(), 30)) == 31


FORMS = {
    "text": ({}, {}),
    "image": ({"image": picture(1), "strength": 0.7}, {}),
    "control": ({"conditions": (picture(2),)}, {"controlled": True}),
    "control, image": ({"image": picture(1), "strength": 0.7, "conditions": (picture(2),)}, {"controlled": True}),
}


@cache
def control(name):
    levels = len(model(name).vae.config.block_out_channels)
    return Control(net_for(model(name).unet, 1, (4, 8, 8, 8)[:levels]), None, 0.7)


@pytest.mark.parametrize(
    ("family", "form"), [*(("sd15", form) for form in FORMS), ("sdxl", "text"), ("sdxl", "control, image")]
)
def test_the_generator_of_a_seed_gives_the_stock_image(family, form):
    fields, about = FORMS[form]
    controls = [control(family)] if about else []
    config = {"scheduler": "euler-a", "steps": 3, "image_size": SMALL}
    for kind in ("dsd_fast", "diffusers"):
        made = sampler(family, controls, noise=kind, **config)
        rows = [GenerateRow("a dog", 2**64 - 1, **fields), GenerateRow("cat", 3, **fields)]
        got = latents(made, *rows)
        expected = torch.cat([stock(made, family, row) for row in rows])
        assert_close(got, expected)
    if family == "sd15" and form == "text":
        pipe = model(family).to_pipeline()
        pipe.scheduler = made.model.new_scheduler()
        image = pipe(
            "a dog",
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=4.0,
            generator=torch.Generator("cpu").manual_seed(2**64 - 1),
        ).images[0]
        (ours,) = to_uint8(made.pixels([made.resolve(rows[0])]))
        theirs = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view_as(ours)
        # A level may be rounded to either side.
        assert int((ours.int() - theirs.int()).abs().max()) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_model_draws_in_its_type(dtype):
    pipe = tiny_pipeline("sd15").to(dtype)
    made = Sampler(
        dsd.from_pipeline(pipe), GenerateConfig(steps=3, guidance=1.0, scheduler="euler-a", noise="diffusers")
    )
    got = latents(made, GenerateRow("a dog", 3))
    pipe.scheduler = made.model.new_scheduler()
    expected = pipe(
        "a dog",
        num_inference_steps=3,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    # Latents are rounded at each step, draws once, and the network's sums come in another order: a few roundings.
    assert float((got - expected).abs().max()) < 4 * torch.finfo(dtype).eps * float(expected.abs().max())


def test_rows_of_one_batch_have_options_of_their_own():
    made = sampler("sdxl", steps=3, scheduler="ddim", image_size=SMALL)
    rows = [
        GenerateRow("a dog", 1, guidance=1.0),
        GenerateRow("a dog", 2, guidance=7.5, guidance_rescale=0.7),
        GenerateRow("cat", 3, guidance=3.0, negative_prompt="a dog", clip_skip=1),
        GenerateRow("cat", 4, guidance=0.0, original_size=(20, 64), crop=(3, 4), target_size=(16, 16)),
        GenerateRow("cat", 5, negative_prompt="", original_size=(64, 20)),
    ]
    assert len({made.group(made.resolve(row)) for row in rows}) == 1
    expected = torch.cat([stock(made, "sdxl", row) for row in rows])
    assert_close(latents(made, *rows), expected)
    assert model("sdxl").absent_prompt_is_zeros
    # Each of the options counts.
    plain = latents(made, *(GenerateRow(row.prompt, row.seed) for row in rows))
    assert all(float((a - b).abs().max()) > 0.01 for a, b in zip(plain, expected, strict=True))


def test_distilled_networks_read_each_rows_guidance():
    made = sampler("lcm", scheduler="lcm")
    rows = [GenerateRow("a dog", 1, guidance=1.0), GenerateRow("cat", 2, guidance=8.5)]
    assert_close(latents(made, *rows), torch.cat([stock(made, "lcm", row) for row in rows]))
    assert not made._is_guided(made.resolve(rows[1]))
    assert len(guidance_embedding([1.0, 8.5], 12)) == 2


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_clip_skip_is_that_of_diffusers(skip, monkeypatch):
    pipe = tiny_pipeline("sd15")
    made = model("sd15")
    if not hasattr(pipe.text_encoder, "text_model"):
        # Where transformers 5 has moved the norm to; stock diffusers looks for it there.
        monkeypatch.setitem(vars(pipe.text_encoder), "text_model", pipe.text_encoder)
    expected, _ = pipe.encode_prompt("a dog", "cpu", 1, False, clip_skip=skip)
    if skip:
        assert torch.equal(made.encode_prompts(["a dog"], skip).states, expected)
    else:
        # There the norm of the last state is taken of what has gone through it.
        assert torch.equal(made.encode_prompts(["a dog"], 0).states, made.encode_prompts(["a dog"]).states)
    with pytest.raises(ValueError, match="clip_skip: got 4, expected an integer from 0 to 3"):
        made.encode_prompts(["a dog"], 4)
    with pytest.raises(ValueError, match="clip_skip: got 3, expected an integer from 0 to 2"):
        model("sdxl").encode_prompts(["a dog"], 3)


@pytest.mark.parametrize("high", [4.0, None])
def test_guidance_in_an_interval_is_a_plain_loop(high):
    made = sampler("sd15", scheduler="ddim", steps=6, guidance_interval=(0.5, high))
    pipe, scheduler = pipeline("sd15"), made.model.new_scheduler()
    scheduler.set_timesteps(6)
    states = torch.cat(pipe.encode_prompt("a dog", "cpu", 1, True)[::-1])
    z, schedule, applied = noise(3, 0, (1, 4, 16, 16)), NoiseSchedule.from_scheduler(scheduler), []
    with torch.no_grad():
        for t in scheduler.timesteps:
            abar = float(schedule.alphas_cumprod[t])
            applied.append(0.5 < ((1 - abar) / abar) ** 0.5 <= (high or math.inf))
            both = pipe.unet(z.expand(2, -1, -1, -1), t, states).sample
            output = both[:1] + (4.0 if applied[-1] else 1.0) * (both[1:] - both[:1])
            z = scheduler.step(output, t, z).prev_sample
    assert 0 < sum(applied) < 6
    counted = rows_seen(made, [made.resolve(GenerateRow("a dog", 3))])
    assert_close(counted.pop("z"), z)
    assert counted["up"] == 6 + sum(applied)


@pytest.mark.parametrize("name", ["sd15", "v"])
def test_predicted_clean_latents_are_those_of_the_scheduler(name):
    made, pipe = sampler(name, scheduler="ddim", steps=3), pipeline(name)
    rows = [made.resolve(GenerateRow(prompt, 3)) for prompt in ("a dog", "a red cat")]
    # Texts are taken in two parts.
    made.engine.texts_together = lambda *_: 2
    times, clean = made.predicted(rows)
    scheduler = made.model.new_scheduler()
    scheduler.set_timesteps(3)
    assert times == [*scheduler.timesteps.tolist(), -1]
    for number, row in enumerate(rows):
        states = torch.cat(pipe.encode_prompt(row.prompt, "cpu", 1, True)[::-1])
        z, expected = noise(3, 0, (1, 4, 16, 16)), []
        with torch.no_grad():
            for t in scheduler.timesteps:
                both = pipe.unet(z.expand(2, -1, -1, -1), t, states).sample
                step = scheduler.step(both[:1] + 4.0 * (both[1:] - both[:1]), t, z)
                z = step.prev_sample
                expected.append(step.pred_original_sample)
        assert_close(clean[:, number], torch.cat([*expected, z]))
    assert torch.equal(clean[-1], made.latents(rows))


def test_a_timestep_between_two_predicts_as_the_nearer():
    config = {**pipeline("sd15").scheduler.config, "use_karras_sigmas": True}
    made = sampler("sd15", scheduler=diffusers.EulerDiscreteScheduler.from_config(config), steps=3)
    times, clean = made.predicted([made.resolve(GenerateRow("a dog", 3))])
    assert any(t % 1 for t in times)
    assert clean.isfinite().all()


def rows_seen(made, rows):
    """What the network and the text encoders are called for: rows of a text-free layer, of one behind, of keys."""
    unet, counted, handles = made.model.unet, Counter(), []
    places = {"in": unet.conv_in, "up": unet.up_blocks[-1].resnets[-1].conv1}
    places |= {f"key {name}": module for name, module in unet.named_modules() if name.endswith("attn2.to_k")}
    places |= {"texts": made.model.text_encoders[0].get_input_embeddings()}

    def count(name):
        return lambda module, args, output: counted.update({name: len(args[0])})

    handles = [module.register_forward_hook(count(name)) for name, module in places.items()]
    try:
        counted["z"] = made.latents(rows)
    finally:
        for handle in handles:
            handle.remove()
    return counted


def test_what_texts_do_not_change_runs_once():
    made = sampler("sd15", scheduler="ddim", steps=3)
    rows = [made.resolve(GenerateRow(prompt, seed)) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    rows[3] = replace(rows[3], guidance=1.0)
    counted = rows_seen(made, rows)
    # Seven latents; seven conditional rows and six unconditional ones; of seven prompts six are different, and the
    # empty one is the absent one too.
    keys = {count for name, count in counted.items() if name.startswith("key")}
    assert (counted["in"], counted["up"], keys, counted["texts"]) == (3 * 7, 3 * 13, {6}, 6)
    # A budget of two rows: the keys of the texts still once for all steps, where they fit.
    plan = made.engine.noise_plan
    small = sampler("sd15", scheduler="ddim", steps=3, memory_budget=8 * plan.run_bytes(2, 16, 16, 77))
    again = rows_seen(small, rows)
    assert {count for name, count in again.items() if name.startswith("key")} == {6}
    # Where a micro-batch ends between two rows of a latent, that one is computed for both.
    assert 3 * 7 < again["in"] < again["up"] == 3 * 13
    assert_close(again["z"], counted["z"])


def test_texts_whose_keys_do_not_fit_are_taken_in_parts():
    made = sampler("sd15", scheduler="ddim", steps=3)
    rows = [made.resolve(GenerateRow(prompt, seed)) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    engine = made.engine
    one = engine.noise_plan.encode_text(torch.zeros(1, 77, 24)).nbytes
    tight = sampler(
        "sd15", scheduler="ddim", steps=3, memory_budget=engine.noise_plan.run_bytes(1, 16, 16, 77) * 4 + 3 * one
    )
    tight.engine.texts_together = lambda *_: 3
    assert tight.rows_at_once(rows[0]) <= 2
    counted = rows_seen(tight, rows)
    # The absent one with "a dog", "a red cat"; with "", "dog dog", "a cat on a red dog"; with "cat", "a dog".
    assert {count for name, count in counted.items() if name.startswith("key")} == {3 + 3 + 3}
    assert_close(counted["z"], made.latents(rows))


def test_a_row_of_guidance_one_has_no_unconditional_row():
    made = sampler("sd15", scheduler="ddim", steps=2, guidance=1.0)
    counted = rows_seen(made, [made.resolve(GenerateRow("cat", 1))])
    assert (counted["in"], counted["up"], counted["texts"]) == (2, 2, 1)


def test_groups_are_of_what_must_be_equal_and_no_more():
    made = sampler("sd15", [control("sd15")], steps=10)
    row = GenerateRow("a dog")
    image = {"image": picture(1)}

    def group(**fields):
        return made.group(made.resolve(replace(row, **fields)))

    alike = [{}, {"seed": 3}, {"prompt": "cat"}, {"guidance": 1.0}, {"clip_skip": 1}, {"negative_prompt": "cat"}]
    assert len({group(**fields) for fields in alike}) == 1
    assert group(**image, strength=0.61) == group(**image, strength=0.69)
    other = [{}, image, {**image, "strength": 0.5}, {"steps": 9}, {"size": (64, 32)}, {"conditions": (picture(1),)}]
    assert len({group(**fields) for fields in other}) == len(other)
    with pytest.raises(ValueError, match="rows: got 2 of 2 groups"):
        made.latents([made.resolve(row), made.resolve(replace(row, steps=9))])


def test_other_sizes_and_adapters(tmp_path):
    pipe = tiny_pipeline("sd15")
    load_tiny_lora(pipe, "sd15", tmp_path, adapter_name="x")
    pipe.disable_lora()
    own = dsd.from_pipeline(pipe)
    made = Sampler(own, GenerateConfig(steps=2, guidance=3.0, adapter=(), scheduler="ddim"))
    rows = [GenerateRow("a dog", 1, size=(48, 80), adapter=adapter) for adapter in ((), ("x",))]
    plain, adapted = (latents(made, row) for row in rows)
    pipe.scheduler = made.model.new_scheduler()
    for got, switch in ((plain, pipe.disable_lora), (adapted, pipe.enable_lora)):
        switch()
        expected = generation.generate(
            pipe, ["a dog"], [1], steps=2, guidance=3.0, size=(48, 80), latents=True, scheduler=pipe.scheduler
        )
        assert_close(got, expected)
    settings = made.settings()
    assert list(settings["row_adapters"]) == ["x"]
    assert GenerateConfig(**settings["config"]) == made.config
    with pytest.raises(ValueError, match="adapter: the model has no adapter 'y'"):
        made.resolve(GenerateRow("a dog", adapter=("y",)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "dog " * 200}, "prompt: the prompt has 20. tokens, expected at most 77"),
        ({"negative_prompt": "dog " * 200}, "negative_prompt: the prompt has 20. tokens"),
        ({"size": (64, 65)}, r"size: got \(64, 65\), expected multiples of 4 pixels"),
        ({"strength": 0.5}, "strength: got 0.5 without an image"),
        ({"image": picture(1), "strength": 0.1}, "strength is 0.1, too small for any of 4 steps"),
        ({"clip_skip": 9}, "clip_skip: got 9"),
        ({"conditions": (picture(1),)}, "conditions: got 1 for 0 ControlNets"),
        ({"crop": (1, 1)}, r"crop: got \(1, 1\) for a model that reads no image sizes"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        sampler("sd15").resolve(GenerateRow(**{"prompt": "a dog", **fields}))


def test_resolved_rows_stay_as_they_are():
    made = sampler("sdxl", negative_prompt="cat", clip_skip=1, image_size=(32, 32), guidance_rescale=0.5)
    row = made.resolve(GenerateRow("a dog", 3, image=picture(1)))
    assert made.resolve(row) == row
    assert (row.negative_prompt, row.clip_skip, row.size, row.guidance_rescale) == ("cat", 1, (32, 32), 0.5)
    assert (row.strength, row.original_size, row.crop, row.target_size) == (0.8, (32, 32), (0, 0), (32, 32))


class DPMSolverSDEScheduler(diffusers.DPMSolverMultistepScheduler):
    """As diffusers' own, which needs another package to be made, holds the noise of a batch."""

    noise_sampler = None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scheduler": "ddpm"}, "scheduler: got 'ddpm', expected one of ddim, pndm"),
        ({"steps": 0}, "steps: got 0, expected an integer of at least 1"),
        ({"guidance": float("nan")}, "guidance: got nan"),
        ({"guidance_interval": (4.0, 0.5)}, "guidance_interval: got"),
        ({"guidance_interval": (0.5, math.inf)}, "guidance_interval: got"),
        ({"noise": "numpy"}, "noise: got 'numpy', expected one of dsd_fast, diffusers"),
        ({"eta": 0.5, "scheduler": "euler"}, "eta: got 0.5, which EulerDiscreteScheduler does not read"),
        ({"image_size": (64, 65)}, "image_size: got"),
        ({"adapter": "x"}, "adapter: the model has no adapter 'x'"),
        (
            {"scheduler": tiny_scheduler("sd15", "v_prediction")},
            "prediction_type is 'v_prediction', expected the model's",
        ),
        ({"clip_skip": 9}, "clip_skip: got 9"),
        ({"steps": 1001}, "steps is 1001, more than"),
        ({"negative_prompt": "cat " * 99}, "negative_prompt: "),
        ({"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}, "discrete diffusion process"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        sampler("sd15", **config)


def test_a_scheduler_that_draws_for_the_batch_is_refused():
    scheduler = DPMSolverSDEScheduler.from_config(dict(tiny_scheduler("sd15").config))
    with pytest.raises(ValueError, match="DPMSolverSDEScheduler draws the noise of a whole batch at once"):
        sampler("sd15", scheduler=scheduler)
    with pytest.raises(ValueError, match="draws: got None, needed by EulerAncestralDiscreteScheduler"):
        dsd.diffusion.sample(
            diffusers.EulerAncestralDiscreteScheduler(), lambda z, t: z, torch.zeros(1, 4, 8, 8), steps=2
        )


def test_a_model_changed_in_place_is_not_handed_to_a_named_scheduler():
    pipe = tiny_pipeline("sd15")
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod * 0.999
    changed = dsd.from_pipeline(pipe)
    assert Sampler(changed).model is changed
    with pytest.raises(ValueError, match="alphas_cumprod of the model's PNDMScheduler changed in place"):
        Sampler(changed, GenerateConfig(scheduler="ddim"))


def test_pictures_are_decoded_within_the_budget(monkeypatch):
    own, calls = model("sd15"), []
    decode = type(own).decode_latents
    monkeypatch.setattr(type(own), "decode_latents", lambda self, z: calls.append(len(z)) or decode(self, z))
    z = noise(0, 0, (5, 4, 16, 16))
    want = decode(own, z).detach()
    # Eight float tensors of the first width, 8, at 64 × 64 for each.
    for images, parts in ((1, [1] * 5), (2, [2, 2, 1]), (100, [5])):
        engine = dsd.engine.Engine(own, memory_budget=images * 8 * 8 * 64 * 64 * 4)
        torch.testing.assert_close(engine.decode_latents(z).detach(), want, rtol=0, atol=1e-5)
        assert calls == parts
        calls.clear()
    assert engine.decode_latents(z[:0]).shape == (0, 3, 64, 64)


def test_pixels_are_rounded():
    values = torch.tensor([-1.0, -1 + 1.4 / 127.5, -1 + 1.6 / 127.5, 1.0]).view(1, 1, 1, 4).expand(1, 3, 2, 4)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 1, 2, 255]
    assert to_uint8(values).shape == (1, 2, 4, 3)
