"""Images as prompts of rows: each its own image, known by its content, and found again."""

import json

import numpy as np
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.engine import ImagePrompt
from dsd_fast.generation import AcceptClip, GenerateConfig, GenerateRow, Sampler, generate
from dsd_fast.generation.again import again, config_of
from dsd_fast.generation.reading import rows_of
from dsd_fast.generation.rows import columns, from_columns, identified, row_id_of
from dsd_fast.jobs import read_index
from tests.engine.test_image_prompts import image_prompts, model
from tests.generation.test_sampler import assert_close

CONFIG = GenerateConfig(steps=2, guidance=4.0, scheduler="ddim", image_size=(32, 32), noise="diffusers")


@pytest.mark.parametrize(("family", "alpha"), [("sd15", 0.0), ("sd15", 0.6), ("sdxl", 0.0)])
def test_rows_of_one_batch_have_images_of_their_own_as_stock_pipelines_have(family, alpha):
    """Beside rows of texts, one of them guided by an image, and under clip_skip, which only the texts have."""
    of = model(family)
    prompts = image_prompts(of, alpha=alpha)
    made = Sampler(of, GenerateConfig(**vars(CONFIG) | {"clip_skip": 0}))
    rows = [
        GenerateRow(prompts[0], 5),
        GenerateRow(prompts[1], 6, negative_prompt=prompts[2]),
        GenerateRow(prompts[2], 7, guidance=1.0),
        GenerateRow("a dog", 8, negative_prompt=prompts[0]),
    ]
    resolved = [made.resolve(row) for row in rows]
    assert [row.clip_skip for row in resolved] == [None, None, None, 0]
    assert [made.resolve(row) for row in resolved] == resolved
    assert len({made.group(row) for row in resolved}) == 1
    got = made.latents(resolved)
    pipe = of.to_pipeline()
    pipe.scheduler = made.model.new_scheduler()
    pipe.set_progress_bar_config(disable=True)
    for number, row in enumerate(rows):
        given = {}
        for name, prompt in (("", row.prompt), ("negative_", row.negative_prompt)):
            if isinstance(prompt, ImagePrompt):
                given[f"{name}prompt_embeds"] = prompt.embeds
                if prompt.pooled is not None:
                    given[f"{name}pooled_prompt_embeds"] = prompt.pooled
            elif prompt is not None or family == "sdxl":
                given[f"{name}prompt"] = prompt
        if family == "sdxl" and number in (0, 2):
            absent = of.encode_unconditional()
            given |= {"negative_prompt_embeds": absent.states, "negative_pooled_prompt_embeds": absent.pooled}
        if family == "sdxl" and number == 3:
            dog = of.encode_prompts(["a dog"])
            given |= {"prompt": None, "prompt_embeds": dog.states, "pooled_prompt_embeds": dog.pooled}
        expected = pipe(
            **given, height=32, width=32, num_inference_steps=2, guidance_scale=row.guidance or 4.0,
            generator=torch.Generator().manual_seed(row.seed), output_type="latent",
        ).images  # fmt: skip
        assert_close(got[number : number + 1], expected.detach())


