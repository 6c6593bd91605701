"""Captions by tiny real captioners with random weights, against their own `generate` on one image at a time."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import dsd_fast as dsd
from dsd_fast.features.captions import QUALITY, caption, load_captioner
from dsd_fast.images import ImageError
from dsd_fast.models import ModelError
from tests.tiny import tiny_pipeline, trained_like

VOCABULARY = "a the photo of red green blue cat dog bird tree house old big small in on near with sky"
WORDS = VOCABULARY.split()
TEXT = {
    "vocab_size": 5 + len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "sep_token_id": 3,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SIZE = {"height": 32, "width": 32}


def tokenizer(folder):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return BertTokenizer.from_pretrained(folder)


def blip(folder):
    config = BlipConfig(text_config={**TEXT, "encoder_hidden_size": 16}, vision_config=VISION, projection_dim=16)
    processor = BlipProcessor(BlipImageProcessor(size=SIZE), tokenizer(folder))
    return BlipForConditionalGeneration(config), [processor]


def git(folder):
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
    return GitForCausalLM(GitConfig(vision_config=VISION, **TEXT)), [GitProcessor(image_processor, tokenizer(folder))]


def vit_bert(folder):
    decoder = BertLMHeadModel(BertConfig(**TEXT, is_decoder=True, add_cross_attention=True))
    model = VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**VISION)), decoder=decoder)
    model.generation_config.decoder_start_token_id = 2
    model.generation_config.pad_token_id = 0
    model.config.pad_token_id, model.config.decoder_start_token_id = 0, 2
    return model, [ViTImageProcessor(size=SIZE), tokenizer(folder)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for make in (blip, git, vit_bert):
        folder = made[make.__name__] = tmp_path_factory.mktemp(make.__name__)
        model, processors = make(folder)
        torch.manual_seed(0)
        trained_like(model, 1).save_pretrained(folder)
        for part in processors:
            part.save_pretrained(folder)
    return made


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8))


IMAGES = [picture(seed) for seed in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "a photo of"])
@pytest.mark.parametrize("kind", ["blip", "git", "vit_bert"])
@pytest.mark.newest
def test_captions_are_what_the_captioner_generates(kind, prefix, folders):
    folder = folders[kind]
    model, processors = {"blip": blip, "git": git, "vit_bert": vit_bert}[kind](folder)
    model = type(model).from_pretrained(folder)
    words, pixels = processors[-1], processors[0]
    words, pixels = getattr(words, "tokenizer", words), getattr(pixels, "image_processor", pixels)
    # [CLS] and the words of the prefix; each of them is one token.
    start = torch.tensor([[2, *(5 + WORDS.index(word) for word in prefix.split())]])
    expected = []
    for image in IMAGES:
        values = pixels(images=image, return_tensors="pt")["pixel_values"]
        if kind == "vit_bert":
            given = {"decoder_input_ids": start}
        elif kind == "git":
            given = {"input_ids": start}
        else:
            # BLIP drops the last token of what it is given, which is [SEP].
            given = {"input_ids": torch.cat([start, torch.tensor([[3]])], 1)} if prefix else {}
        tokens = model.generate(pixel_values=values, max_new_tokens=7, do_sample=False, **given)
        expected.append(words.decode(tokens[0], skip_special_tokens=True))
    assert all(text.startswith(prefix) and len(text) > len(prefix) for text in expected)
    assert len(set(expected)) > 1
    got = caption(IMAGES, folder, prefix=prefix, quality="", max_new_tokens=7, batch_size=2)
    assert got == expected
    again = caption(iter(IMAGES), load_captioner(folder), prefix=prefix, max_new_tokens=7, local_files_only=True)
    assert again == [f"{text}, {QUALITY}" for text in expected]


def test_prompts_fit_the_text_encoders(folders):
    captioner, model = load_captioner(folders["blip"]), dsd.from_pipeline(tiny_pipeline("sdxl"))
    whole = caption(IMAGES, captioner, quality="best cat", max_new_tokens=60)
    assert all(len(tokenize(model, text)) > 77 for text in whole)
    cut = caption(IMAGES, captioner, quality="best cat", max_new_tokens=60, model=model)
    for long, short in zip(whole, cut, strict=True):
        words = short.removesuffix(", best cat").split()
        assert short.endswith(", best cat")
        assert long.split()[: len(words)] == words
        assert len(tokenize(model, short)) <= 77
        # One word more and it would not fit.
        more = " ".join(long.split()[: len(words) + 1]).removesuffix(",")
        assert len(tokenize(model, f"{more}, best cat")) > 77
    model.encode_prompts(cut)
    short = caption(IMAGES[:1], captioner, quality="cat", max_new_tokens=2)
    assert caption(IMAGES[:1], captioner, quality="cat", max_new_tokens=2, model=model) == short
    with pytest.raises(ValueError, match=r"quality has .* tokens, expected at most 24, start and end tokens included"):
        caption(IMAGES, captioner, model=dsd.load("mini"))


def tokenize(model, text):
    return max((tokenizer(text, verbose=False).input_ids for tokenizer in model.tokenizers), key=len)


def test_arguments_are_checked(folders):
    captioner = load_captioner(folders["blip"])
    assert caption([], captioner) == []
    with pytest.raises(ValueError, match="max_new_tokens is 0, expected at least 1"):
        caption(IMAGES, captioner, max_new_tokens=0)
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        caption(IMAGES, captioner, batch_size=0)
    with pytest.raises(ImageError, match="strings are text"):
        caption(["a.png"], captioner)


def test_captioners_that_are_refused(folders, tmp_path):
    def refused(message, source, **options):
        with pytest.raises(ModelError, match=message):
            load_captioner(source, **options)

    refused("captioner '.*nowhere' is a folder that does not exist", tmp_path / "nowhere")
    refused("captioner 'some/one' is neither a folder nor in the hub cache", "some/one", local_files_only=True)
    refused("revision is 'main', but captioner '.*' is a folder", folders["blip"], revision="main")
    refused("captioner '.*' has no config.json", tmp_path)
    tiny_pipeline("sd15").text_encoder.save_pretrained(tmp_path / "text")
    refused("captioner '.*' cannot be loaded: ", tmp_path / "text")
    model, _ = blip(tmp_path)
    (tmp_path / "pickled").mkdir()
    model.config.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    refused("captioner '.*' has its weights only as pickle .pytorch_model.bin.", tmp_path / "pickled")
    # A model that asks for code that lies beside it.
    model.save_pretrained(tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForImageTextToText": "mine.M"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused("captioner '.*' cannot be loaded: ", tmp_path / "code")
    assert not (tmp_path / "ran").exists()
