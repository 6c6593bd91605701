"""LoRA checkpoints in the official format."""

import re

import pytest
import torch
from safetensors.torch import save_file

import dsd_fast as dsd
from dsd_fast.compat import DSDPipeline
from dsd_fast.models import ModelError
from tests.compat.pairs import PROMPTS, TIMES, images, official
from tests.tiny import tiny_pipeline

MODULES = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}


def checkpoint(unet, seed=0, rank=4):
    """An official state dict with weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, module in unet.named_modules():
        if not name.endswith((".attn1", ".attn2")):
            continue
        for projection, inner in MODULES.items():
            layer = module.get_submodule(inner)
            for side, shape in (("down", (rank, layer.in_features)), ("up", (layer.out_features, rank))):
                key = f"{name}.processor.{projection}_lora.{side}.weight"
                result[key] = 0.2 * torch.randn(shape, generator=generator)
    return result


def merged(family, weights):
    """A stock pipeline with W + up · down in place of each W."""
    pipe = tiny_pipeline(family)
    with torch.no_grad():
        for key, down in weights.items():
            if not key.endswith("down.weight"):
                continue
            path, projection = re.fullmatch(r"(.*)\.processor\.(\w+)_lora\.down\.weight", key).groups()
            layer = pipe.unet.get_submodule(f"{path}.{MODULES[projection]}")
            layer.weight += weights[key.removesuffix("down.weight") + "up.weight"] @ down
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline("sd21").save_pretrained(folder)
    return folder


def near(pipe, want):
    got = pipe(prompt=PROMPTS, image=images(3, pipe.model.image_size[0]), sampled_timestep=TIMES)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_official_checkpoint_counts_as_its_merged_weights(folder, tmp_path):
    pipe = DSDPipeline.from_pretrained(folder)
    weights = checkpoint(pipe.unet)
    assert len(weights) == 256
    torch.save(weights, tmp_path / "pytorch_model.bin")
    plain = tiny_pipeline("sd21")
    near(pipe, official(plain, images(3, 128)))
    pipe.unet.load_attn_procs(tmp_path)
    near(pipe, official(merged("sd21", weights), images(3, 128)))
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    assert not any(module.training for module in pipe.unet.modules())
    # Another one takes its place.
    other = checkpoint(plain.unet, seed=1, rank=2)
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other/pytorch_lora_weights.safetensors")
    pipe.load_attn_procs(tmp_path / "other")
    assert list(pipe.unet.peft_config) == ["dsd"]
    near(pipe, official(merged("sd21", other), images(3, 128)))


def test_sources_of_a_checkpoint(folder, tmp_path):
    stock = tiny_pipeline("sd15")
    weights = checkpoint(stock.unet)
    want = official(merged("sd15", weights), images(3))
    save_file(weights, tmp_path / "mine.safetensors")
    for source, name in ((tmp_path / "mine.safetensors", None), (tmp_path, "mine.safetensors"), (weights, None)):
        pipe = DSDPipeline(dsd.from_pipeline(tiny_pipeline("sd15")))
        pipe.load_attn_procs(source, weight_name=name)
        near(pipe, want)
    prefixed = {f"unet.{key}": value for key, value in weights.items()}
    pipe = DSDPipeline(dsd.from_pipeline(tiny_pipeline("sd15")))
    pipe.load_attn_procs(prefixed)
    near(pipe, want)


def test_a_pickle_of_anything_else_is_refused(folder, tmp_path):
    pipe = DSDPipeline.from_pretrained(folder)
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin' cannot be read as tensors alone"):
        pipe.unet.load_attn_procs(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds a list, expected a mapping of names to tensors"):
        pipe.unet.load_attn_procs(tmp_path)
    with pytest.raises(ModelError, match="is a pickle"):
        dsd.load(folder).load_lora(tmp_path, "dsd")
    with pytest.raises(ModelError, match="does not exist"):
        pipe.unet.load_attn_procs(tmp_path / "missing")
    with pytest.raises(ModelError, match=r"has no file 'pytorch_lora_weights\.safetensors' or 'pytorch_model\.bin'"):
        pipe.unet.load_attn_procs(folder)


def test_checkpoints_that_do_not_fit_are_refused_and_leave_nothing():
    stock = tiny_pipeline("sd15")
    pipe = DSDPipeline(dsd.from_pipeline(stock))
    weights = checkpoint(stock.unet)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight"
    cases = [
        (checkpoint(tiny_pipeline("sd21").unet), "has width 32, expected the UNet's 24"),
        ({**weights, "text_encoder.x": torch.zeros(1, 1)}, "holds 'text_encoder.x', expected matrices named"),
        ({**weights, key: torch.zeros(4)}, f"holds '{key}', expected matrices"),
        ({**weights, key: torch.zeros(3, 24)}, "has ranks 3 and 4, expected equal ones"),
        (
            {name: w for name, w in weights.items() if name != key},
            "has 255 tensors, expected 256; 'mid_block.*to_k' lacks",
        ),
        ({**weights, key.replace("attentions.0", "attentions.1"): weights[key]}, "no attention layer 'mid_block.att"),
    ]
    for case, message in cases:
        with pytest.raises(ModelError, match=message):
            pipe.load_attn_procs(case)
    assert not getattr(stock.unet, "peft_config", {})
    near(pipe, official(stock, images(3)))