def test_rows_of_images_as_prompts():
    prompts = image_prompts(model("sd15"))
    rows = list(rows_of(prompts, [3, 4, 5]))
    assert rows == [GenerateRow(prompts[n], 3 + n, name=f"image {n}") for n in range(3)]
    assert [row.seed for row in rows_of(prompts, 7)] == [7, 7, 7]
    assert [row.seed for row in rows_of(prompts[1], range(4))] == [0, 1, 2, 3]
    mixed = list(rows_of(["a dog", prompts[0], {"prompt": prompts[1], "negative_prompt": prompts[2], "name": "own"}]))
    assert [row.name for row in mixed] == ["", "image 0", "own"]
    assert mixed[2].negative_prompt == prompts[2]
    for wrong, message in (
        ((prompts, [1, 2]), "seeds: got 2 for 3 prompts"),
        (
            ({"prompt": prompts},),
            r"prompts\[0\], column 'prompt': got ImagePrompt\(3: .*\), expected a text",
        ),
        (([GenerateRow("a"), 3],), r"prompts\[1\]: got 3, expected a text, an image as a prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            list(rows_of(*wrong))


def test_a_row_is_known_by_the_content_of_its_prompt():
    prompts = image_prompts(model("sd15"))
    first = GenerateRow(prompts[0])
    same = GenerateRow(image_prompts(model("sd15"), names=("x", "y", "z"))[0])
    assert identified(first)[0] == row_id_of(same)
    others = (
        GenerateRow(prompts[2]),
        GenerateRow("image 0"),
        GenerateRow("", negative_prompt=prompts[0]),
        GenerateRow(image_prompts(model("sd15"), alpha=0.5)[0]),
        GenerateRow(image_prompts(model("sd15"), texts=["a dog"])[0]),
    )
    assert len({row_id_of(row) for row in (first, *others)}) == 6


def test_the_index_says_where_a_prompt_is(tmp_path):
    prompts = image_prompts(model("sd15"))
    prompts.save(tmp_path / "given" / "p.safetensors")
    loaded = ImagePrompt.load(tmp_path / "given" / "p.safetensors")
    row = GenerateRow(loaded[2], 3, negative_prompt=loaded[0], name="n")
    said = columns(row, tmp_path / "out")
    assert (said["prompt"], said["negative_prompt"]) == ("image 2", "image 0")
    assert json.loads(said["image_prompt"]) == [str(tmp_path / "given" / "p.safetensors"), 2]
    assert from_columns({**said, "name": "n"}, tmp_path / "out") == row
    assert from_columns(said, tmp_path / "out").prompt.sources == loaded[2].sources
    prompts[:2].save(tmp_path / "given" / "p.safetensors")
    with pytest.raises(ValueError, match=r"prompt: .*p.safetensors has 2 image prompts, expected more than 2"):
        from_columns(said, tmp_path / "out")
    with pytest.raises(ValueError, match="negative_prompt: it was given as an object and not from a file"):
        from_columns(columns(GenerateRow("a dog", negative_prompt=prompts[0])))
    assert columns(GenerateRow("a dog"))["image_prompt"] is None


def test_a_folder_of_them_is_made_again(tmp_path, monkeypatch):
    of = dsd.load("mini")
    monkeypatch.chdir(tmp_path)
    image_prompts(of, texts=[""]).save("p.safetensors")
    loaded = ImagePrompt.load("p.safetensors")
    config = GenerateConfig(steps=1, guidance=2.0)
    wrong = [{"prompt": loaded[0], "clip_skip": 1}, {"prompt": image_prompts(model("sd15"))[0], "name": "wide"}]
    made = generate(of, [*loaded, *wrong], config, out="out", seeds=4)
    assert (made.counts.ok, made.counts.errors) == (3, 2)
    rows = read_index("out").to_pylist()
    assert [row["name"] for row in rows] == ["image 0", "image 1", "image 2", "image 0", "wide"]
    assert json.loads(rows[1]["image_prompt"]) == ["../p.safetensors", 1]
    assert rows[3]["message"].startswith("clip_skip: got 1 of an image as a prompt")
    assert rows[4]["message"].startswith("prompt: an image prompt of another model: got 77 states of 24 numbers")
    sampler = Sampler(of, config_of("out"))
    (found,) = again(sampler, "out", [rows[1]["id"]])
    assert found.same
    pictures = [np.asarray(picture) for picture in generate(of, loaded, config, seeds=4)]
    assert np.abs(pictures[1].astype(int) - found.kept).max() <= 1
    # Nothing is made twice, and another vector is another image.
    assert generate(of, loaded, config, out="out", seeds=4).counts.done == 3
    image_prompts(of, texts=[""], seed=1).save("p.safetensors")
    with pytest.raises(ValueError, match="is not what its columns say"):
        next(again(sampler, "out", [rows[1]["id"]]))
    with pytest.raises(ValueError, match=r"prompt: got ImagePrompt.*, expected a text, with which CLIP"):
        AcceptClip(of, 0.1).check(GenerateRow(loaded[0]))
