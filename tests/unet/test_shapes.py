"""UNets of other shapes than the families': without a middle block, with one without attention, with LCM's guidance
embedding; and those that torch.compile wrapped. `test_program` compares their layers with diffusers'."""

import logging

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

import dsd_fast as dsd
from dsd_fast.cli.info.costs import describe
from dsd_fast.diffusion import RowNoise, guidance_embedding, img2img_timestep, sample
from dsd_fast.features.layers import layer_set
from dsd_fast.matching import official_layers
from dsd_fast.matching.layers import layer_weights, parts_without
from dsd_fast.models import ModelError
from dsd_fast.reference import matching
from dsd_fast.unet import UNetProgram
from dsd_fast.unet.cudagraph import CudaGraph
from dsd_fast.unet.stream import HEADROOM
from tests.tiny import CROSS_ATTENTION_DIM, SHAPES, tiny_pipeline, tiny_unet, trained_like
from tests.unet.compiled import SCORE, TOKENS, Case, run, same
from tests.unet.test_replay import Again

GUIDANCE = 12
FEATURE = "down-level0-repeat0-res-out"
# The last block with cross-attention of each part, of each of its transformers the last block.
OFFICIAL = {
    "bk-sdm-base": (
        "down-level2-repeat0-vit-block0",
        "mid-vit-block0",
        "up-level3-repeat0-vit-block0",
        "up-level3-repeat1-vit-block0",
    ),
    "tiny-sd": ("down-level2-repeat0-vit-block0", "up-level2-repeat0-vit-block0", "up-level2-repeat1-vit-block0"),
    "ssd-1b": (
        "down-level2-repeat0-vit-block0",
        "down-level2-repeat1-vit-block2",
        "up-level1-repeat0-vit-block1",
        "up-level1-repeat1-vit-block0",
        "up-level1-repeat2-vit-block0",
    ),
}


def distilled(**options):
    """A network without a middle block that reads a guidance embedding."""
    config = tiny_unet("tiny-sd").config
    unet = diffusers.UNet2DConditionModel.from_config(config, time_cond_proj_dim=GUIDANCE)
    return Case("sd15", trained_like(unet, 0).requires_grad_(False), **options)


def guided_request(case, *counts):
    request = case.request(*counts)
    g = torch.Generator().manual_seed(5)
    return request | {"timestep_cond": torch.randn(len(request["latents"]), GUIDANCE, generator=g)}


def pipeline(shape):
    """A stock pipeline of the shape's family with its UNet."""
    pipe = tiny_pipeline(SHAPES[shape][0])
    pipe.unet = tiny_unet(shape)
    return pipe


@pytest.mark.parametrize("shape", OFFICIAL)
def test_official_layers_are_the_last_of_each_part_that_has_cross_attention(shape, caplog):
    program = UNetProgram(tiny_unet(shape))
    wanted = [f"{block}-cross" for block in OFFICIAL[shape]]
    assert official_layers(program) == wanted
    with caplog.at_level(logging.WARNING, logger="dsd_fast"):
        assert list(layer_weights(program, "official")) == wanted
    bare = shape != "bk-sdm-base"
    assert parts_without(program) == (["mid"] if bare else [])
    assert ("takes none of the part mid: no cross-attention there" in caplog.text) == bare
    assert any(name.startswith("mid-") for name in program.layer_ids) == (shape != "tiny-sd")


def test_a_network_without_cross_attention_has_no_layers_to_score():
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
    )
    with pytest.raises(ValueError, match="layers: got 'official', but this network has no cross-attention"):
        layer_weights(UNetProgram(unet), "official")


@pytest.mark.parametrize("shape", ["tiny-sd", "ssd-1b"])
@torch.no_grad()
def test_scores_are_those_of_the_reference(shape):
    pipe = pipeline(shape)
    pixels, captions = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ["a dog", "a cat"]
    matcher = dsd.Matcher(dsd.from_pipeline(pipe), dsd.MatchConfig(timesteps=[261, 700], official=True))
    wanted = matching.score(pipe, list(pixels), captions, timesteps=[261, 700])
    torch.testing.assert_close(matcher.score(list(pixels), captions), wanted, rtol=0, atol=1e-4)


def test_info_names_the_part_without_cross_attention():
    content = describe(dsd.from_pipeline(pipeline("tiny-sd")))
    assert content["without_scores"] == ["mid"]
    assert "mid" not in content["blocks"]
    assert not any(stop["after"] == "mid" for stop in content["cost"]["stops"])


