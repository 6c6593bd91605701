"""ControlNets against stock pipelines and stock nets, on the mini model and on a tiny SDXL."""

import dataclasses
import functools
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import dsd_fast as dsd
from dsd_fast.images.canny import canny
from dsd_fast.models import ModelError
from dsd_fast.models.controlnet import Control, check_controls, control_residuals, load_controlnet
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from tests.tiny import tiny_pipeline, trained_like


def invert(image):
    return Image.fromarray(255 - np.asarray(image))


def net_for(unet, seed, channels=(4, 8, 8)):
    """A ControlNet with a residual at every skip that is not zero."""
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    trained_like(net, seed)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(scope="module")
def nets(model):
    return [net_for(model.unet, seed) for seed in (1, 2)]


def picture(seed):
    return Image.fromarray(scene(EVAL_SEED + seed).image)


def noise(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.newest
def test_denoising_equals_the_stock_pipeline(model, nets, count):
    # Scales below one, so that a few steps of an untrained net stay finite.
    controls = [Control(net, invert, scale) for net, scale in zip(nets, (0.1, 0.05), strict=True)][:count]
    stock = model.to_pipeline()
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **{key: value for key, value in stock.components.items() if key != "image_encoder"},
        controlnet=MultiControlNetModel([control.net for control in controls]) if count == 2 else controls[0].net,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    image, start = picture(0), noise(1, 4, 16, 16)
    shown, scales = [invert(image)] * count, [control.scale for control in controls]
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "latents": start, "output_type": "latent"}
    expected = pipe(
        "a red circle",
        image=shown if count == 2 else shown[0],
        controlnet_conditioning_scale=scales if count == 2 else scales[0],
        **options,
    ).images
    plain = stock("a red circle", **options).images

    check_controls(controls, model)
    plan = dsd.unet.UNetProgram(model.unet).plan(noise_pred=True)
    states = model.encode_prompts(["a red circle"]).states
    conditions = [control.prepare(image, (64, 64))[None] for control in controls]
    scheduler = model.new_scheduler()
    scheduler.set_timesteps(2)
    latents = start
    for t in scheduler.timesteps:
        residuals = control_residuals(controls, conditions, latents, t, states)
        predicted = plan.run(latents, t, plan.encode_text(states), residuals=residuals).noise_pred
        latents = scheduler.step(predicted, t, latents).prev_sample
    # Three float32 passes of about 50 layers, each rounded in another order: 1e-5 a pass.
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert (expected - plain).abs().mean() > 0.1 * plain.abs().mean()


