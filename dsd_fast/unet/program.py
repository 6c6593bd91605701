"""The UNet as a program of named steps; a request is a cut through it, a :class:`~dsd_fast.unet.plan.Plan`."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsd_fast.unet import blocks
from dsd_fast.unet.inductor import Inductor
from dsd_fast.unet.plan import Plan
from dsd_fast.unet.refusals import check_architecture, check_attachments
from dsd_fast.unet.step import Size, Step
from dsd_fast.unet.transformer import transformer_steps
from dsd_fast.unet.weights import Weights


class UNetProgram:
    """The steps of a diffusers UNet2DConditionModel, in execution order.

    The network is never changed: no hook, no processor, no copy of a weight.

    Args:
        unet: a UNet2DConditionModel of the SD 1.x, 2.x or SDXL kind, with or without adapters.

    Attributes:
        unet: the network.
        steps: all steps.
        layer_ids: the ids of the reference's grammar that can be tapped as features, in execution order.
        score_ids: one per cross-attention, that id without a suffix: ``up-level1-repeat1-vit-block0-cross``.
        map_ids: the same and one per self-attention, ``…-self``, whose attention maps can be asked for.
        time_blocks: the residual blocks, each with the name of the step that reads the time embedding for it.
        inductor: the compiled regions that plans share.
        weights: what tells plans that the network changed.

    Raises:
        UnsupportedNetworkError: what the program would ignore or get wrong, by name.
    """

    def __init__(self, unet: Any) -> None:
        check_architecture(unet)
        self.unet = unet
        self._downsamplers: list[Any] = []
        self._attentions: list[tuple[str, Any]] = []
        self._bypassed: list[tuple[str, Any]] = []
        for path, module in unet.named_modules():
            kind = type(module).__name__
            if kind == "Attention":
                self._attentions.append((path, module))
            if kind in _BYPASSED:
                self._bypassed.append((path or "unet", module))
        self.steps: tuple[Step, ...] = tuple(self._build())
        self.layer_ids: tuple[str, ...] = tuple(step.name for step in self.steps if step.shape is not None)
        self.score_ids: tuple[str, ...] = tuple(step.name for step in self.steps if step.score)
        self.map_ids: tuple[str, ...] = tuple(step.name for step in self.steps if step.score or step.self_maps)
        self.inductor = Inductor()
        self.weights = Weights(unet)
        self.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> UNetProgram:
        """The program of a copy of the network: steps call the modules that they were made for."""
        copied = memo[id(self)] = UNetProgram(copy.deepcopy(self.unet, memo))
        copied.inductor = copy.deepcopy(self.inductor, memo)
        return copied

    def plan(
        self,
        features: Sequence[str] = (),
        scores: Sequence[str] = (),
        maps: Sequence[str] = (),
        noise_pred: bool = False,
        pool: str | float = "mean",
        adapter: str | Sequence[str] | None = None,
    ) -> Plan:
        """A cut through the program: what to tap, and nothing after the last tap runs.

        Args:
            features: layer ids whose values are returned.
            scores: score ids whose log-sum-exp over the text's keys is returned.
            maps: map ids whose attention maps, averaged over heads, are returned: of a cross-attention those of chosen
                tokens, of a self-attention those of all positions that are attended to.
            noise_pred: whether the model's output is returned.
            pool: how a score is pooled over positions: "mean", "max", or a temperature τ > 0 for
                τ·log mean exp(score/τ).
            adapter: names of the adapters active during the plan's calls; () for none; None leaves the network as
                it stands at each call.

        Raises:
            ValueError: an unknown id (with the nearest legal ones), nothing asked for, a bad ``pool`` or ``adapter``.
        """
        for name, ids, legal in (
            ("features", features, self.layer_ids),
            ("scores", scores, self.score_ids),
            ("maps", maps, self.map_ids),
        ):
            _check_ids(name, ids, legal)
        if not (features or scores or maps or noise_pred):
            raise ValueError("plan: nothing is asked for; give features, scores, maps or noise_pred=True")
        if pool not in ("mean", "max") and not (isinstance(pool, (int, float)) and pool > 0):
            raise ValueError(f"pool: got {pool!r}, expected 'mean', 'max' or a temperature > 0")
        self.check()
        return Plan(self, tuple(features), tuple(scores), tuple(maps), noise_pred, pool, adapter)

    def check(self) -> None:
        """Refuse what has been attached to the network since (see :mod:`dsd_fast.unet.refusals`)."""
        check_attachments(self.unet, self._attentions, self._bypassed)

    @property
    def checkpointing(self) -> bool:
        """Whether gradient checkpointing is enabled on the network or a part of it, as diffusers does it."""
        return any(getattr(module, "gradient_checkpointing", False) for _, module in self._bypassed)

    def sizes(self, height: int, width: int) -> list[Size]:
        """The image size at each level, from the latents' size."""
        sizes = [(height, width)]
        for module in self._downsamplers:
            sizes.append(blocks.downsampled(module, sizes[-1]))
        return sizes

    def residual_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """The (C, h, w) of one row of each residual that a ControlNet gives, the middle one last."""
        sizes = self.sizes(height, width)
        pushed = [(step.pushes, *sizes[step.level]) for step in self.steps if step.pushes]
        return [*pushed, (int(self.unet.config.block_out_channels[-1]), *sizes[-1])]

    @property
    def dtype(self) -> torch.dtype:
        """The network's type. Of its first layer, because diffusers' own property walks through the whole network."""
        weight: Tensor = self.unet.conv_in.weight
        return weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        weight: Tensor = self.unet.conv_in.weight
        return weight.device

    @property
    def reads_pooled_text(self) -> bool:
        """Whether the time embedding reads the pooled text (SDXL)."""
        return bool(self.unet.config.addition_embed_type == "text_time")

    @property
    def latent_channels(self) -> int:
        """C, the channels of the latents that the network is given."""
        return int(self.unet.config.in_channels)

    @property
    def text_width(self) -> int:
        """E, the width of the text states."""
        width = self.unet.config.cross_attention_dim
        return int(width if isinstance(width, int) else width[0])

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text states of a network that reads them."""
        config = self.unet.config
        return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)

    def attention(self, score_id: str) -> Any:
        """The cross-attention module that a score id names."""
        return self._cross[score_id]

    def _build(self) -> Iterator[Step]:
        unet = self.unet
        self._cross: dict[str, Any] = {}
        self.time_blocks: list[tuple[str, Any]] = []
        yield from blocks.input_steps(unet)
        for level, block in enumerate(unet.down_blocks):
            yield from self._stage(block, f"down-level{level}", level, pops=False)
            for module in block.downsamplers or ():
                self._downsamplers.append(module)
                yield blocks.downsample_step(module, f"down-level{level}-downsampler-out", level + 1)
        deepest = len(self._downsamplers)
        yield from self._middle(unet.mid_block, deepest)
        level = deepest
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
            self.time_blocks.append((f"{unit}-res-increment", resnet))
            yield from blocks.resnet_steps(
                resnet,
                f"{unit}-res",
                level,
                time_reads_text=self.reads_pooled_text,
                pops=pops,
                push=not pops and attentions is None,
            )
            if attentions is not None:
                yield from self._vit(attentions[repeat], f"{unit}-vit", level, push=not pops)

    def _middle(self, block: Any, level: int) -> Iterator[Step]:
        for repeat, resnet in enumerate(block.resnets):
            # The grammar names one transformer in the middle, between the residual blocks.
            if repeat:
                yield from self._vit(block.attentions[repeat - 1], "mid-vit", level, push=False)
            self.time_blocks.append((f"mid-repeat{repeat}-res-increment", resnet))
            yield from blocks.resnet_steps(
                resnet,
                f"mid-repeat{repeat}-res",
                level,
                time_reads_text=self.reads_pooled_text,
                pops=False,
                push=False,
            )
        yield blocks.mid_residual_step(level)

    def _vit(self, vit: Any, prefix: str, level: int, push: bool) -> Iterator[Step]:
        for index, block in enumerate(vit.transformer_blocks):
            self._cross[f"{prefix}-block{index}-cross"] = block.attn2
        yield from transformer_steps(vit, prefix, level, push=push)


# Modules whose forward the program replaces by its own steps; leaf modules, Downsample2D and GEGLU are called.
_BYPASSED = frozenset(
    {
        "UNet2DConditionModel",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
        "UNetMidBlock2DCrossAttn",
        "CrossAttnUpBlock2D",
        "UpBlock2D",
        "ResnetBlock2D",
        "Upsample2D",
        "Transformer2DModel",
        "BasicTransformerBlock",
        "Attention",
        "FeedForward",
    }
)


def _check_ids(name: str, ids: Sequence[str], legal: Sequence[str]) -> None:
    if isinstance(ids, str):
        raise ValueError(f"{name}: got the string {ids!r}, expected a sequence of ids")
    for given in ids:
        if given not in legal:
            near = ", ".join(difflib.get_close_matches(str(given), legal, n=3, cutoff=0.0))
            raise ValueError(f"{name}: unknown id {given!r}; the nearest of the {len(legal)} legal ids are {near}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"{name}: an id is given twice")
