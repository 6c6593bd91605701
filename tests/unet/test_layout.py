"""Channels-last from the latents to the output: no image is copied into another layout on the way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dsd_fast as dsd
from dsd_fast.unet import UNetProgram
from dsd_fast.unet.blocks import _nearest
from tests.tiny import CROSS_ATTENTION_DIM, FAMILIES, POOLED_DIM, tiny_pipeline, tiny_unet

VIEWS = {"view", "permute", "transpose", "expand", "_unsafe_view", "t", "unsqueeze", "select", "slice", "detach"}
# Rows are picked from images seen as (P, h, w, C).
CHANNELS_AT_THE_END = {"index_select"}
COPIES = {"clone", "copy_", "_to_copy", "contiguous"}


class Images(TorchDispatchMode):
    """What computes an image that is not channels-last, and what copies one."""

    def __init__(self):
        super().__init__()
        self.seen, self.wrong = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        for value in out if isinstance(out, tuple) else (out,):
            # An attention's (rows, heads, positions, width) is no image.
            if not isinstance(value, torch.Tensor) or value.ndim != 4 or name in VIEWS or "attention" in name:
                continue
            self.seen += 1
            layout = torch.contiguous_format if name in CHANNELS_AT_THE_END else torch.channels_last
            if name in COPIES or not value.is_contiguous(memory_format=layout):
                self.wrong.append((name, tuple(value.shape), value.stride()))
        return out


def run(family, unet, latents, size=(16, 16)):
    program = UNetProgram(unet)
    plan = program.plan(noise_pred=True, scores=program.score_ids[::4], features=["mid-vit-out", "unet-after-conv-in"])
    pooled = torch.ones(3, POOLED_DIM) if family == "sdxl" else None
    text = plan.encode_text(torch.ones(3, 11, CROSS_ATTENTION_DIM[family]), pooled=pooled)
    ids = torch.ones(6) if family == "sdxl" else None
    with Images() as images:
        out = plan.run(latents, 500, text, latent_index=[0, 0, 1, 1], text_index=[0, 1, 2, 0], time_ids=ids)
    return images, out


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(16, 16), (13, 11)], ids=str)
@pytest.mark.parametrize("weights", [channels_last, lambda unet: unet], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_copies_no_image_into_another_layout(family, weights, size):
    unet = weights(tiny_unet(family).requires_grad_(False))
    images, out = run(family, unet, channels_last(torch.ones(2, 4, *size)))
    assert images.seen > 100
    assert images.wrong == []
    for value in (out.noise_pred, *out.features.values()):
        assert value.is_contiguous(memory_format=torch.channels_last)


def test_latents_of_another_layout_are_copied_once():
    unet = tiny_unet("sd15").requires_grad_(False)
    images, _ = run("sd15", unet, torch.ones(2, 4, 16, 16))
    assert [name for name, *_ in images.wrong] == ["clone"]


@pytest.mark.parametrize("rows", [1, 65])
@pytest.mark.parametrize("size", [(8, 8), (8, 10), (7, 9), (5, 10)], ids=str)
def test_images_grow_as_in_torch(size, rows):
    x = channels_last(torch.randn(rows, 3, 4, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    want = torch.nn.functional.interpolate(x, size=size, mode="nearest")
    got = _nearest(x, size)
    assert torch.equal(got, want)
    assert got.is_contiguous(memory_format=torch.channels_last)
    weight = torch.arange(want.numel()).view(want.shape).float()
    a, b = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want))
    torch.testing.assert_close(a, b)


def test_a_loaded_network_is_channels_last_and_a_pipelines_stays_as_it_is():
    unet = dsd.load("mini").unet
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in unet.parameters() if p.ndim == 4)
    pipe = tiny_pipeline("sd15")
    before = {name: (p.data_ptr(), p.stride()) for name, p in pipe.unet.named_parameters()}
    model = dsd.from_pipeline(pipe)
    run("sd15", model.unet, torch.ones(2, 4, 16, 16))
    assert {name: (p.data_ptr(), p.stride()) for name, p in pipe.unet.named_parameters()} == before
    assert any(not p.is_contiguous(memory_format=torch.channels_last) for p in pipe.unet.parameters() if p.ndim == 4)
