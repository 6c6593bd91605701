"""The convolutional blocks of a UNet2DConditionModel as steps.

The arithmetic is that of diffusers' ResnetBlock2D, Downsample2D and Upsample2D, cut at the layer ids of the code of
Meng et al., "Not All Diffusion Model Activations Have Been Evaluated as Discriminative Features" (arXiv 2410.03558).
Modules are looked up at call time, never captured: adapters replace them in place. They are looked up among a parent's
``_modules``, where its attributes end up after all else has been tried.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.unet.flops import base_layer, conv_flops
from dsd_fast.unet.step import NOTHING, Size, State, Step, Taken, Want, area


def input_steps(unet: Any) -> list[Step]:
    """``unet-in`` and ``unet-after-conv-in``."""
    channels, width = unet.config.in_channels, unet.config.block_out_channels[0]

    def take(state: State, want: Want) -> Taken:
        if unet.config.center_input_sample:
            state.live["x"] = 2 * state.live["x"] - 1.0
        return Taken(state.live["x"])

    def conv_in(state: State, want: Want) -> Taken:
        x = state.live["x"] = state.layers.convolved(state.live["x"], unet.conv_in)
        state.push(x)
        return Taken(x)

    return [
        Step(
            "unet-in",
            0,
            take,
            flops=lambda s, t: 0,
            elements=lambda s, t: channels * area(s),
            shape=lambda s, t: (channels, *s),
            region="unet-in",
        ),
        Step(
            "unet-after-conv-in",
            0,
            conv_in,
            flops=lambda s, t: conv_flops(unet.conv_in, s),
            elements=lambda s, t: (channels + width) * area(s),
            shape=lambda s, t: (width, *s),
            region="unet-in",
            pushes=width,
        ),
    ]


def output_step(unet: Any) -> Step:
    """``unet-out``: the model's output, noise or v as the model was trained."""
    width, channels = unet.config.block_out_channels[0], unet.config.out_channels

    def run(state: State, want: Want) -> Taken:
        x = state.live["x"]
        if unet.conv_norm_out is not None:
            x = state.layers.norm_activate(x, unet.conv_norm_out, unet.conv_act)
        return Taken(state.layers.convolved(x, unet.conv_out))

    return Step(
        "unet-out",
        0,
        run,
        flops=lambda s, t: conv_flops(unet.conv_out, s),
        elements=lambda s, t: (3 * width + channels) * area(s),
        shape=lambda s, t: (channels, *s),
        region="unet-out",
    )


def resnet_steps(block: Any, prefix: str, level: int, *, time_reads_text: bool, pops: bool, push: bool) -> list[Step]:
    """A ResnetBlock2D: its first convolution, its residual branch, the sum."""
    wide, narrow = block.in_channels, block.out_channels
    own: dict[str, Any] = block._modules

    def conv1(state: State, want: Want) -> Taken:
        if pops:
            state.live["x"] = torch.cat([state.live["x"], state.pop()], dim=1)
        h = state.layers.norm_activate(state.live["x"], own["norm1"], own["nonlinearity"])
        state.live["h"] = state.layers.convolved(h, own["conv1"])
        return NOTHING

    def increment(state: State, want: Want) -> Taken:
        shift = state.project_time(own["time_emb_proj"], own["nonlinearity"])
        h = state.layers.norm_activate(state.live["h"], own["norm2"], own["nonlinearity"], shift)
        h = state.live["h"] = state.layers.convolved(state.layers.dropped(h, own["dropout"]), own["conv2"])
        return Taken(h)

    def out(state: State, want: Want) -> Taken:
        x = state.live["x"]
        shortcut = own.get("conv_shortcut")
        if shortcut is not None:
            x = state.layers.convolved(x, shortcut)
        x = x + state.live.pop("h")
        if block.output_scale_factor != 1.0:
            x = x / block.output_scale_factor
        state.live["x"] = x
        if push:
            state.push(x)
        return Taken(x)

    return [
        Step(
            f"{prefix}-conv1",
            level,
            conv1,
            flops=lambda s, t: conv_flops(block.conv1, s),
            elements=lambda s, t: (4 * wide + narrow) * area(s),
            region=prefix,
            pops=pops,
        ),
        Step(
            f"{prefix}-increment",
            level,
            increment,
            flops=lambda s, t: conv_flops(block.conv2, s),
            elements=lambda s, t: (wide + 4 * narrow) * area(s),
            shape=lambda s, t: (narrow, *s),
            region=prefix,
            reads_text=time_reads_text,
        ),
        Step(
            f"{prefix}-out",
            level,
            out,
            flops=lambda s, t: 0 if block.conv_shortcut is None else conv_flops(block.conv_shortcut, s),
            elements=lambda s, t: (wide + 3 * narrow) * area(s),
            shape=lambda s, t: (narrow, *s),
            region=prefix,
            pushes=narrow if push else 0,
        ),
    ]


