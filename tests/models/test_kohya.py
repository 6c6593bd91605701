"""LoRA files as kohya's scripts write them, LoCon's convolutions among them, against weights merged by hand."""

import math

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import save_file
from torch import nn

import dsd_fast as dsd
from dsd_fast.models import ModelError

# What kohya's LoRA and LoCon adapt in the UNet: every linear layer and convolution inside of these.
BLOCKS = (Transformer2DModel, ResnetBlock2D, Downsample2D, Upsample2D)

# SDXL's blocks as its files name them. The tiny one has the same blocks.
SGM = {
    **{f"down_blocks.0.resnets.{i}": f"input_blocks_{1 + i}_0" for i in (0, 1)},
    **{f"down_blocks.1.resnets.{i}": f"input_blocks_{4 + i}_0" for i in (0, 1)},
    **{f"down_blocks.1.attentions.{i}": f"input_blocks_{4 + i}_1" for i in (0, 1)},
    **{f"down_blocks.2.resnets.{i}": f"input_blocks_{7 + i}_0" for i in (0, 1)},
    **{f"down_blocks.2.attentions.{i}": f"input_blocks_{7 + i}_1" for i in (0, 1)},
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "mid_block.resnets.0": "middle_block_0",
    "mid_block.attentions.0": "middle_block_1",
    "mid_block.resnets.1": "middle_block_2",
    **{f"up_blocks.0.resnets.{i}": f"output_blocks_{i}_0" for i in (0, 1, 2)},
    **{f"up_blocks.0.attentions.{i}": f"output_blocks_{i}_1" for i in (0, 1, 2)},
    **{f"up_blocks.1.resnets.{i}": f"output_blocks_{3 + i}_0" for i in (0, 1, 2)},
    **{f"up_blocks.1.attentions.{i}": f"output_blocks_{3 + i}_1" for i in (0, 1, 2)},
    **{f"up_blocks.2.resnets.{i}": f"output_blocks_{6 + i}_0" for i in (0, 1, 2)},
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
}
SGM_LAYERS = {
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}


def unet_layers(unet):
    for path, block in unet.named_modules():
        if isinstance(block, BLOCKS):
            for name, layer in block.named_modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    yield f"lora_unet_{path}_{name}".replace(".", "_"), layer


def sgm_layers(unet):
    for path, name in SGM.items():
        for inner, layer in unet.get_submodule(path).named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                parts = ["lora_unet", name, SGM_LAYERS.get(inner, inner.replace(".", "_"))]
                yield "_".join(part for part in parts if part), layer


def text_layers(encoder, prefix):
    for path, layer in encoder.named_modules():
        if isinstance(layer, nn.Linear) and ".layers." in path:
            yield f"{prefix}_text_model_{path.removeprefix('text_model.')}".replace(".", "_"), layer


def draw(layers):
    """Down, up and alpha of each layer; convolutions have a rank and an alpha of their own, as in LoCon.

    Some layers have another alpha, and some none, which means the rank.
    """
    weights, generator = {}, torch.Generator().manual_seed(0)
    for number, (name, layer) in enumerate(layers):
        rank, alpha = (3, 1.5) if layer.weight.ndim == 2 else (2, 0.5)
        down = [rank, *layer.weight.shape[1:]]
        up = [layer.weight.shape[0], rank] + [1] * (layer.weight.ndim - 2)
        for side, shape in (("down", down), ("up", up)):
            value = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
            weights[f"{name}.lora_{side}.weight"] = value
        if number % 9:
            weights[f"{name}.alpha"] = torch.tensor(2.5 if number % 8 == 0 else alpha)
    return weights


@torch.no_grad()
def merge(layers, weights):
    """W + alpha / rank · up · down, a convolution's down being the filter and its up one of a single position."""
    for name, layer in layers:
        down, up = (weights[f"{name}.lora_{side}.weight"] for side in ("down", "up"))
        scale = weights.get(f"{name}.alpha", torch.tensor(float(len(down)))) / len(down)
        layer.weight += scale * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)


