"""Preprocessing of pictures, against Pillow, torch's own resizing, transformers' processors and timm's transforms."""

import importlib.util

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

from dsd_fast.engine.preprocessing import Preprocessing, of_processor, of_timm, to_pixels

ROUNDING = 2e-6 if importlib.util.find_spec("torchvision") is None else 3 / 255 / 0.2
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
SIZES = [((30, 20), (30, 13)), ((23, 41), (40, 19)), ((20, 24), (31, 40))]


def noise(height, width, low=0, high=256):
    return np.random.default_rng(0).integers(low, high, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_pixels_are_resampled_as_by_torch_and_by_pillow(before, after):
    image = noise(*before, 64, 192)
    pixels = to_pixels(image[None]).double()
    for resample in ("bilinear", "bicubic", "lanczos"):
        prepare = Preprocessing(after, None, resample, **PLAIN)
        got = prepare(pixels)
        if resample != "lanczos":
            want = F.interpolate((pixels + 1) / 2, after, mode=resample, antialias=True)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        pillow = Image.fromarray(image).resize(after[::-1], Image.Resampling[resample.upper()])
        want = torch.from_numpy(np.array(pillow)).permute(2, 0, 1).double()
        # Pillow rounds after each pass, and the second weighs the first one's half level with Σ|w| < 1.5.
        assert float((got[0] * 255 - want).abs().max()) <= 0.5 * 1.5 + 0.5
        torch.testing.assert_close(prepare.of_images([image])[0].double() * 255, want, rtol=0, atol=1e-4)


def test_pixels_beyond_black_and_white_are_cut_off_with_their_gradient():
    pixels = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64).expand(1, 3, 4, 4).requires_grad_()
    prepare = Preprocessing((4, 9), None, "bicubic", (0.5,) * 3, (0.5,) * 3)
    got = prepare(pixels)
    torch.testing.assert_close(got, prepare(pixels.clamp(-1, 1)))
    got.square().sum().backward()
    assert (pixels.grad[0, 0, 0] != 0).tolist() == [False, True, True, False]
    # A program's autocast changes nothing.
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prepare(pixels.detach().float()).double(), got.detach())


PROCESSORS = [
    ("ViTImageProcessor", {"size": {"height": 24, "width": 20}, "resample": 1}),
    ("ViTImageProcessor", {"do_resize": False, "do_normalize": False}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 25}, "crop_size": {"height": 22, "width": 20}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 30}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    ("MobileViTImageProcessor", {"size": {"shortest_edge": 26}, "crop_size": {"height": 24, "width": 24}}),
    ("DeiTImageProcessor", {"size": {"height": 28, "width": 28}, "crop_size": {"height": 21, "width": 21},
                            "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5, 60.0, 127.5]}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), PROCESSORS)
def test_processors_are_known(kind, options):
    processor = getattr(transformers, kind)(**options)
    prepare = of_processor(processor, "x")
    for size in ((37, 61), (50, 40)):
        image = noise(*size)
        want = torch.as_tensor(
            processor(images=[image], input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        )
        # Float32 of numbers up to 4; or up to three levels by torchvision, which rounds its weights, too.
        torch.testing.assert_close(prepare.of_images([image]), want.float(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("kind", "options", "wrong"),
    [
        ("LevitImageProcessor", {}, "x prepares pictures in a way that is not known: .* differs by [0-9.]+ of 255"),
        ("EfficientNetImageProcessor", {"size": {"height": 32, "width": 32}}, "x prepares pictures in a way"),
        ("DetrImageProcessor", {}, "x resizes to {.*}, expected a height and width, or a shortest_edge"),
        ("ViTImageProcessor", {"resample": 0}, "resample: got 'nearest', expected one of bilinear, bicubic, lanczos"),
        ("MobileViTImageProcessor", {}, r"crop: got \(256, 256\), expected what pictures of 224 have"),
    ],
)
def test_other_processors_are_refused_by_name(kind, options, wrong):
    with pytest.raises(ValueError, match=wrong):
        of_processor(getattr(transformers, kind)(**options), "x")


def test_half_a_pixel_beside_the_cut():
    image = noise(9, 11)
    # Of 3 and of 5 pixels the half is 1.5 and 2.5.
    for nearest_even, top, left in ((False, 1, 2), (True, 2, 2)):
        got = Preprocessing(None, (6, 6), "bicubic", **PLAIN, nearest_even=nearest_even).of_images([image])
        want = torch.from_numpy(image[top : top + 6, left : left + 6]).permute(2, 0, 1)[None] / 255
        torch.testing.assert_close(got, want)


def test_timm_is_known():
    timm = pytest.importorskip("timm")
    for options, known in (
        ({}, True),
        ({"crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bilinear"}, True),
        ({"input_size": (3, 30, 40), "crop_pct": 0.8, "crop_mode": "squash"}, True),
        ({"crop_mode": "border"}, False),
        ({"input_size": (3, 30, 40), "crop_pct": 0.8}, False),
        ({"input_size": (1, 32, 32)}, False),
    ):
        config = timm.data.resolve_data_config({"input_size": (3, 33, 33), **options})
        if not known:
            with pytest.raises(ValueError, match=r"x takes pictures of .* by crop_mode"):
                of_timm(config, "x")
            continue
        prepare, own = of_timm(config, "x"), timm.data.create_transform(**config, is_training=False)
        for size in ((50, 71), (40, 24)):
            image = noise(*size)
            torch.testing.assert_close(prepare.of_images([image]), own(Image.fromarray(image))[None])
