"""Activations of a stock UNet by the official layer ids: forward hooks, and attention with its maps written out.

    id    := "unet-in" | "unet-after-conv-in" | "unet-out"
           | "down-level{L}-repeat{R}-" unit | "down-level{L}-downsampler-out"
           | "mid-repeat{R}-res-" res | "mid-vit-" vit
           | "up-level{L}-repeat{R}-" unit | "up-level{L}-upsampler-out"
    unit  := "res-" res | "vit-" vit
    res   := "increment" | "out"
    vit   := "out" | "block{K}-" ("out" | "self-q" | "self-k" | "self-v" | "self-map" | "cross-q" | "cross-map"
           | "ffn-inner")

L, R and K count from 0 in the order of execution; of the middle's transformers the first alone has ids.

Letters: B rows, H heads, L positions, K keys of an attention layer (T text tokens, or L), C channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dsd_fast.reference.recording import MapProcessor, picture, recording

KINDS = ("down_cross", "down_self", "mid_cross", "mid_self", "up_cross", "up_self")


@dataclass
class Tapped:
    """What the last call of the UNet left behind.

    Attributes:
        features: by id (B, C, h, w) as they come, (B, L, C) from inside a transformer; maps (B, H, L, K).
        attention: by kind, such as "up_cross", the maps averaged over heads, (B, L, K), in the order of execution.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, list[Tensor]] = field(default_factory=dict)

    def clear(self) -> None:
        self.features.clear()
        self.attention.clear()


def layer_ids(unet: UNet2DConditionModel) -> list[str]:
    """All ids of a network."""
    return list(_places(unet)) + [f"{name}-map" for name in _attentions(unet) if not name.startswith("mid-unnamed")]


@contextmanager
def tapping(
    unet: UNet2DConditionModel,
    layers: Sequence[str],
    attention: Sequence[str] = (),
    positions: tuple[int, int] = (0, 0),
) -> Iterator[Tapped]:
    """Inside, each call of the network leaves the values of `layers` behind, and the attention maps of some kinds.

    Where a map is asked for, all attention layers write out their maps, as in the official code.

    Args:
        unet: UNet2DConditionModel of the SD 1.x, 2.x or SDXL kind; left as it was.
        layers: ids.
        attention: kinds of attention layers, of :data:`KINDS`.
        positions: fewest and most positions of a layer of which the attention is kept.

    Raises:
        ValueError: an unknown id or kind; attention processors that compute something else than plain attention.
    """
    places, attentions = _places(unet), _attentions(unet)
    maps = {f"{name}-map" for name in attentions}
    for name in layers:
        if name not in places and name not in maps:
            raise ValueError(f"layers: unknown id {name!r}, expected ids such as {list(places)[:3]}")
    for kind in attention:
        if kind not in KINDS:
            raise ValueError(f"attention: unknown kind {kind!r}, expected of {KINDS}")
    tapped = Tapped()

    def keep_map(name: str, probabilities: Tensor) -> None:
        if f"{name}-map" in layers:
            tapped.features[f"{name}-map"] = probabilities
        kind = f"{name.split('-')[0]}_{name.split('-')[-1]}"
        if kind in attention and positions[0] <= probabilities.shape[2] <= positions[1]:
            tapped.attention.setdefault(kind, []).append(probabilities.mean(1))

    with ExitStack() as stack:
        for name in layers:
            if name in places:
                register, module = places[name]
                stack.callback(register(module, partial(tapped.features.__setitem__, name)).remove)
        if attention or maps & set(layers):
            names = iter(attentions)
            processors = recording(list(attentions.values()), lambda _: MapProcessor(partial(keep_map, next(names))))
            stack.enter_context(processors)
        yield tapped


Register = Callable[[nn.Module, Callable[[Tensor], None]], Any]


def _after(module: nn.Module, keep: Callable[[Tensor], None]) -> Any:
    return module.register_forward_hook(
        lambda _, __, output: keep((output[0] if isinstance(output, tuple) else output).detach())
    )


