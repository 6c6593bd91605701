"""Small diffusers pipelines with random weights, shaped like SD 1.5, SD 2.1 and SDXL.

The classes, topologies and file layouts are the real ones; only the widths are small, so that a UNet forward takes
about ten milliseconds. Weights have the scale of trained ones (unit-variance activations, no zero layer): a zero
`conv_out` or `proj_out` would hide errors. Everything depends on the family and the seed alone.

Shapes of other published UNets (`SHAPES`) are a family's with some settings changed.

Families: "sd15" (PNDM, factor-4 VAE, conv projections), "sd21" (Euler, factor-8 VAE, linear projections, heads per
level), "sdxl" (Euler with leading spacing, factor-2 VAE, two text encoders, pooled text in the time embedding).
"""

import functools
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from transformers.models.clip.configuration_clip import CLIPVisionConfig

FAMILIES = ("sd15", "sd21", "sdxl")

# Widths of the text states each UNet attends to; SDXL sees both encoders' states side by side.
CROSS_ATTENTION_DIM = {"sd15": 24, "sd21": 32, "sdxl": 24 + 32}
POOLED_DIM = 20
ADDITION_TIME_EMBED_DIM = 8

# Shape → its family, and what it has otherwise.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bk-sdm-base": ("sd15", {"layers_per_block": 1}),
    "bk-sdm-small": ("sd15", {"layers_per_block": 1, "mid_block_type": None}),
    "tiny-sd": (
        "sd15",
        {
            "layers_per_block": 1,
            "mid_block_type": None,
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        },
    ),
    "ssd-1b": (
        "sdxl",
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [2, 2], [1, 3]],
            "reverse_transformer_layers_per_block": [[1, 2, 3], [2, 1, 1], 1],
        },
    ),
    "uneven": ("sd21", {"layers_per_block": (2, 1, 2, 1), "sample_size": None, "mid_block_type": "UNetMidBlock2D"}),
    "lcm": ("sd15", {"time_cond_proj_dim": 12, "sample_size": None}),
    "lcm-sdxl": ("sdxl", {"time_cond_proj_dim": 12, "time_embedding_dim": 40}),
}

_MERGES = ("r e", "a re", "re d</w>", "c i", "b l", "d o", "do g</w>", "c a", "ca t</w>", "a r")


def tiny_unet(family: str, seed: int = 0) -> diffusers.UNet2DConditionModel:
    """UNet of a family, or of one of `SHAPES`, on 16 × 16 latents, float32, in eval mode."""
    family, changed = SHAPES.get(family, (family, {}))
    config: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": CROSS_ATTENTION_DIM[family],
    }
    if family == "sdxl":
        config |= {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4, 4),
            "transformer_layers_per_block": (1, 2, 3),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": ADDITION_TIME_EMBED_DIM,
            "projection_class_embeddings_input_dim": 6 * ADDITION_TIME_EMBED_DIM + POOLED_DIM,
        }
    else:
        config |= {
            "block_out_channels": (16, 32, 32, 32),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "attention_head_dim": (2, 4, 4, 4) if family == "sd21" else 4,
            "use_linear_projection": family == "sd21",
        }
    unet = diffusers.UNet2DConditionModel(**{**config, **changed})
    return trained_like(unet, seed)


def tiny_vae(family: str, seed: int = 0) -> diffusers.AutoencoderKL:
    """Autoencoder whose scaled latents have about unit variance."""
    levels = {"sd15": 3, "sd21": 4, "sdxl": 2}[family]
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16 * 2 ** (levels - 1),
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )
    trained_like(vae, seed)
    with torch.no_grad():
        vae.quant_conv.weight[:4] /= vae.config.scaling_factor
        vae.post_quant_conv.weight *= vae.config.scaling_factor
    return vae


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Byte-level CLIP tokenizer: 256 letters, the same at a word's end, a few merges, two special tokens.

    The limit is 77 tokens. SD 2.x and SDXL's second tokenizer pad with "!".
    """
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in _MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(_MERGES) + "\n")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad_token}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return CLIPTokenizer.from_pretrained(path)


def tiny_text_encoder(
    tokenizer: CLIPTokenizer, width: int, *, projection: int | None = None, seed: int = 0
) -> CLIPTextModel:
    """Text encoder of the given width; `projection` adds a head of that width, as in SDXL's second encoder."""
    config = CLIPTextConfig(**_text_config(tokenizer, width), projection_dim=projection or width)
    encoder = CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
    return trained_like(encoder, seed)


def tiny_clip(seed: int = 0) -> CLIPModel:
    """CLIPModel for 32 × 32 pixel images, 16-wide shared space."""
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
    )
    config = CLIPConfig(
        text_config=_text_config(tiny_tokenizer(), 24), vision_config=vision.to_dict(), projection_dim=16
    )
    return trained_like(CLIPModel(config), seed)


