"""CLIP's preprocessing, against transformers' own."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor

import dsd_fast as dsd
from dsd_fast.engine.clip import ClipSpace
from dsd_fast.images import to_tensor

# 8-bit levels. Pillow rounds after each of its two passes, and the second one weighs the first one's half level with
# Σ|w| < 1.3, the sum of a bicubic kernel's absolute weights; torch rounds nowhere.
LEVELS = 0.5 * 1.3 + 0.5


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


def picture(height, width):
    coarse = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(64, 64), (97, 64), (64, 113), (200, 131)], ids=str)
def test_the_crop_is_that_of_transformers(model, size):
    image = picture(*size)
    want = AutoImageProcessor.from_pretrained(model.clip.name_or_path)(images=image, return_tensors="pt")
    space = ClipSpace(model, resize="crop")
    got = space.vision.preprocessing(to_tensor(image, size)[None])
    difference = (got - want["pixel_values"]).abs().amax((0, 2, 3)) * torch.tensor(space.vision.preprocessing.std) * 255
    assert float(difference.max()) <= LEVELS


def test_the_whole_picture_is_squeezed(model):
    pixels = to_tensor(picture(96, 64), (96, 64))[None]
    got = ClipSpace(model).vision.preprocessing(pixels)
    squeezed = F.interpolate((pixels + 1) / 2, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(got, (squeezed - 0.5) / 0.5)
    assert not torch.equal(got, ClipSpace(model, resize="crop").vision.preprocessing(pixels))


def test_another_resize_is_refused(model):
    with pytest.raises(ValueError, match="resize: got 'pad', expected 'whole' or 'crop'"):
        ClipSpace(model, resize="pad")


@torch.no_grad()
def test_long_lists_of_texts_go_in_parts(model):
    texts, sent = [f"a {word} {number}" for number in range(90) for word in ("red", "cross", "ring")], []
    hook = model.clip.text_model.register_forward_pre_hook(lambda module, args: sent.append(len(args[0])))
    space = ClipSpace(model)
    together = space.of_texts(texts)
    assert sent == [256, 14]
    torch.testing.assert_close(together[250:260], space.of_texts(texts[250:260]))
    hook.remove()