@torch.no_grad()
def test_rows_are_indexed(model, nets):
    nets = [net_for(model.unet, seed).double() for seed in (1, 2)]
    controls = [Control(nets[0], None, 0.7), Control(nets[1], None, 1.3)]
    latents, states = noise(3, 4, 16, 16, dtype=torch.float64), noise(2, 24, 128, dtype=torch.float64)
    conditions = [noise(2, 3, 64, 64).abs(), noise(2, 3, 64, 64).cos()]
    times = torch.tensor([10, 400, 900])
    of_latent, of_text, of_condition = [2, 0, 0, 1, 2], [1, 1, 0, 0, 1], [0, 1, 1, 1, 0]
    down, mid = control_residuals(
        controls,
        conditions,
        latents,
        times,
        states,
        latent_index=of_latent,
        text_index=torch.tensor(of_text),
        condition_index=of_condition,
    )
    multi = MultiControlNetModel(nets)
    for row, (i, m, n) in enumerate(zip(of_latent, of_text, of_condition, strict=True)):
        shown = [condition[n : n + 1].double() for condition in conditions]
        expected_down, expected_mid = multi(
            latents[i : i + 1], times[i], states[m : m + 1], shown, [0.7, 1.3], return_dict=False
        )
        for got, want in zip((*down, mid), (*expected_down, expected_mid), strict=True):
            torch.testing.assert_close(got[row : row + 1], want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_one_of_a_kind_serves_all_rows(model, nets):
    control, states = Control(nets[0], None), noise(1, 24, 128)
    conditions, latents = [noise(1, 3, 64, 64).cos()], noise(3, 4, 16, 16)
    got = control_residuals([control], conditions, latents, 400, states)
    want = control_residuals(
        [control],
        [conditions[0].expand(3, -1, -1, -1)],
        latents,
        [400, 400, 400],
        states.expand(3, -1, -1),
        latent_index=[0, 1, 2],
    )
    for a, b in zip((*got[0], got[1]), (*want[0], want[1]), strict=True):
        assert len(a) == 3
        assert torch.equal(a, b)


@torch.no_grad()
def test_sdxl_reads_pooled_text_and_sizes():
    model = dsd.from_pipeline(tiny_pipeline("sdxl"))
    control = Control(net_for(model.unet, 1, channels=(4, 8)), scale=0.5)
    check_controls([control], model)
    texts = model.encode_prompts(["a cat", "a dog"])
    latents, condition = noise(2, 4, 16, 16), noise(2, 3, 32, 32).cos()
    ids = torch.tensor([[32.0, 32, 0, 0, 32, 32], [16, 16, 0, 4, 32, 32]])
    options = {"pooled": texts.pooled, "text_index": [1, 0]}
    down, mid = control_residuals([control], [condition], latents, 261, texts.states, time_ids=ids, **options)
    expected = control.net(
        latents,
        261,
        texts.states.flip(0),
        condition,
        conditioning_scale=0.5,
        added_cond_kwargs={"text_embeds": texts.pooled.flip(0), "time_ids": ids},
        return_dict=False,
    )
    for got, want in zip((*down, mid), (*expected[0], expected[1]), strict=True):
        torch.testing.assert_close(got, want)
    one = control_residuals([control], [condition], latents, 261, texts.states, time_ids=ids[0], **options)
    torch.testing.assert_close(one[1][:1], mid[:1])
    assert not torch.allclose(one[1][1:], mid[1:], rtol=1e-3)
    with pytest.raises(ValueError, match=r"pooled: got None, expected \(2, width\)"):
        control_residuals([control], [condition], latents, 261, texts.states, time_ids=ids)
    with pytest.raises(ValueError, match=r"time_ids: got \(6, 2\), expected \(6,\) or \(2, 6\)"):
        control_residuals([control], [condition], latents, 261, texts.states, time_ids=ids.T, **options)


def test_residuals_have_gradients(model, nets):
    latents = noise(1, 4, 16, 16).requires_grad_()
    condition = noise(1, 3, 64, 64).cos().requires_grad_()
    control_residuals([Control(nets[0])], [condition], latents, 10, noise(1, 24, 128))[1].sum().backward()
    assert latents.grad.abs().min() > 0
    assert condition.grad.abs().max() > 0


def test_a_condition_is_made_at_the_networks_size(nets):
    pytest.importorskip("cv2")
    image = picture(1).resize((100, 80))
    got = Control(nets[0]).prepare(image, (64, 48))
    resized = image.resize((48, 64), Image.Resampling.BICUBIC)
    processor = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
    assert torch.equal(got, processor.preprocess(canny(resized))[0])
    assert got.is_contiguous()
    assert 0 < got.mean() < 0.5
    assert torch.equal(Control(nets[0], None).prepare(image, (64, 48)), processor.preprocess(resized)[0])
    with pytest.raises(ValueError, match=r"condition made \(10, 10\) of a picture of \(width, height\) = \(48, 64\)"):
        Control(nets[0], lambda shown: shown.resize((10, 10))).prepare(image, (64, 48))


def test_a_control_is_checked_and_describes_itself(nets):
    assert Control(nets[0]).settings() == {"condition": "dsd_fast.images.canny.canny", "scale": 1.0}
    low = Control(nets[0], functools.partial(canny, low=50), scale=2)
    assert low.settings() == {"condition": "dsd_fast.images.canny.canny(low=50)", "scale": 2}
    assert json.dumps(Control(nets[0], None).settings()) == '{"condition": null, "scale": 1.0}'
    with pytest.raises(ModelError, match="net is of type UNet2DConditionModel, expected a diffusers ControlNetModel"):
        Control(tiny_pipeline("sd15").unet)
    with pytest.raises(ModelError, match="net has global_pool_conditions"):
        Control(ControlNetModel(**TINY, global_pool_conditions=True))
    for scale in (float("nan"), "1"):
        with pytest.raises(ValueError, match=r"scale is .*, expected a finite number"):
            dataclasses.replace(low, scale=scale)
    with pytest.raises(ValueError, match="condition is of type str, expected a function or None"):
        dataclasses.replace(low, condition="canny")


TINY = {
    "block_out_channels": (48, 96, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "conditioning_embedding_out_channels": (4, 4, 4),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_channels": 9}, "in_channels = 9, expected the UNet's 4"),
        ({"cross_attention_dim": 64}, "cross_attention_dim = 64, expected the UNet's 128"),
        ({"block_out_channels": (48, 96, 64)}, r"residuals of \(channels, halvings\) = .*\(64, 2\)"),
        ({"layers_per_block": 2}, r"residuals of \(channels, halvings\)"),
        ({"conditioning_embedding_out_channels": (4, 4)}, "pixels per latent position = 2, expected the UNet's 4"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 68,
            },
            "addition_embed_type = text_time, expected the UNet's None",
        ),
    ],
)
def test_nets_for_another_unet_are_refused(model, nets, changed, message):
    with pytest.raises(ModelError, match=rf"controls\[1\]: the ControlNet has {message}"):
        check_controls([Control(nets[0]), Control(ControlNetModel(**TINY | changed))], model)