def _before(module: nn.Module, keep: Callable[[Tensor], None]) -> Any:
    return module.register_forward_pre_hook(lambda _, arguments: keep(arguments[0].detach()))


def _places(unet: UNet2DConditionModel) -> dict[str, tuple[Register, nn.Module]]:
    """Where each id's value, maps aside, enters or leaves a module."""
    found: dict[str, tuple[Register, nn.Module]] = {
        "unet-in": (_before, unet.conv_in),
        "unet-after-conv-in": (_after, unet.conv_in),
    }

    def res(prefix: str, block: Any) -> None:
        found[f"{prefix}-increment"] = (_after, block.conv2)
        found[f"{prefix}-out"] = (_after, block)

    def vit(prefix: str, transformer: Any) -> None:
        for k, block in enumerate(transformer.transformer_blocks):
            inner = {
                "self-q": block.attn1.to_q,
                "self-k": block.attn1.to_k,
                "self-v": block.attn1.to_v,
                "cross-q": block.attn2.to_q,
                "ffn-inner": block.ff.net[0],
                "out": block,
            }
            found.update({f"{prefix}-block{k}-{name}": (_after, module) for name, module in inner.items()})
        found[f"{prefix}-out"] = (_after, transformer)

    for part, stages, sampler in (("down", unet.down_blocks, "downsampler"), ("up", unet.up_blocks, "upsampler")):
        for level, stage in enumerate(stages):
            for repeat, block in enumerate(stage.resnets):
                res(f"{part}-level{level}-repeat{repeat}-res", block)
                if getattr(stage, "attentions", None):
                    vit(f"{part}-level{level}-repeat{repeat}-vit", stage.attentions[repeat])
            for module in getattr(stage, f"{sampler}s", None) or ():
                found[f"{part}-level{level}-{sampler}-out"] = (_after, module)
    for repeat, block in enumerate(getattr(unet.mid_block, "resnets", ())):
        res(f"mid-repeat{repeat}-res", block)
    for transformer in getattr(unet.mid_block, "attentions", ()):
        vit("mid-vit", transformer)
        break
    found["unet-out"] = (_after, unet.conv_out)
    return found


def _attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """All attention layers in the order of execution, "up-level1-repeat0-vit-block0-cross" and the like.

    What has no id is "mid-unnamed…".
    """
    found = {}
    for part, stages in (("down", unet.down_blocks), ("mid", [unet.mid_block]), ("up", unet.up_blocks)):
        for level, stage in enumerate(stages):
            for repeat, transformer in enumerate(getattr(stage, "attentions", None) or ()):
                prefix = f"{part}-level{level}-repeat{repeat}-vit"
                if part == "mid":
                    prefix = f"mid-unnamed{repeat}" if repeat else "mid-vit"
                for k, block in enumerate(transformer.transformer_blocks):
                    found[f"{prefix}-block{k}-self"], found[f"{prefix}-block{k}-cross"] = block.attn1, block.attn2
    return found


def as_pictures(features: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """Values (B, L, C) as (B, C, h, w), contiguous, of latents of `size`; all others as they are."""
    return {name: picture(value, size) if value.ndim == 3 else value for name, value in features.items()}


def aggregated(attention: Mapping[str, Sequence[Tensor]], kinds: Sequence[str], size: tuple[int, int]) -> Tensor:
    """The official "attn" feature: (B, C, *size), C the keys of each kind and size of layers.

    Kind by kind, layers of equal size, smaller or larger as they come first, are averaged, enlarged to the latents'
    `size` by nearest neighbours and put behind each other.

    Raises:
        ValueError: no layer of these kinds has been kept.
    """
    found = []
    for kind in kinds:
        by_size: dict[int, list[Tensor]] = {}
        for value in attention.get(kind, ()):
            by_size.setdefault(value.shape[1], []).append(picture(value, size))
        found += [nn.functional.interpolate(torch.stack(each).mean(0), size=size) for each in by_size.values()]
    if not found:
        raise ValueError(f"attention: got {tuple(kinds)}, of which no layer has between a quarter and half the side")
    return torch.cat(found, dim=1)