def tiny_scheduler(family: str, prediction_type: str = "epsilon") -> diffusers.SchedulerMixin:
    """The family's usual scheduler: scaled-linear betas, 1000 timesteps."""
    common = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "steps_offset": 1,
    }
    if family == "sd15":
        return diffusers.PNDMScheduler(**common, skip_prk_steps=True, set_alpha_to_one=False)
    if family == "sd21":
        return diffusers.EulerDiscreteScheduler(**common, timestep_spacing="linspace")
    return diffusers.EulerDiscreteScheduler(**common, timestep_spacing="leading")


def tiny_pipeline(family: str, seed: int = 0, prediction_type: str = "epsilon") -> diffusers.DiffusionPipeline:
    """Stock StableDiffusionPipeline or StableDiffusionXLPipeline, float32, on the CPU, in eval mode."""
    unet, vae = tiny_unet(family, seed), tiny_vae(family, seed + 1)
    scheduler = tiny_scheduler(family, prediction_type)
    tokenizer = tiny_tokenizer("!" if family == "sd21" else "<|endoftext|>")
    if family == "sdxl":
        tokenizer_2 = tiny_tokenizer("!")
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=tiny_text_encoder(tokenizer, 24, seed=seed + 2),
            text_encoder_2=tiny_text_encoder(tokenizer_2, 32, projection=POOLED_DIM, seed=seed + 3),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            add_watermarker=False,
        )
    else:
        pipe = diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=tiny_text_encoder(tokenizer, CROSS_ATTENTION_DIM[family], seed=seed + 2),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny_lora(family: str, folder: Path, seed: int = 0, rank: int = 2) -> Path:
    """Writes a diffusers LoRA (UNet attention and text encoder 1, non-zero on both sides) and returns the file."""
    layers = _lora_layers(family, seed, rank)
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    kind.save_lora_weights(folder, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"])
    return Path(folder) / "pytorch_lora_weights.safetensors"


@functools.cache
def _lora_layers(family: str, seed: int, rank: int) -> dict[str, dict[str, Tensor]]:
    # Injecting adapters replaces modules in place, so the shapes are read from a pipeline made for this alone.
    pipe = tiny_pipeline(family, seed)
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, targets in (("unet", ["to_q", "to_k", "to_v", "to_out.0"]), ("text_encoder", ["q_proj", "v_proj"])):
        module = getattr(pipe, name)
        module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), "default")
        state = get_peft_model_state_dict(module, adapter_name="default")
        layers[name] = {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
    return layers


def load_tiny_lora(pipe: Any, family: str, folder: Path, seed: int = 0, rank: int = 2, **options: str) -> None:
    """Makes a LoRA as :func:`save_tiny_lora` does, and loads it as diffusers does."""
    # Offline, older diffusers wants a folder and a name instead of a file.
    file = save_tiny_lora(family, folder, seed, rank)
    pipe.load_lora_weights(file.parent, weight_name=file.name, **options)


# Of each way there is to hold an adapter: in dictionaries of parameters, in modules with buffers, without a strength,
# and as a copy of the whole module.
ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "loha": lambda: peft.LoHaConfig(r=2, alpha=8, target_modules=["to_k", "to_v", "conv1"], init_weights=False),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=["to_k", "to_v"], init_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=["to_k", "to_v"], feedforward_modules=[], init_ia3_weights=False),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["to_k", "to_v"], init_lora_weights=False),
    "modules_to_save": lambda: peft.LoraConfig(
        r=2,
        target_modules=["mid_block.attentions.0.proj_in"],
        modules_to_save=["to_k", "conv_out"],
        init_lora_weights=False,
    ),
}


def put_adapter(network: nn.Module, kind: str, name: str = "x") -> dict[str, Tensor]:
    """Puts an adapter of that kind whose weights are no first weights any more into a network; its parameters."""
    bare = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(0)
        peft.inject_adapter_in_model(ADAPTERS[kind](), network, name)
        new = {key: tensor for key, tensor in network.named_parameters() if id(tensor) not in bare}
        with torch.no_grad():
            for tensor in new.values():
                tensor.add_(0.05 * torch.randn(tensor.shape))
    network.eval().requires_grad_(False)
    return new


def trained_like(module: nn.Module, seed: int) -> nn.Module:
    """Overwrites every parameter so that activations keep about unit variance; returns the module in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, mean: float, std: float) -> None:
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    with torch.no_grad():
        done = set()
        for child in module.modules():
            if isinstance(child, nn.Linear | nn.Conv2d):
                normal(child.weight, 0.0, child.weight[0].numel() ** -0.5)
            elif isinstance(child, nn.Embedding):
                normal(child.weight, 0.0, 0.5)
            elif isinstance(child, nn.GroupNorm | nn.LayerNorm):
                normal(child.weight, 1.0, 0.1)
            else:
                continue
            done.add(id(child.weight))
            if getattr(child, "bias", None) is not None:
                normal(child.bias, 0.0, 0.1)
                done.add(id(child.bias))
        for name, parameter in module.named_parameters():
            # What is left: CLIP's class embedding and logit scale, which keep their own scales.
            if id(parameter) not in done and not name.endswith("logit_scale"):
                normal(parameter, 0.0, 0.5)
    return module.eval()


def _text_config(tokenizer: CLIPTokenizer, width: int) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level BPE (Radford et al. 2019); "!" is first, as in CLIP."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
