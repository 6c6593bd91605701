import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from dsd_fast.models import mini
from dsd_fast.models.mini.digits import DIGIT_NAMES
from dsd_fast.models.mini.scenes import COLOURS, EVAL_SEED, RELATIONS, SHAPES, SIZES, scene


@pytest.fixture(scope="module")
def pipe():
    loaded = StableDiffusionPipeline.from_pretrained(mini.path(), local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_model_stays_under_sixteen_megabytes_in_half_precision_and_what_is_added_under_four():
    files = [file for file in mini.path().rglob("*") if file.is_file()]
    added = [file for file in files if file.relative_to(mini.path()).parts[0] in ("controlnet", "lora")]
    assert len(added) == 3
    assert sum(file.stat().st_size for file in added) <= 4_000_000
    assert sum(file.stat().st_size for file in files) - sum(file.stat().st_size for file in added) <= 16_000_000
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt"}
    for file in mini.path().rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


def test_stock_pipeline_loads_every_component(pipe):
    assert pipe.safety_checker is None
    assert pipe.feature_extractor is None
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    assert pipe.vae_scale_factor == 4
    assert pipe.unet.config.sample_size == 16
    assert pipe.unet.config.cross_attention_dim == pipe.text_encoder.config.hidden_size == 128
    sections = {name.split(".")[0] for name, _ in pipe.unet.named_modules() if name.endswith("attn2")}
    assert sections == {"down_blocks", "mid_block", "up_blocks"}
    config = pipe.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.num_train_timesteps, config.prediction_type, config.steps_offset) == (1000, "epsilon", 1)
    assert config.clip_sample is False


def test_stock_pipeline_draws_a_picture(pipe):
    states, negative = pipe.encode_prompt("a red circle", "cpu", 1, True)
    assert states.shape == negative.shape == (1, 24, 128)
    generator = torch.Generator().manual_seed(0)
    image = pipe("a red circle", num_inference_steps=4, generator=generator, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()


def test_scaled_latents_have_about_unit_deviation(pipe):
    pixels = np.stack([scene(EVAL_SEED + i).image for i in range(64)])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    assert latents.shape == (64, 4, 16, 16)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=0.2)
    assert latents.mean((0, 2, 3)).abs().max() < 0.2


def test_every_word_of_the_task_is_one_token(pipe):
    words = ["a", "photo", "of", "the", "digit", *COLOURS, *SHAPES, *SIZES, *DIGIT_NAMES]
    words += [word for relation in RELATIONS for word in relation.split()]
    tokens = [pipe.tokenizer(word).input_ids[1:-1] for word in words]
    assert all(len(ids) == 1 for ids in tokens)
    assert len({ids[0] for ids in tokens}) == len(set(words))


def test_tokenizer_pads_as_stable_diffusion_one_and_takes_any_text(pipe):
    tokenizer = pipe.tokenizer
    assert isinstance(tokenizer, CLIPTokenizer)
    assert tokenizer.model_max_length == 24
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids = tokenizer("A small RED circle", padding="max_length").input_ids
    assert len(ids) == 24
    assert ids[0] == tokenizer.bos_token_id
    assert set(ids[5:]) == {tokenizer.eos_token_id}
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a small red circle"
    for text in ("", "Grüße, 猫! \x00 ' \n 12.5%", "unbelievable " * 50):
        cut = tokenizer(text, truncation=True, max_length=24).input_ids
        assert len(cut) <= 24
        assert max(cut) < len(tokenizer)


def test_slow_vocabulary_files_make_the_same_tokenizer(pipe):
    folder = mini.path() / "tokenizer"
    vocab = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text().splitlines()[1:]
    rebuilt = CLIPTokenizer(vocab=vocab, merges=[tuple(line.split()) for line in lines])
    text = "a large cyan cross left of a yellow hippopotamus"
    assert rebuilt(text).input_ids == pipe.tokenizer(text).input_ids


def test_clip_loads_and_shares_the_text_tower(pipe):
    clip = CLIPModel.from_pretrained(mini.path() / "clip", local_files_only=True)
    processor = CLIPProcessor.from_pretrained(mini.path() / "clip", local_files_only=True)
    image = Image.fromarray(scene(EVAL_SEED).image)
    batch = processor(text=["a red circle", "a blue ring"], images=[image], padding=True, return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    with torch.inference_mode():
        assert clip(**batch).logits_per_image.shape == (1, 2)
        ids = batch["input_ids"]
        assert torch.equal(clip.text_model(ids).last_hidden_state, pipe.text_encoder(ids).last_hidden_state)