def test_a_set_of_layers_that_a_network_lacks_is_refused_by_its_first_missing_id():
    program = UNetProgram(tiny_unet("tiny-sd"))
    with pytest.raises(ValueError, match="'practical-15' is for another network: this one has no 'up-level1-repeat2-"):
        layer_set("practical-15", program)
    with pytest.raises(ValueError, match="features: unknown id 'mid-vit-out'; the nearest"):
        program.plan(features=["mid-vit-out"])


@torch.no_grad()
def test_residuals_without_a_middle_block_are_added_as_diffusers_does():
    unet = tiny_unet("bk-sdm-small")
    program = UNetProgram(unet)
    g = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, TOKENS, 24, generator=g)
    *down, mid = (torch.randn(2, *shape, generator=g) for shape in program.residual_shapes(16, 16))
    plan = program.plan(noise_pred=True)
    got = plan.run(latents, 500, plan.encode_text(states), residuals=(down, mid)).noise_pred
    want = unet(latents, 500, states, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("shape", ["tiny-sd", "ssd-1b", "lcm"])
def test_flops_are_those_of_diffusers(shape):
    unet = tiny_unet(shape)
    # Attention that is written out, which the counter sees whole.
    unet.set_attn_processor(AttnProcessor())
    family = SHAPES[shape][0]
    plan = UNetProgram(unet).plan(noise_pred=True)
    arguments = {"timestep_cond": torch.zeros(1, GUIDANCE)} if shape == "lcm" else {}
    if family == "sdxl":
        arguments["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, 20), "time_ids": torch.zeros(1, 6)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.zeros(1, 4, 16, 16), 5, torch.zeros(1, TOKENS, CROSS_ATTENTION_DIM[family]), **arguments)
    got = plan.flops(latents=1, texts=1, rows=1, height=16, width=16, tokens=TOKENS)
    assert got == counter.get_total_flops()


@torch.no_grad()
def test_an_lcm_samples_as_its_stock_pipeline(tmp_path):
    parts = tiny_pipeline("sd15").components | {"unet": tiny_unet("lcm"), "scheduler": diffusers.LCMScheduler()}
    parts["unet"].register_to_config(sample_size=16)
    diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    model = dsd.load(tmp_path)
    pipe = model.to_pipeline()
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "latent"}
    want = pipe("a dog", guidance_scale=7.5, generator=torch.Generator().manual_seed(0), **options).images
    program = UNetProgram(model.unet)
    plan = program.plan(noise_pred=True)
    text, cond = (
        plan.encode_text(model.encode_prompts(["a dog"]).states),
        guidance_embedding(7.5, program.guidance_width),
    )
    draws = RowNoise([0], "diffusers")
    got = sample(
        model.new_scheduler(),
        lambda z, t: plan.run(z, [t], text, timestep_cond=cond).noise_pred,
        draws.start((4, 16, 16)),
        steps=3,
        draws=draws,
    )
    # Float32 sums in another order, divided by √ᾱ at the last timestep, 0.07.
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    with pytest.raises(ValueError, match="steps is 1000, which LCMScheduler refuses"):
        img2img_timestep(model.new_scheduler(), 50)


@torch.no_grad()
def test_guidance_embeddings_reach_every_latent_of_a_stream_and_of_compiled_runs(fresh_dynamo):
    case = distilled(backend="eager")
    plan, compiled = case.plans(features=[FEATURE], scores=[SCORE])
    request = guided_request(case, 3, 2, 7)
    want = run(plan, request)
    without = run(plan, request | {"timestep_cond": None})
    assert (without.features[FEATURE] - want.features[FEATURE]).abs().max() > 0.01
    one = request["timestep_cond"][0]
    same(run(plan, request | {"timestep_cond": one}), run(plan, request | {"timestep_cond": one.expand(3, GUIDANCE)}))
    same(run(compiled, request), want)
    # A recording is made for requests with an embedding and for those without.
    compiled._runtime = CudaGraph(Again())
    for given in (request, request | {"timestep_cond": None}, request):
        same(run(compiled, given), run(plan, given))
    rest = dict(request)
    text = plan.encode_text(rest.pop("states"))
    rest.pop("text")
    budget = text.nbytes + HEADROOM["cpu"] * plan.run_bytes(2, 16, 16, TOKENS)
    out = plan.empty_output(7, 16, 16, tokens=TOKENS)
    plan.stream(rest.pop("latents"), rest.pop("timesteps"), text, **rest, out=out, memory_budget=budget)
    same(out, want)


def test_gradients_reach_guidance_embeddings_with_checkpoints_as_without():
    case = distilled()
    plan = case.program.plan(noise_pred=True)
    gradients = []
    for checkpoint in (False, True):
        request = guided_request(case, 2, 2, 3)
        cond = request["timestep_cond"].requires_grad_()
        out = run(plan, request | {"checkpoint": checkpoint})
        gradients += torch.autograd.grad(out.noise_pred.square().sum(), cond)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


def test_guidance_embeddings_that_do_not_fit_are_refused():
    case = distilled()
    plan, request = case.program.plan(noise_pred=True), case.request()
    for given, message in (
        (torch.zeros(3, GUIDANCE), r"timestep_cond: got \(3, 12\) torch.float32, expected \(12,\) or \(2, 12\)"),
        (torch.zeros(2, GUIDANCE, dtype=torch.int64), "timestep_cond: got .* torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            run(plan, request | {"timestep_cond": given})
    plain = Case("sd15", tiny_unet("sd15"))
    with pytest.raises(ValueError, match="timestep_cond: given, expected None: this network reads no guidance"):
        run(plain.program.plan(noise_pred=True), plain.request() | {"timestep_cond": torch.zeros(GUIDANCE)})


@pytest.mark.parametrize(
    ("shape", "prediction_type", "side"),
    [("lcm", "epsilon", 64), ("uneven", "epsilon", 64), ("uneven", "v_prediction", 96), ("lcm-sdxl", "epsilon", 128)],
)
def test_a_config_without_sample_size_gets_its_familys(shape, prediction_type, side, caplog):
    pipe = tiny_pipeline(SHAPES[shape][0], prediction_type=prediction_type)
    config = {**tiny_unet(shape).config, "sample_size": None}
    pipe.unet = diffusers.UNet2DConditionModel.from_config(config)
    model = dsd.from_pipeline(pipe)
    assert model.image_size == (side * model.vae_scale_factor,) * 2
    assert f"the UNet's config has no sample_size; latents are taken as {side} x {side}" in caplog.text


def test_sizes_of_two_sides_and_none_that_are_no_sizes():
    pipe = tiny_pipeline("sd15")
    pipe.unet.register_to_config(sample_size=[16, 24])
    assert dsd.from_pipeline(pipe).image_size == (64, 96)
    pipe.unet.register_to_config(sample_size=[16, 24, 1])
    with pytest.raises(ModelError, match=r"sample_size = \[16, 24, 1\], expected an integer, or height and width"):
        dsd.from_pipeline(pipe)


def wrapped(pipe):
    for name in ("unet", "vae", "text_encoder"):
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))


def in_place(pipe):
    pipe.unet.compile(backend="eager")
    pipe.unet.compile_repeated_blocks(backend="eager")
    pipe.vae.compile(backend="eager")


def parts(pipe):
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")
    pipe.unet.up_blocks[1].attentions[0] = torch.compile(pipe.unet.up_blocks[1].attentions[0], backend="eager")


def method(pipe):
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")


@pytest.mark.parametrize("change", [wrapped, in_place, parts, method])
@torch.no_grad()
def test_compiled_networks_answer_as_plain_ones(change, fresh_dynamo):
    pipe = tiny_pipeline("sd15")
    pixels, captions = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), ["a dog", "a cat"]
    config = dsd.MatchConfig(timesteps=[500])
    want = dsd.Matcher(dsd.from_pipeline(pipe), config).score(list(pixels), captions)
    change(pipe)
    before = dict(pipe.components)
    model = dsd.from_pipeline(pipe)
    # Where a module has a forward of its own, its functions are not called past it, which round elsewhere.
    torch.testing.assert_close(dsd.Matcher(model, config).score(list(pixels), captions), want, rtol=1e-5, atol=1e-5)
    assert all(pipe.components[name] is part for name, part in before.items())
    assert type(model.to_pipeline().unet) is diffusers.UNet2DConditionModel
    # The bare network, as it was given.
    assert UNetProgram(pipe.unet).score_ids == UNetProgram(model.unet).score_ids


def test_a_compiled_controlnet_and_another_compiled_unet_are_taken_for_what_they_wrap(fresh_dynamo):
    model = dsd.load("mini")
    net = diffusers.ControlNetModel.from_unet(model.unet)
    assert dsd.models.controlnet.Control(torch.compile(net, backend="eager")).net is net
    assert model.with_unet(torch.compile(model.unet, backend="eager")).unet is model.unet


def test_another_forward_is_refused_though_it_is_compiled():
    unet = tiny_unet("sd15")
    unet.forward = torch.compile(lambda *args, **kwargs: None, backend="eager")
    with pytest.raises(ValueError, match="unet: another forward was put on"):
        UNetProgram(unet)