def test_nets_of_another_type_are_refused(model, nets):
    with pytest.raises(ModelError, match=r"dtype = torch.float64, expected the UNet's torch.float32"):
        check_controls([Control(net_for(model.unet, 1).double())], model)
    without_text = {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}
    check_controls([Control(ControlNetModel(**TINY | without_text | {"cross_attention_dim": 64}))], model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conditions": []}, "conditions: got 0 for 1 controls"),
        ({"conditions": [torch.zeros(2, 3, 32, 64)]}, r"conditions\[0\]: got \(2, 3, 32, 64\) .*, expected \(N, 3, 64"),
        ({"conditions": [torch.zeros(2, 3, 64, 64, dtype=torch.uint8)]}, "torch.uint8, expected .* floating point"),
        ({"latents": torch.zeros(2, 3, 16, 16)}, r"latents: got \(2, 3, 16, 16\), expected \(P, 4, h, w\)"),
        ({"latents": torch.zeros(2, 4, 16, 16).double()}, "latents: got torch.float64 on cpu, expected torch.float32"),
        ({"states": torch.zeros(2, 24, 64)}, r"states: got \(2, 24, 64\), expected \(M, T, 128\)"),
        ({"timesteps": [1, 2, 3]}, r"timesteps: got \(3,\), expected one or \(2,\)"),
        ({"latent_index": [0, 2]}, "latent_index: values from 0 to 2, expected 0 to 1"),
        ({"text_index": [0, -1]}, "text_index: values from -1 to 0, expected 0 to 1"),
        ({"condition_index": [0.0, 1.0]}, "condition_index: got .* torch.float32, expected a list of integers"),
        ({"latent_index": [0, 1, 1]}, "text_index: needed when there are 2 for 3 rows"),
        ({"latent_index": [0, 1, 1], "text_index": [0, 0]}, "text_index: got 2 entries, expected 3"),
    ],
)
def test_residuals_check_their_arguments(nets, changed, message):
    given = {
        "conditions": [torch.zeros(2, 3, 64, 64)],
        "latents": torch.zeros(2, 4, 16, 16),
        "timesteps": 10,
        "states": torch.zeros(2, 24, 128),
    }
    with pytest.raises(ValueError, match=message):
        control_residuals([Control(nets[0])], **given | changed)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    ControlNetModel(**TINY).save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def refused(message, *args, **options):
    with pytest.raises(ModelError, match=message):
        load_controlnet(*args, **options)


def test_load_a_folder(folder):
    torch.manual_seed(0)
    expected = ControlNetModel(**TINY).state_dict()
    for source in (folder, str(folder)):
        net = load_controlnet(source, dtype="float64")
        assert not net.training
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, expected[name].double())
            assert not parameter.requires_grad


def test_load_refuses(folder, tmp_path):
    refused("ControlNet '.*nowhere' is a folder that does not exist", tmp_path / "nowhere")
    refused("ControlNet 'some/one' is neither a folder nor in the hub cache", "some/one", local_files_only=True)
    refused("revision is 'main', but ControlNet '.*' is a folder", folder, revision="main")
    refused("dtype is 'int8', expected float32", folder, dtype="int8")
    refused("device is 'cuda:99', but torch sees", folder, device="cuda:99")
    refused("has no weights of variant 'fp16', but diffusion_pytorch_model.safetensors", folder, variant="fp16")
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused("ControlNet '.*' cannot be loaded: ", folder)
    weights.rename(folder / "diffusion_pytorch_model.bin")
    refused("ControlNet '.*' has its weights only as pickle .diffusion_pytorch_model.bin.", folder)
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DConditionModel"}))
    refused("ControlNet '.*' is a UNet2DConditionModel, expected a ControlNetModel", folder)