@torch.no_grad()
def outputs(model):
    """Text states, and the noise prediction from the same text states by the plan and by the stock UNet."""
    states, time_ids = model.encode_prompts(["a red cat"]), model.time_ids(32, 32)
    fixed = torch.randn(states.states.shape, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plan = dsd.unet.UNetProgram(model.unet).plan(noise_pred=True)
    pooled, added = None, None
    if states.pooled is not None:
        pooled = torch.ones_like(states.pooled)
        added = {"text_embeds": pooled, "time_ids": time_ids[None]}
    predicted = plan.run(latents, 261, plan.encode_text(fixed, pooled), time_ids=time_ids).noise_pred
    return states.states, predicted, model.unet(latents, 261, fixed, added_cond_kwargs=added).sample


PREFIXES = {"sd15": ["lora_te"], "sd21": ["lora_te"], "sdxl": ["lora_te1", "lora_te2"]}


def file_layers(model, naming):
    layers = list((sgm_layers if naming == "original" else unet_layers)(model.unet))
    for encoder, prefix in zip(model.text_encoders, PREFIXES[naming if naming in PREFIXES else "sdxl"], strict=True):
        layers += text_layers(encoder, prefix)
    return layers


@pytest.mark.parametrize(
    ("family", "naming"), [("sd15", "sd15"), ("sd21", "sd21"), ("sdxl", "sdxl"), ("sdxl", "original")]
)
def test_a_file_equals_weights_merged_by_hand(family, naming, folders, tmp_path):
    merged, model = dsd.load(folders[family]), dsd.load(folders[family])
    plain, layers = outputs(model), file_layers(merged, naming)
    weights = draw(layers)
    # Every layer once, whatever it is called: SDXL's names cover the same layers.
    assert len(layers) == len(file_layers(merged, family))
    kernels = {value.shape[2:] for key, value in weights.items() if "lora_down" in key}
    assert kernels >= {(), (3, 3), (1, 1)}
    save_file(weights, tmp_path / "kohya.safetensors", {"ss_network_module": "lycoris.kohya"})
    merge(layers, weights)

    model.load_lora(tmp_path / "kohya.safetensors", "style")
    for got, want, before in zip(outputs(model), outputs(merged), plain, strict=True):
        # Two products of float32 round differently from one with the product, 1e-6 a layer and about 100 layers.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
        assert (want - before).abs().mean() > 0.05 * before.abs().mean()


def test_a_second_file_and_half_a_file(folders, tmp_path):
    merged, model = dsd.load(folders["sd15"]), dsd.load(folders["sd15"])
    layers = file_layers(merged, "sd15")
    for name, chosen in (("unet", layers[::7]), ("text", [layer for layer in layers if "lora_te" in layer[0]])):
        chosen = [layer for layer in chosen if ("lora_te" in layer[0]) == (name == "text")]
        weights = draw(chosen)
        save_file(weights, tmp_path / f"{name}.safetensors")
        model.load_lora(tmp_path, name, f"{name}.safetensors")
        merge(chosen, weights)
    assert set(model.unet.peft_config) == {"unet"}
    assert set(model.text_encoders[0].peft_config) == {"text"}
    second = draw([layer for layer in layers if "lora_unet" in layer[0]])
    save_file(second, tmp_path / "second.safetensors")
    for got, want in zip(outputs(model), outputs(merged), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    model.load_lora(tmp_path, "second", "second.safetensors")
    assert set(model.unet.peft_config) == {"unet", "second"}


def test_what_is_no_plain_lora_is_refused(folders, tmp_path):
    model = dsd.load(folders["sd15"])
    weights = draw(file_layers(model, "sd15")[:3])
    name = next(iter(weights)).split(".")[0]

    def refused(message, changed):
        save_file(weights | changed, tmp_path / "bad.safetensors")
        with pytest.raises(ModelError, match=message):
            model.load_lora(tmp_path, "style")
        assert not getattr(model.unet, "peft_config", {})

    others = {"hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lora_mid.weight": "LoCon in its Tucker", "diff": "differences"}
    for kind, method in others.items():
        message = rf"'{name}.{kind}', which is of another kind than plain LoRA and DoRA: {method}"
        refused(message, {f"{name}.{kind}": torch.ones(2, 2)})
    refused(f"'{name}.alphas', which is no part of a LoRA", {f"{name}.alphas": torch.ones(())})
    refused(
        "has weights for 'lora_unet_down_blocks_9_x', a layer that the model does not have",
        {"lora_unet_down_blocks_9_x.lora_down.weight": torch.ones(2, 2)},
    )
    refused("has weights for 'lora_te1_text_model_x'", {"lora_te1_text_model_x.alpha": torch.ones(())})
    down = weights[f"{name}.lora_down.weight"]
    for changed, message in (
        (torch.ones(3, 7), rf"'{name}.lora_down.weight' has shape \(3, 7\), expected \(3, 16, 1, 1\) for 'down_blocks"),
        (down / 0, f"'{name}.lora_down.weight' has values that are not finite"),
        (down.int(), f"'{name}.lora_down.weight' is of torch.int32, expected a floating-point tensor"),
    ):
        refused(message, {f"{name}.lora_down.weight": changed})
    for here, missing in (("lora_down", "lora_up"), ("lora_up", "lora_down")):
        half = {f"{name}.{kind}.weight": weights.pop(f"{name}.{kind}.weight") for kind in (here, missing)}
        refused(
            rf"has '{name}.{here}.weight' but no '{name}.{missing}.weight'",
            {f"{name}.{here}.weight": half[f"{name}.{here}.weight"]},
        )
        weights |= half
