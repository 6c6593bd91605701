"""LoRA checkpoints in the official format."""

import re

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import dsd_fast as dsd
from dsd_fast.compat import DSDPipeline
from dsd_fast.compat.attn_procs import load_attn_procs, save_attn_procs
from dsd_fast.models import ModelError
from tests.compat.pairs import PROMPTS, TIMES, images, official
from tests.tiny import tiny_pipeline, tiny_unet

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
    reason = r"cannot be read as tensors alone .*Unsupported global: .*linear\.Linear"
    with pytest.raises(ModelError, match=rf"pytorch_model\.bin' {reason}"):
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
    up = key.replace("down", "up")
    other = key.replace("attentions.0", "attentions.1")
    cases = [
        (
            checkpoint(tiny_pipeline("sd21").unet),
            r"has shape \(4, 32\), expected \(4, 24\) for '.*attn2.to_k' of the unet",
        ),
        ({**weights, "text_encoder.x": torch.zeros(1, 1)}, "holds 'text_encoder.x', expected matrices named"),
        ({**weights, key: torch.zeros(4)}, rf"'{key}' has shape \(4,\), expected \(4, 24\) for 'mid_block"),
        ({**weights, key: torch.zeros(4, 24).long()}, f"'{key}' is of torch.int64, expected a floating"),
        ({**weights, key: [1.0]}, f"'{key}' is of type list, expected a floating-point tensor"),
        ({**weights, key: torch.zeros(0, 24)}, rf"'{key}' has shape \(0, 24\), expected \(1, 24\)"),
        ({**weights, key: weights[key].log()}, f"'{key}' has values that are not finite"),
        ({**weights, key: torch.zeros(3, 24)}, rf"'{up}' has shape \(32, 4\), expected \(32, 3\)"),
        ({name: w for name, w in weights.items() if name != key}, f"255 matrices, expected 256; '{key}' is missing"),
        ({name: w for name, w in weights.items() if name != up}, f"255 matrices, expected 256; '{up}' is missing"),
        ({**weights, f"unet.{key}": weights[key]}, f"holds '{key}' twice|under two names"),
        ({**weights, other: weights[key]}, f"holds '{other}', .* for attention layers that the UNet has"),
    ]
    for case, message in cases:
        with pytest.raises(ModelError, match=message):
            pipe.load_attn_procs(case)
    assert not getattr(stock.unet, "peft_config", {})
    near(pipe, official(stock, images(3)))


def adapted(name="mine", **options):
    """A UNet with a LoRA of its own."""
    unet = tiny_unet("sd21").requires_grad_(False)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(init_lora_weights=False, **options), name)
    return unet


@torch.no_grad()
def noise(unet):
    generator = torch.Generator().manual_seed(0)
    return unet(torch.randn(2, 4, 16, 16, generator=generator), 300, torch.randn(2, 5, 32, generator=generator)).sample


def test_a_checkpoint_that_was_loaded_is_saved_as_it_was(folder, tmp_path):
    pipe = DSDPipeline.from_pretrained(folder)
    weights = checkpoint(pipe.unet)
    # Another rank in one attention.
    small = {key: matrix for key, matrix in checkpoint(pipe.unet, rank=2).items() if key.startswith("mid_block")}
    weights.update(small)
    pipe.unet.load_attn_procs(weights)
    before = noise(pipe.unet)
    pipe.unet.save_attn_procs(tmp_path / "new" / "folder")
    assert [file.name for file in (tmp_path / "new/folder").iterdir()] == ["pytorch_lora_weights.safetensors"]
    saved = load_file(tmp_path / "new/folder/pytorch_lora_weights.safetensors")
    assert saved.keys() == weights.keys()
    assert len(saved) == 256
    assert all(torch.equal(saved[key], matrix) for key, matrix in weights.items())
    pipe.unet.load_attn_procs(tmp_path / "new" / "folder")
    assert torch.equal(noise(pipe.unet), before)
    pipe.unet.save_attn_procs(tmp_path, weight_name="mine.safetensors")
    assert (tmp_path / "mine.safetensors").read_bytes() == (
        tmp_path / "new/folder/pytorch_lora_weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["to_q", "to_out.0"]},
        {"r": 4, "lora_alpha": 1, "target_modules": r".*attn2\.to_[kv]", "rank_pattern": {"to_v": 2}},
        {"r": 3, "target_modules": ["to_k"], "rank_pattern": {r"mid_block.*": 5}, "alpha_pattern": {"attn1.to_k": 7}},
    ],
    ids=["alpha", "root", "cross-attention", "ranks"],
)
def test_any_lora_of_the_attentions_is_saved_as_what_it_adds(options, tmp_path):
    unet = adapted(**options)
    want = noise(unet)
    unet.set_adapters("mine", 0.5)
    save_attn_procs(unet, tmp_path, name="mine")
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(saved) == 256
    assert {matrix.dtype for matrix in saved.values()} == {torch.float32}
    # The official loader reads one rank for an attention's four projections.
    for key in saved:
        attention = key.partition(".processor.")[0]
        down = saved[f"{attention}.processor.to_k_lora.down.weight"]
        assert len(down) == (saved[key].shape[0] if ".down." in key else saved[key].shape[1])
    loaded = tiny_unet("sd21")
    load_attn_procs(loaded, tmp_path)
    # The scale is rounded into a matrix, where PEFT multiplies the product by it.
    torch.testing.assert_close(noise(loaded), want, rtol=0, atol=1e-5 * want.abs().max())
    # And as merged weights, which neither knows of.
    torch.testing.assert_close(noise(merged("sd21", saved).unet), want, rtol=0, atol=1e-5 * want.abs().max())
    assert float((noise(tiny_unet("sd21")) - want).abs().max()) > 1e-2 * want.abs().max()


def test_adapters_that_an_official_checkpoint_cannot_hold_are_refused(tmp_path):
    cases = [
        ({"target_modules": ["to_q", "proj_in"]}, r"weights for 'down_blocks.*proj_in', expected to_q, to_k, to_v"),
        ({"target_modules": ["to_q"], "use_dora": True}, "of another kind than plain LoRA, such as DoRA"),
        ({"target_modules": ["to_q"], "lora_bias": True}, "of another kind than plain LoRA, such as DoRA"),
        (
            {"target_modules": ["to_q"], "r": 17},
            r"'down_blocks.0.*to_q' of width 16 would get rank 17, which the offic",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ModelError, match=message):
            save_attn_procs(adapted(**options), tmp_path, name="mine")
    unet = adapted(target_modules=["to_q"])
    with pytest.raises(ModelError, match="the UNet has no adapter 'dsd'; it has mine"):
        save_attn_procs(unet, tmp_path)
    with pytest.raises(ModelError, match="the UNet has no adapter 'dsd'; it has none"):
        save_attn_procs(tiny_unet("sd21"), tmp_path)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin', expected a name that ends in \.safetensors"):
        save_attn_procs(unet, tmp_path, name="mine", weight_name="pytorch_model.bin")
    with torch.no_grad():
        unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.lora_B["mine"].weight[0, 0] = float("nan")
    with pytest.raises(
        ModelError, match=r"adapter 'mine': 'mid_block.*attn1.*to_q_lora\.up.*' has values that are not"
    ):
        save_attn_procs(unet, tmp_path, name="mine")
    assert not list(tmp_path.iterdir())
