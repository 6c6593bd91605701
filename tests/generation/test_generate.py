"""Pictures of rows in their order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler, generate, to_uint8
from dsd_fast.generation.units import try_seed
from dsd_fast.images import ImageError
from tests.tiny import tiny_pipeline

CONFIG = GenerateConfig(steps=2, guidance=3.0, scheduler="ddim")


@pytest.fixture(scope="module")
def model():
    return dsd.from_pipeline(tiny_pipeline("sd15"))


def alone(model, row, config=CONFIG):
    sampler = Sampler(model, config)
    return to_uint8(sampler.pixels([sampler.resolve(row)]))[0].numpy().astype(int)


def test_pictures_come_in_the_rows_order_whatever_goes_together(model):
    rows = [
        GenerateRow(f"dog {number}", number, size=(48, 48) if number % 3 else None, steps=1 + number % 2)
        for number in range(7)
    ]
    pictures = list(generate(model, rows, CONFIG))
    assert [each.size for each in pictures] == [(48, 48) if number % 3 else (64, 64) for number in range(7)]
    for number in (0, 4):
        # A level may be rounded to either side.
        assert np.abs(np.asarray(pictures[number]).astype(int) - alone(model, rows[number])).max() <= 1


def test_prompts_and_seeds(model):
    pictures = list(generate(model, ["a dog", "a dog"], CONFIG, seeds=[3, 2**64 - 1]))
    for picture, seed in zip(pictures, (3, 2**64 - 1), strict=True):
        assert np.abs(np.asarray(picture).astype(int) - alone(model, GenerateRow("a dog", seed))).max() <= 1
    assert list(generate(model, [], CONFIG)) == []


def test_a_stream_of_rows_is_taken_as_pictures_are_asked_for(model, monkeypatch):
    monkeypatch.setattr(Sampler, "rows_at_once", lambda self, row: 2)
    asked, canvas = [], Image.new("RGB", (64, 64))

    def rows():
        for number in range(100):
            asked.append(number)
            # One buffer for all of them.
            canvas.paste((number * 50 % 256, 0, 0), (0, 0, 64, 64))
            yield GenerateRow("a dog", 1, image=canvas, strength=0.5)

    pictures = generate(model, rows(), CONFIG)
    first, second = next(pictures), next(pictures)
    assert len(asked) < 20
    assert not np.array_equal(np.asarray(first), np.asarray(second))


def test_what_cannot_be_used_is_told_when_it_is_reached(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "rows_at_once", lambda self, row: 1)
    (tmp_path / "x.png").write_bytes(b"nothing")
    rows = [GenerateRow("a dog"), *[GenerateRow("cat", 1 + number) for number in range(8)]]
    pictures = generate(model, [*rows, GenerateRow("dog", image=tmp_path / "x.png")], CONFIG)
    assert next(pictures).size == (64, 64)
    with pytest.raises(ImageError, match=r"x\.png"):
        list(pictures)
    with pytest.raises(ValueError, match="prompt: the prompt has"):
        list(generate(model, ["dog " * 99], CONFIG))


def test_judges_have_their_say(model):
    rows = [GenerateRow("a dog", 1, label="dog", cls=0), GenerateRow("a cat", 2, label="cat", cls=1)]
    seen = []

    def accept(images, rows):
        seen.extend((row.label, row.seed) for row in rows)
        # The second try of each.
        return [(row.label, row.seed) in seconds for row in rows]

    seconds = {(row.label, try_seed(row.seed, row.label, 0, 1)) for row in rows}
    pictures = list(generate(model, rows, CONFIG, accept=accept, per_class=1, max_tries=3))
    assert len(pictures) == 2
    assert len(seen) == 4
    for picture, row in zip(pictures, rows, strict=True):
        again = alone(model, replace(row, seed=try_seed(row.seed, row.label, 0, 1)))
        assert np.abs(np.asarray(picture).astype(int) - again).max() <= 1
    assert list(generate(model, rows, CONFIG, accept=lambda images, rows: [False] * len(rows), max_tries=2)) == []


def test_learned_tokens_are_known_to_this_call_alone(model):
    vectors = torch.randn(24, generator=torch.Generator().manual_seed(0))
    (plain,), (learned,) = (
        list(generate(model, "a <bird>", CONFIG, tokens=tokens)) for tokens in (None, {"<bird>": vectors})
    )
    assert not np.array_equal(np.asarray(plain), np.asarray(learned))
    expected = alone(model.with_tokens({"<bird>": vectors}), GenerateRow("a <bird>"))
    assert np.abs(np.asarray(learned).astype(int) - expected).max() <= 1


def test_what_is_about_a_folder_needs_one(model, tmp_path):
    with pytest.raises(ValueError, match="layout: got 'folder' without out"):
        generate(model, "a dog", CONFIG, layout="folder")
    with pytest.raises(ValueError, match="resume: got False without out"):
        generate(model, "a dog", CONFIG, resume=False)
    done = generate(model, ["a dog", "a cat"], CONFIG, out=tmp_path / "x", layout="folder", resume=False)
    assert done.counts.ok == 2
    assert generate(model, ["a dog", "a cat"], CONFIG, out=tmp_path / "x", layout="folder").counts.done == 2
    with pytest.raises(ValueError, match="is not empty, expected a new folder where resume is False"):
        generate(model, ["a dog", "a cat"], CONFIG, out=tmp_path / "x", layout="folder", resume=False)