def downsample_step(module: Any, name: str, level: int) -> Step:
    """A Downsample2D that writes ``level``."""
    channels = module.out_channels

    def run(state: State, want: Want) -> Taken:
        x = state.live["x"] = module(state.live["x"])
        state.push(x)
        return Taken(x)

    return Step(
        name,
        level,
        run,
        flops=lambda s, t: conv_flops(module.conv, s),
        elements=lambda s, t: (4 * module.channels + channels) * area(s),
        shape=lambda s, t: (channels, *s),
        region=name,
        pushes=channels,
    )


def downsampled(module: Any, size: Size) -> Size:
    """The image size a Downsample2D makes of ``size``; its padding 0 means one row and column on the far side."""
    conv = base_layer(module.conv)
    padding = 2 * module.padding if module.padding else 1
    height, width = ((n + padding - conv.kernel_size[0]) // conv.stride[0] + 1 for n in size)
    return height, width


def upsample_step(module: Any, name: str, level: int) -> Step:
    """An Upsample2D that writes ``level``, at the size of that level's skip connections (odd sizes too)."""
    channels = module.out_channels

    def run(state: State, want: Want) -> Taken:
        x = state.live["x"] = state.layers.convolved(_nearest(state.live["x"], state.sizes[level]), module.conv)
        return Taken(x)

    return Step(
        name,
        level,
        run,
        flops=lambda s, t: conv_flops(module.conv, s),
        elements=lambda s, t: (3 * channels) * area(s),
        shape=lambda s, t: (channels, *s),
        region=name,
    )


def _nearest(x: Tensor, size: Size) -> Tensor:
    """The image at about twice its size, channels-last as it is: diffusers' module changes that from 64 rows on."""
    rows, channels, height, width = x.shape
    if size != (2 * height, 2 * width):
        return F.interpolate(x, size=size, mode="nearest")
    wide = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(rows, height, 2, width, 2, channels)
    return wide.reshape(rows, *size, channels).permute(0, 3, 1, 2)


def entering_step(entered: Step) -> Step:
    """Puts a kept activation, one row per requested row, where ``entered`` would have left its own."""

    def run(state: State, want: Want) -> Taken:
        assert state.kept is not None
        state.live, state.expanded = {"x": state.kept}, True
        return NOTHING

    return Step(
        "kept",
        entered.level,
        run,
        flops=lambda s, t: 0,
        elements=lambda s, t: 0,
        shape=entered.shape,
        region="kept",
        bare=True,
    )


def mid_residual_step(level: int) -> Step:
    """Adds a ControlNet's middle residual; nothing without one."""

    def run(state: State, want: Want) -> Taken:
        if state.residuals is not None:
            state.expand()
            state.live["x"] = state.live["x"] + state.residuals[1]
        return NOTHING

    name = "mid-residual"
    return Step(name, level, run, flops=lambda s, t: 0, elements=lambda s, t: 0, region=name, bare=True)
