"""Early exit at real size: extraction up to each up block, beside the time a full forward needs to get there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsd_fast.bench.case import Context, Side, Target, Work
from dsd_fast.bench.suites.shared import PREDICTION_TOLERANCE, relative
from dsd_fast.bench.suites.unet_networks import ARCHITECTURES, TIMESTEP, TOKENS, Architecture, random_unet
from dsd_fast.unet import Plan, UNetProgram

SIDE = 32
"""Of the latents on a CPU, where 64 would take minutes a case."""

LEVELS: Mapping[str, str] = {
    "up0": "up-level0-upsampler-out",
    "up1": "up-level1-upsampler-out",
    "up2": "up-level2-upsampler-out",
    "up3": "up-level3-repeat2-vit-out",
}
"""Block → the id of what it gives."""

WITHIN = 0.05
"""How much longer than the full forward to the same place the extraction may take."""


class _ReachedError(Exception):
    """Ends a forward pass where a hook raises it."""


class Exits:
    """A network with random weights and one row of inputs.

    Args:
        architecture: its.
        device: that it is on.
        side: of the latents.
    """

    def __init__(self, architecture: Architecture, device: str, side: int = SIDE) -> None:
        self.side, self.unet = side, random_unet(architecture, device)
        # The layout of a loaded model, for both sides.
        self.unet.to(memory_format=torch.channels_last)
        self.program = UNetProgram(self.unet)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, self.unet.config.in_channels, side, side, generator=generator).to(device)
        self.latents = latents.contiguous(memory_format=torch.channels_last)
        width = architecture.config["cross_attention_dim"]
        self.states = torch.randn(1, TOKENS, width, generator=generator).to(device)

    @torch.no_grad()
    def stock(self, block: str) -> Tensor:
        """A forward pass of diffusers, ended where the block's last module has its result."""
        last = last_module(self.unet, _level(block))
        return _until(last, lambda: self.unet(self.latents, TIMESTEP, self.states))

    @torch.no_grad()
    def whole(self, plan: Plan, block: str) -> Tensor:
        """A run of a plan of the whole network, ended where the block's last layer with weights has its result.

        The result is that layer's, without the transformer's residual that "up3" ends with.
        """
        text = plan.encode_text(self.states)
        return _until(_last_layer(self.unet, block), lambda: plan.run(self.latents, TIMESTEP, text))

    @torch.no_grad()
    def extracted(self, plan: Plan, block: str) -> Tensor:
        """A run of a plan that ends with the block."""
        return plan.run(self.latents, TIMESTEP, plan.encode_text(self.states)).features[LEVELS[block]]


def work(block: str, context: Context) -> Work:
    """SD 1.5 in float32 up to one of its up blocks: diffusers' and our full forward, broken off there, and the cut."""
    exits = context.shared("sd15 for exits", lambda: Exits(ARCHITECTURES["sd15"], context.device))
    gc.collect()
    return work_of(exits, block)


def work_of(exits: Exits, block: str) -> Work:
    """See :func:`work`."""
    program = exits.program
    full, cut = program.plan(noise_pred=True), program.plan(features=[LEVELS[block]])
    right = exits.stock(block)
    sizes = {"rows": 1, "side": exits.side}
    flops = cut.flops(latents=1, texts=1, rows=1, height=exits.side, width=exits.side, tokens=TOKENS)
    names = ("diffusers' full forward, until there", "our full forward, until there")

    def broken_off() -> Tensor:
        result = exits.whole(full, block)
        # At the last block the residual is not added yet: there is nothing to compare.
        return result if exits.unet.up_blocks[_level(block)].upsamplers else right

    target = [Target("ratio", 1 / (1 + WITHIN))]
    return Work(
        sides=[
            Side(names[0], lambda: exits.stock(block), 1, sizes, flops=flops, against={}),
            Side(names[1], broken_off, 1, sizes, flops=flops, against={}),
            Side(
                "extraction",
                lambda: exits.extracted(cut, block),
                1,
                sizes,
                flops=flops,
                against={names[0]: target, names[1]: target},
            ),
        ],
        difference=relative,
        tolerance=PREDICTION_TOLERANCE,
        accuracy="largest relative difference of the feature",
        oracle=lambda: right,
        oracle_name="diffusers",
        item="row",
        items=1,
    )


def _until(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a module gives; the forward pass ends there."""
    result: list[Tensor] = []

    def reached(_: nn.Module, __: Any, output: Any) -> None:
        result.append(output[0] if isinstance(output, tuple) else output)
        raise _ReachedError

    handle = module.register_forward_hook(reached)
    try:
        run()
    except _ReachedError:
        return result[0]
    finally:
        handle.remove()
    raise AssertionError(f"a forward pass went by {type(module).__name__}")


def _level(block: str) -> int:
    return int(block.removeprefix("up"))


def last_module(unet: Any, level: int) -> nn.Module:
    """Finds what gives the value of the up block of that level in diffusers."""
    stage = unet.up_blocks[level]
    module: nn.Module = stage.upsamplers[0] if stage.upsamplers else stage.attentions[-1]
    return module


def _last_layer(unet: Any, block: str) -> nn.Module:
    """The layer with weights that is the last that the block runs."""
    stage = unet.up_blocks[_level(block)]
    layer: nn.Module = stage.upsamplers[0].conv if stage.upsamplers else stage.attentions[-1].proj_out
    return layer
