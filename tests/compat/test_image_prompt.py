"""The official script of images as prompts by its own names: against the plain way on a stock pipeline."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dsd_fast as dsd
from dsd_fast.compat import Image2TextEmbedder, InferenceConfig, infer
from dsd_fast.images import ImageError
from dsd_fast.models import ModelError
from dsd_fast.models.mini.scenes import scene
from dsd_fast.reference import image_prompt as reference

FAST = {"num_inference_steps": 2, "guidance_scale": 3.0, "resolution": 64}


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini", local_files_only=True)


@pytest.fixture(scope="module")
def pipe(model):
    made = model.to_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def folder(tmp_path):
    """Images of two names and two formats."""
    made = tmp_path / "images"
    made.mkdir()
    for number, name in enumerate(("a.b.jpg", "a.c.png")):
        Image.fromarray(scene(number).image).resize((96, 70)).save(made / name)
    return made


def config(folder, **changes):
    settings = {"pretrained_path": folder, "input_image": folder, "output_dir": folder.parent / "out"}
    return InferenceConfig(**settings, **FAST, **changes)


def drawn(pipe, states, seed=10, side=64):
    """What the stock pipeline draws, as it is in a JPEG file."""
    (picture,) = pipe(
        prompt_embeds=states[None],
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=2,
        guidance_scale=3.0,
        height=side,
        width=side,
    ).images
    return picture


def close(file, picture):
    # JPEG's quantisation turns a level that tips into a few of its neighbours.
    own = np.asarray(Image.open(file)).astype(float)
    file = file.with_name("right.jpg")
    picture.save(file, "JPEG")
    assert np.abs(own - np.asarray(Image.open(file))).mean() < 0.05


def test_options_are_the_official_ones():
    official = {
        "pretrained_path": "./stable-diffusion-v1-4/",
        "clip_path": "./clip-vit-large-patch14/",
        "input_image": "./example_images/",
        "prompt": "",
        "edit": False,
        "onlyprompt": False,
        "alpha": 0.6,
        "clip_prompt_length": 50,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "output_dir": "./results/",
        "save_prefix": "",
        "resolution": 512,
        "seed": 10,
    }
    found = {each.name: each.default for each in dataclasses.fields(InferenceConfig)}
    assert dict(list(found.items())[: len(official)]) == official
    flags = dict(list(found.items())[len(official) :])
    assert flags.pop("replace_first_patches") is True
    assert set(flags.values()) == {False}


@pytest.mark.parametrize("mode", [{}, {"edit": True, "alpha": 0.3}, {"onlyprompt": True, "edit": True}], ids=str)
def test_pictures_are_those_of_the_plain_way(model, pipe, folder, mode):
    prompt = "a red circle"
    files = infer(config(folder, prompt=prompt, save_prefix="x-", seed=3, **mode), model=model)
    assert [file.relative_to(folder.parent).as_posix() for file in files] == ["out/x-a.b.jpg", "out/x-a.c.jpg"]
    images = [Image.open(folder / name) for name in ("a.b.jpg", "a.c.png")]
    if "onlyprompt" in mode:
        states = pipe.encode_prompt([prompt] * 2, "cpu", 1, False)[0]
    elif mode:
        states = reference.edit(pipe, model.clip, images, prompt, 0.3)
    else:
        states = reference.convert(pipe, model.clip, images)
    for file, row in zip(files, states, strict=True):
        close(file, drawn(pipe, row, 3))


def test_each_defect_has_its_flag(model, folder):
    def run(**flags):
        return infer(dataclasses.replace(config(folder, jpg_alone=True), num_inference_steps=1, **flags), model=model)

    (file,) = run(joined_path=True, save_prefix="-")
    assert file == folder.parent / "out-a.b.jpg"
    torch.manual_seed(0)
    drawn = [run(unused_seed=True, resolution=32)[0].read_bytes() for _ in range(2)]
    torch.manual_seed(0)
    assert run(unused_seed=True, resolution=32)[0].read_bytes() == drawn[0] != drawn[1]
    (file,) = run(resolution=32)
    assert Image.open(file).size == (32, 32)
    assert file.read_bytes() not in drawn
    assert Image.open(run(unused_resolution=True, resolution=32)[0]).size == (64, 64)
    # Both images are "a" there.
    settings = config(folder, name_to_first_dot=True)
    assert [file.name for file in settings.outputs(settings.inputs())] == ["a.jpg"] * 2


def save_checkpoint(clip, folder, prompts=None):
    """CLIP's image encoder as SD-IPC's code saves it, its parameters behind the module's name."""
    folder.mkdir()
    tensors = {f"vision_model.{name}": value.contiguous() for name, value in clip.vision_model.state_dict().items()}
    if prompts is not None:
        tensors |= {f"vision_model.encoder.{name}": value for name, value in prompts.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = clip.config.vision_config.to_dict()
    told |= {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithPrompt"]}
    (folder / "config.json").write_text(json.dumps(told))


def test_a_released_checkpoint(model, pipe, folder):
    torch.manual_seed(0)
    tuned = {official: reference.DeepPrompts(model.clip, 3, official=official).eval() for official in (True, False)}
    tuned[False].load_state_dict(tuned[True].state_dict())
    save_checkpoint(model.clip, folder / "clip", tuned[True])
    settings, image = config(folder, jpg_alone=True, clip_prompt_length=3), Image.open(folder / "a.b.jpg")
    for official, vision in tuned.items():
        (file,) = infer(dataclasses.replace(settings, replace_first_patches=official), model=model)
        states = reference.convert(pipe, model.clip, [image], vision=vision)
        close(file, drawn(pipe, states[0]))
    both = [reference.convert(pipe, model.clip, [image], vision=vision) for vision in (*tuned.values(), None)]
    assert min((both[0] - both[1]).abs().max(), (both[0] - both[2]).abs().max()) > 0.1
    (file,) = infer(dataclasses.replace(settings, clip_prompt_length=0), model=model)
    close(file, drawn(pipe, both[2][0]))
    with pytest.raises(ValueError, match="clip_prompt_length: got 50, expected 3"):
        infer(dataclasses.replace(settings, clip_prompt_length=50), model=model)
    (folder / "clip" / "model.safetensors").rename(folder / "clip" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only as pickle"):
        infer(settings, model=model)


def test_what_is_refused(model, folder, tmp_path):
    with pytest.raises(ValueError, match="alpha: got 'x', expected a number"):
        InferenceConfig(alpha="x")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"input_image: .* has no \.jpg"):
        infer(config(tmp_path / "none"), model=model)
    (folder / "a.b.png").write_bytes((folder / "a.c.png").read_bytes())
    with pytest.raises(ValueError, match=r"several images of the name 'a\.b'"):
        infer(config(folder), model=model)
    (folder / "a.b.png").unlink()
    (folder / "d.jpg").write_bytes(b"none")
    with pytest.raises(ImageError):
        infer(config(folder), model=model)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("edit", [True, False])
def test_the_class_that_others_wrote(model, pipe, folder, edit):
    embedder = Image2TextEmbedder(model.clip, "cpu", alpha=0.3, edit=edit)
    prompts, file = ["a red circle", "a small blue ring left of a green square"], folder / "a.b.jpg"
    inputs = pipe.tokenizer(prompts, padding="max_length", max_length=24, return_tensors="pt")
    texts = pipe.text_encoder(inputs.input_ids)[0].detach()
    found = embedder(str(file), texts, inputs.attention_mask)
    for row, prompt in enumerate(prompts):
        alone = embedder(Image.open(file), texts[row : row + 1], inputs.attention_mask[row : row + 1])
        options = {"alpha": 0.3} if edit else {}
        call = reference.edit if edit else reference.convert
        right = call(pipe, model.clip, [Image.open(file)], prompt if edit else "", **options)[0]
        torch.testing.assert_close(alone, right, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[row], right, rtol=0, atol=1e-5)
    assert Image2TextEmbedder(model.clip, onlyprompt=True)(file, texts, inputs.attention_mask) is not found
    with pytest.raises(ValueError, match=r"text_masks: got \(1, 24\), expected \(2, 24\)"):
        embedder(file, texts, inputs.attention_mask[:1])
    with pytest.raises(ValueError, match=r"text_embeddings: got \(2, 24, 5\)"):
        embedder(file, texts[..., :5], inputs.attention_mask)
