"""The mini model's components as standard diffusers and transformers classes, untrained, and their export."""

from __future__ import annotations

import copy
import itertools
import json
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dsd_fast.models.mini.digits import DIGIT_NAMES
from dsd_fast.models.mini.scenes import COLOURS, IMAGE_SIZE, RELATIONS, SHAPES, SIZES

__all__ = ["MAX_TOKENS", "WIDTH", "Components", "build", "build_tokenizer", "export", "preprocess"]

MAX_TOKENS = 24
WIDTH = 128
"""Width of the text states, and of CLIP's common embedding space."""

Network = TypeVar("Network", bound=torch.nn.Module)

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": IMAGE_SIZE},
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@dataclass
class Components:
    """The networks and tokenizer of one mini model. `clip.text_model` is the text tower that the UNet reads."""

    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    clip: CLIPModel
    unet: UNet2DConditionModel


def build(seed: int = 0) -> Components:
    """Untrained components with seeded weights, float32 on the CPU."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=IMAGE_SIZE,
        )
        tokens = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "projection_dim": WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_TOKENS,
            **tokens,
        }
        vision = {
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH // 2,
            "projection_dim": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
        }
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH, **tokens))
        unet = UNet2DConditionModel(
            sample_size=IMAGE_SIZE // 4,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(48, 96, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=(2, 4, 4),
            norm_num_groups=8,
        )
    return Components(tokenizer, vae, clip, unet)


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer whose vocabulary has every word of the task as one token, and all bytes for other text.

    Padding is the end-of-text token, as in Stable Diffusion 1.x; `model_max_length` is `MAX_TOKENS`.
    """
    vocab, merges = _byte_pairs(_words())
    # `pad_token` keeps its default, the end-of-text token.
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS, do_lower_case=True)


def preprocess(images: Tensor) -> Tensor:
    """uint8 (N, 64, 64, 3) to float32 (N, 3, 64, 64) in [-1, 1], for the VAE and for CLIP alike."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def export(parts: Components, folder: Path) -> int:
    """Writes the model in fp16 as a `StableDiffusionPipeline` folder plus `clip/`, replacing what is there.

    The folder appears whole: everything is written beside it first. Returns its size in bytes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        new = Path(work) / "new"
        _write(parts, new)
        new.chmod(0o755)
        if folder.exists():
            os.replace(folder, Path(work) / "old")
        os.replace(new, folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write(parts: Components, folder: Path) -> None:
    tower = CLIPTextModel(CLIPTextConfig(**parts.clip.config.text_config.to_dict()))
    source = parts.clip.text_model.state_dict()
    wanted = tower.state_dict()
    tower.load_state_dict({key: source[key.removeprefix("text_model.")] for key in wanted})
    scheduler = PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    # SD 1.x names this option in its scheduler file, and samplers made from that file read it.
    scheduler.register_to_config(clip_sample=False)
    pipeline = StableDiffusionPipeline(
        vae=_half(parts.vae),
        text_encoder=tower.half(),
        tokenizer=parts.tokenizer,
        unet=_half(parts.unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # Published text encoders have this prefix, which every version of transformers reads and only some write.
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    clip = folder / "clip"
    _half(parts.clip).save_pretrained(clip)
    parts.tokenizer.save_pretrained(clip)
    (clip / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR, indent=2) + "\n")
    for target in (folder / "tokenizer", clip):
        parts.tokenizer.backend_tokenizer.model.save(str(target))
    # transformers loads in the dtype that the file names, diffusers in float32: half weights are only how they are
    # stored, and a stock pipeline must get one dtype.
    for target in (folder / "text_encoder", clip):
        config = json.loads((target / "config.json").read_text())
        for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
            part.update({key: "float32" for key in ("dtype", "torch_dtype") if key in part})
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def _half(module: Network) -> Network:
    """A half-precision copy, so that exporting leaves the network that trains as it was."""
    return copy.deepcopy(module).half()


def _words() -> list[str]:
    words = ["a", "photo", "of", "the", "digit", *DIGIT_NAMES, *SIZES, *COLOURS, *SHAPES]
    words += [word for relation in RELATIONS for word in relation.split()]
    words += ["an", "and", "on", "in", "is", "to", "at", "with", "next", "picture", "image", "object", "background"]
    return list(dict.fromkeys(words))


def _byte_pairs(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE: the vocabulary in CLIP's order, and the merges that make every word one token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in pieces):
        counts = Counter(pair for parts in pieces for pair in itertools.pairwise(parts))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(parts, best) for parts in pieces]
    names = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges] + [_BOS, _EOS]
    # Different pairs can make the same piece; it is one token.
    return {name: index for index, name in enumerate(dict.fromkeys(names))}, merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
