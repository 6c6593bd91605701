"""Checkpoints of one file in the original code's naming, written from a pipeline.

As diffusers' scripts convert_diffusers_to_original_stable_diffusion.py and …_sdxl.py do, for any number of levels.
"""

import re

import torch

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPENCLIP = {
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}


def checkpoint(pipe):
    """The networks' tensors under the original code's names."""
    parts = {"model.diffusion_model.": unet(pipe.unet), "first_stage_model.": vae(pipe.vae)}
    first, second = pipe.text_encoder, getattr(pipe, "text_encoder_2", None)
    if second is not None:
        parts["conditioner.embedders.0.transformer."] = openai(first)
        parts["conditioner.embedders.1.model."] = openclip(second)
    elif pipe.unet.config.use_linear_projection and pipe.unet.config.cross_attention_dim == 32:
        parts["cond_stage_model.model."] = openclip(first)
    else:
        parts["cond_stage_model.transformer."] = openai(first)
    return {f"{prefix}{key}": value.contiguous() for prefix, part in parts.items() for key, value in part.items()}


def unet(network):
    layers = network.config.layers_per_block
    result = {}
    for key, value in network.state_dict().items():
        match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", key)
        middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key)
        sampler = re.fullmatch(r"(down|up)_blocks\.(\d+)\.\w+samplers\.0\.conv\.(.*)", key)
        if match:
            side, level, kind, number, rest = match.groups()
            per_level = layers + 1
            place = int(level) * per_level + int(number) + (side == "down")
            name = f"{'input' if side == 'down' else 'output'}_blocks.{place}.{int(kind == 'attentions')}."
            name += resnet(rest) if kind == "resnets" else rest
        elif middle:
            kind, number, rest = middle.groups()
            name = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}."
            name += resnet(rest) if kind == "resnets" else rest
        elif sampler:
            side, level, rest = sampler.groups()
            if side == "down":
                name = f"input_blocks.{(int(level) + 1) * (layers + 1)}.0.op.{rest}"
            else:
                place = 2 if hasattr(network.up_blocks[int(level)], "attentions") else 1
                name = f"output_blocks.{int(level) * (layers + 1) + layers}.{place}.conv.{rest}"
        else:
            name = next(key.replace(f"{new}.", f"{old}.") for new, old in UNET.items() if key.startswith(f"{new}."))
        result[name] = value
    return result


def resnet(rest):
    layer, _, ending = rest.rpartition(".")
    return f"{RESNET[layer]}.{ending}"


def vae(network):
    levels = len(network.config.block_out_channels)
    result = {}
    for key, value in network.state_dict().items():
        name = key
        for new, old in VAE.items():
            name = re.sub(rf"(^|\.){re.escape(new)}\.", rf"\g<1>{old}.", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        # The original's projections of the middle attention are convolutions.
        result[name] = value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value
    return result


def openai(encoder):
    names = {key: "text_model." + key.removeprefix("text_model.") for key in encoder.state_dict()}
    return {name: encoder.state_dict()[key] for key, name in names.items()}


def openclip(encoder):
    result, projections = {}, {}
    for key, value in encoder.state_dict().items():
        name = key.removeprefix("text_model.")
        for new, old in OPENCLIP.items():
            name = name.replace(new, old)
        match = re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", name)
        if match:
            projections.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = value
        elif name == "text_projection.weight":
            result["text_projection"] = value.T
        else:
            result[name] = value
    return result | {name: torch.cat([three[side] for side in "qkv"]) for name, three in projections.items()}
