"""What a network is to the rest: named steps, sizes, the time embedding, widths. Here a UNet2DConditionModel's.

Nothing above reads the network's config or walks through its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor

from dsd_fast.models.architecture import TIME_IDS
from dsd_fast.models.private import uncompiled
from dsd_fast.unet import blocks
from dsd_fast.unet.flops import base_layer, linear_flops
from dsd_fast.unet.inductor import Inductor
from dsd_fast.unet.refusals import Bypassed, check_architecture
from dsd_fast.unet.step import Size, Step
from dsd_fast.unet.transformer import transformer_steps
from dsd_fast.unet.weights import Weights


class Network:
    """The steps of a diffusers UNet2DConditionModel, in execution order, and what they need.

    Attributes:
        module, unet: the network itself.
        steps: all steps.
        output_id: the step whose value is the model's output.
        layer_ids: the ids of the reference's grammar that can be tapped as features, in execution order.
        score_ids: one per cross-attention, that id without a suffix: ``up-level1-repeat1-vit-block0-cross``.
        entries: the ids that a plan can enter the network with a kept activation of (Ma et al. 2023, "DeepCache",
            arXiv 2312.00858), the last one first: after ``entries[b]`` b + 1 skip connections are used, so that b is
            DeepCache's branch.
        map_ids: the same and one per self-attention, ``…-self``, whose attention maps can be asked for.
        time_blocks: the residual blocks, each with the name of the step that reads the time embedding for it.
        latent_channels: C of the latents that it is given.
        time_width: E of the time embedding.
        guidance_width: E of the guidance embedding that the time embedding may read (LCM); 0 where it reads none.
        text_width: E of the text states.
        reads_pooled_text: whether the time embedding reads the pooled text, and with it image sizes (SDXL).
        pooled_width: E of the pooled text states; 0 where none are read.
        inductor: the compiled regions that plans share.
        weights: what tells plans that the network changed.

    Raises:
        UnsupportedNetworkError: what would be ignored or got wrong, by name.
    """

    def __init__(self, unet: Any) -> None:
        unet = uncompiled(unet)
        check_architecture(unet)
        self.module = unet
        config = unet.config
        self.latent_channels: int = config.in_channels
        self.time_width: int = base_layer(unet.time_embedding.linear_2).out_features
        self.guidance_width: int = config.get("time_cond_proj_dim") or 0
        widths = config.cross_attention_dim
        self.text_width: int = widths if isinstance(widths, int) else widths[0]
        self.reads_pooled_text: bool = config.addition_embed_type == "text_time"
        self.pooled_width: int = 0
        if self.reads_pooled_text:
            # What the added embedding reads beside the sines and cosines of the image sizes.
            self.pooled_width = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        self._middle_width: int = config.block_out_channels[-1]
        self._bypassed = Bypassed(unet)
        self._downsamplers: list[Any] = []
        self._cross: dict[str, Any] = {}
        self.time_blocks: list[tuple[str, Any]] = []
        self.steps: tuple[Step, ...] = tuple(self._build())
        self.output_id = self.steps[-1].name
        self.layer_ids: tuple[str, ...] = tuple(step.name for step in self.steps if step.shape is not None)
        self.score_ids: tuple[str, ...] = tuple(step.name for step in self.steps if step.score)
        self.map_ids: tuple[str, ...] = tuple(step.name for step in self.steps if step.score or step.self_maps)
        self.entries: tuple[str, ...] = tuple(_entries(self.steps))
        self.inductor = Inductor()
        self.weights = Weights(unet)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as the same of a copy of the network: steps call the modules that they were made for."""
        return type(self), (self.module,), {"inductor": self.inductor}

    def check(self) -> None:
        """Refuse what has been attached to the network since (see :mod:`dsd_fast.unet.refusals`)."""
        self._bypassed.check()

    @property
    def plainly_activated(self) -> bool:
        """Whether every residual block would put the time embedding through SiLU, so that one does for all."""
        return self._bypassed.plainly_activated

    @property
    def unet(self) -> Any:
        """The network itself, by the name it is given under."""
        return self.module

    @property
    def checkpointing(self) -> bool:
        """Whether gradient checkpointing is enabled on the network or a part of it, as diffusers does it."""
        return any(module.__dict__.get("gradient_checkpointing") for module in self._bypassed.modules.values())

    @property
    def dtype(self) -> torch.dtype:
        """The network's type. Of its first layer, because diffusers' own property walks through the whole network."""
        weight: Tensor = self.module.conv_in.weight
        return weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        weight: Tensor = self.module.conv_in.weight
        return weight.device

    def entered(self, entry: str) -> tuple[tuple[Step, ...], Step, tuple[Step, ...]]:
        """Give the steps that push what the steps after an entry pop, the step that enters, and the steps after it."""
        place = next(i for i, step in enumerate(self.steps) if step.name == entry)
        pushing = [i for i, step in enumerate(self.steps) if step.pushes]
        deepest = pushing[self.entries.index(entry)]
        return self.steps[: deepest + 1], blocks.entering_step(self.steps[place]), self.steps[place + 1 :]

    def sizes(self, height: int, width: int) -> list[Size]:
        """Give the image size at each level, from the latents' size."""
        sizes = [(height, width)]
        for module in self._downsamplers:
            sizes.append(blocks.downsampled(module, sizes[-1]))
        return sizes

    def residual_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """Give the (C, h, w) of one row of each residual that a ControlNet adds, the middle one last."""
        sizes = self.sizes(height, width)
        pushed = [(step.pushes, *sizes[step.level]) for step in self.steps if step.pushes]
        return [*pushed, (self._middle_width, *sizes[-1])]

    def attention(self, score_id: str) -> Any:
        """Give the cross-attention module that a score id names."""
        return self._cross[score_id]

    def time_flops(self, ran: Set[str], latents: int, rows: int) -> int:
        """Count the FLOPs of the time embedding, and of its projections for the steps ``ran``."""
        projections = [block.time_emb_proj for name, block in self.time_blocks if name in ran]
        if not projections:
            return 0
        embedding, read = self.module.time_embedding, latents
        total = linear_flops(embedding.linear_1, latents) + linear_flops(embedding.linear_2, latents)
        if self.guidance_width:
            total += linear_flops(embedding.cond_proj, latents)
        if self.reads_pooled_text:
            added, read = self.module.add_embedding, rows
            total += linear_flops(added.linear_1, rows) + linear_flops(added.linear_2, rows)
        return total + sum(linear_flops(projection, read) for projection in projections)

    # Called as ``embed(module, …)``: a compiled function is given its modules.
    @staticmethod
    def embed(
        unet: Any,
        times: Tensor,
        dtype: torch.dtype,
        timestep_cond: Tensor | None,
        time_ids: Tensor | None,
        pooled: Tensor | None,
        latent_index: Tensor | None,
        text_index: Tensor | None,
    ) -> Tensor:
        """Make the time embedding before its activation: (P, E), or (B, E) where it reads the pooled text."""
        embedding = unet.time_embedding(unet.time_proj(times).to(dtype), timestep_cond)
        if time_ids is not None:
            assert pooled is not None
            # (P, 6) → (P, 6·e), e sines and cosines of each number.
            ids = unet.add_time_proj(time_ids.flatten()).view(len(time_ids), -1).to(pooled.dtype)
            pooled = pooled if text_index is None else pooled.index_select(0, text_index)
            if latent_index is not None:
                embedding, ids = embedding.index_select(0, latent_index), ids.index_select(0, latent_index)
            embedding = embedding + unet.add_embedding(torch.cat([pooled, ids], dim=-1).to(embedding.dtype))
        result: Tensor = embedding
        return result

    def _build(self) -> Iterator[Step]:
        unet = self.module
        yield from blocks.input_steps(unet)
        for level, block in enumerate(unet.down_blocks):
            yield from self._stage(block, f"down-level{level}", level, pops=False)
            for module in block.downsamplers or ():
                self._downsamplers.append(module)
                yield blocks.downsample_step(module, f"down-level{level}-downsampler-out", level + 1)
        level = len(self._downsamplers)
        if unet.mid_block is not None:
            yield from self._middle(unet.mid_block, level)
        # diffusers adds a ControlNet's middle residual where there is no middle block too.
        yield blocks.mid_residual_step(level)
        for index, block in enumerate(unet.up_blocks):
            yield from self._stage(block, f"up-level{index}", level, pops=True)
            for module in block.upsamplers or ():
                level -= 1
                yield blocks.upsample_step(module, f"up-level{index}-upsampler-out", level)
        yield blocks.output_step(unet)

    def _stage(self, block: Any, prefix: str, level: int, pops: bool) -> Iterator[Step]:
        attentions = getattr(block, "attentions", None)
        for repeat, resnet in enumerate(block.resnets):
            unit = f"{prefix}-repeat{repeat}"
            push = not pops
            yield from self._res(resnet, f"{unit}-res", level, pops=pops, push=push and attentions is None)
            if attentions is not None:
                yield from self._vit(attentions[repeat], f"{unit}-vit", level, push=push)

    def _middle(self, block: Any, level: int) -> Iterator[Step]:
        for repeat, resnet in enumerate(block.resnets):
            # The grammar names one transformer in the middle, between the residual blocks; UNetMidBlock2D has one
            # residual block alone.
            if repeat:
                yield from self._vit(block.attentions[repeat - 1], "mid-vit", level)
            yield from self._res(resnet, f"mid-repeat{repeat}-res", level)

    def _res(self, resnet: Any, prefix: str, level: int, *, pops: bool = False, push: bool = False) -> Iterator[Step]:
        resnet = uncompiled(resnet)
        self.time_blocks.append((f"{prefix}-increment", resnet))
        yield from blocks.resnet_steps(
            resnet, prefix, level, time_reads_text=self.reads_pooled_text, pops=pops, push=push
        )

    def _vit(self, vit: Any, prefix: str, level: int, *, push: bool = False) -> Iterator[Step]:
        vit = uncompiled(vit)
        for index, block in enumerate(vit.transformer_blocks):
            self._cross[f"{prefix}-block{index}-cross"] = block.attn2
        yield from transformer_steps(vit, prefix, level, push=push)


def _entries(steps: tuple[Step, ...]) -> Iterator[str]:
    """The ids of the values that steps which pop a skip connection are given, the last one first.

    A popping step begins a residual block: beside skip connections that value is all that the rest reads. It counts
    where it lies behind all steps that push what the rest pops, so that something is left out.
    """
    pushing = [i for i, step in enumerate(steps) if step.pushes]
    popping = [i for i, step in enumerate(steps) if step.pops]
    for deepest, place in zip(pushing, reversed(popping), strict=True):
        # What no id names between the two, a ControlNet's addition, is done after entering.
        before = max(i for i in range(place) if steps[i].shape is not None)
        if deepest < before:
            yield steps[before].name
