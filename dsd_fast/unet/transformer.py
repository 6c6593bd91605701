"""A Transformer2DModel as steps: self-attention, cross-attention with its score, feed-forward.

The arithmetic is that of diffusers' Transformer2DModel and BasicTransformerBlock. Modules are looked up at call time,
never captured: adapters replace them in place. They are looked up among a parent's ``_modules``, where its
attributes end up after all else has been tried.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.kernels.common.attention import (
    attention_logits,
    full_precision,
    join_heads,
    probabilities,
    real_dtype,
    split_heads,
    text_bias,
    without_masked,
)
from dsd_fast.kernels.cross_attention_score import cross_attention_score
from dsd_fast.kernels.token_maps import token_maps
from dsd_fast.models.private import uncompiled
from dsd_fast.unet.flops import attention_flops, base_layer, conv_flops, linear_flops
from dsd_fast.unet.pieces import side_by_side
from dsd_fast.unet.step import NOTHING, Size, State, Step, Taken, Want, area, flat, grid
from dsd_fast.unet.text import LayerText


def transformer_steps(vit: Any, prefix: str, level: int, *, push: bool) -> list[Step]:
    """A Transformer2DModel: projection in, its BasicTransformerBlocks, projection out."""
    flattens: bool = vit.use_linear_projection
    inner: int = vit.inner_dim
    channels: int = vit.in_channels

    own: dict[str, Any] = vit._modules

    def enter(state: State, want: Want) -> Taken:
        image = state.live["image"] = state.live["x"]
        layers, projection = state.layers, own["proj_in"]
        x = layers.norm_activate(image, own["norm"])
        state.live["x"] = layers.linear(flat(x), projection) if flattens else flat(layers.convolved(x, projection))
        return NOTHING

    def leave(state: State, want: Want) -> Taken:
        x, image = state.live["x"], state.live.pop("image")
        size, layers, projection = state.sizes[level], state.layers, own["proj_out"]
        x = grid(layers.linear(x, projection), size) if flattens else layers.convolved(grid(x, size), projection)
        x = state.live["x"] = x + image
        if push:
            state.push(x)
        return Taken(x)

    def project(name: str, size: Size) -> int:
        layer: Any = getattr(vit, name)
        return linear_flops(layer, area(size)) if flattens else conv_flops(layer, size)

    def elements(s: Size, t: int) -> int:
        return (3 * channels + 2 * inner) * area(s)

    entering = Step(
        f"{prefix}-in",
        level,
        enter,
        flops=lambda s, t: project("proj_in", s),
        elements=elements,
        region=f"{prefix}-in",
    )
    steps = [entering]
    for index, block in enumerate(map(uncompiled, vit.transformer_blocks)):
        steps += self_attention_steps(block, f"{prefix}-block{index}", level, channels)
        steps += cross_attention_steps(block, f"{prefix}-block{index}", level, channels)
        steps += feed_forward_steps(block, f"{prefix}-block{index}", level, channels)
    leaving = Step(
        f"{prefix}-out",
        level,
        leave,
        flops=lambda s, t: project("proj_out", s),
        elements=elements,
        shape=lambda s, t: (channels, *s),
        region=f"{prefix}-out",
        pushes=channels if push else 0,
    )
    return [*steps, leaving]


def self_attention_steps(block: Any, prefix: str, level: int, channels: int) -> list[Step]:
    """``self-q``, ``self-k``, ``self-v``, ``self-map``, and the attention itself with its residual and its maps."""
    attn = uncompiled(block.attn1)
    heads, width = attn.heads, attn.inner_dim
    own, projections = block._modules, attn._modules

    def projection(name: str, source: str, last: bool = False) -> Step:
        def run(state: State, want: Want) -> Taken:
            live = state.live
            if name == "q":
                live["n"] = state.layers.layer_norm(live["x"], own["norm1"])
                together = None if want.last else side_by_side(live["n"], projections, ("to_q", "to_k", "to_v"))
                if together is not None:
                    live["q"], live["k"], live["v"] = together
            n = live.pop("n") if last else live["n"]
            if name not in live:
                live[name] = state.layers.linear(n, projections[source])
            return Taken(grid(live[name], state.sizes[level])) if want.feature else NOTHING

        return Step(
            f"{prefix}-self-{name}",
            level,
            run,
            flops=lambda s, t: linear_flops(getattr(attn, source), area(s)),
            elements=lambda s, t: (channels + 5 * width) * area(s),
            shape=lambda s, t: (width, *s),
            region=prefix,
        )

    def attention_map(state: State, want: Want) -> Taken:
        q, k = state.live["q"], state.live["k"]
        with full_precision(q.device):
            logits = attention_logits(q, k, None, heads, _scale(attn))
        return Taken(torch.softmax(logits, dim=-1).to(q.dtype))

    def attend(state: State, want: Want) -> Taken:
        live, maps = state.live, None
        if want.maps:
            # Each row is its own text, of as many tokens as there are positions.
            size = state.sizes[level]
            every = torch.arange(area(size), device=live["q"].device).expand(len(live["q"]), -1)
            maps = token_maps(live["q"], live["k"], every, None, None, None, heads, _scale(attn))
            maps = maps.view(*maps.shape[:2], *size)
        if want.last:
            return Taken(maps=maps)
        q, k, v = (split_heads(live.pop(name), heads) for name in "qkv")
        o = F.scaled_dot_product_attention(q, k, v, scale=_scale(attn))
        # With the norm that the next step reads, so that the sum is read once.
        x = _project_out(state, attn, join_heads(o))
        live["x"], live["n"] = state.layers.add_norm(x, live["x"], own["norm2"])
        return Taken(maps=maps)

    return [
        projection("q", "to_q"),
        projection("k", "to_k"),
        projection("v", "to_v", last=True),
        Step(
            f"{prefix}-self-map",
            level,
            attention_map,
            flops=lambda s, t: attention_flops(area(s), area(s), width) // 2,
            elements=lambda s, t: (channels + 6 * width + 4 * heads * area(s)) * area(s),
            shape=lambda s, t: (heads, area(s), area(s)),
            region=prefix,
            optional=True,
        ),
        Step(
            f"{prefix}-self",
            level,
            attend,
            flops=lambda s, t: attention_flops(area(s), area(s), width) + linear_flops(attn.to_out[0], area(s)),
            elements=lambda s, t: (2 * channels + 8 * width) * area(s),
            region=prefix,
            heads=heads,
            map_flops=lambda s, t: attention_flops(area(s), area(s), width) // 2,
        ),
    ]


def cross_attention_steps(block: Any, prefix: str, level: int, channels: int) -> list[Step]:
    """``cross-q``, ``cross-map``, and the attention itself, which answers the score id ``…-cross``."""
    attn = uncompiled(block.attn2)
    heads, width = attn.heads, attn.inner_dim
    own, projections = block._modules, attn._modules
    name = f"{prefix}-cross"

    def query(state: State, want: Want) -> Taken:
        q = state.live["q"] = state.layers.linear(state.live.pop("n"), projections["to_q"])
        return Taken(grid(q, state.sizes[level])) if want.feature else NOTHING

    def attention_map(state: State, want: Want) -> Taken:
        q, text = state.live["q"], _text(state)
        texts = _text_index(state, q)
        k = text.k[texts]
        bias = text_bias(k.shape[1], text.lengths, text.key_bias, texts, real_dtype(q))
        with full_precision(q.device):
            logits = attention_logits(q, without_masked(k, bias), bias, heads, _scale(attn))
        return Taken(probabilities(logits, torch.logsumexp(logits, dim=-1)).to(q.dtype))

    def attend(state: State, want: Want) -> Taken:
        q, text = state.live.pop("q"), _text(state)
        maps = score = None
        if want.maps:
            tokens = state.index.tokens
            assert tokens is not None
            maps = token_maps(q, text.k, tokens, state.index.text, text.lengths, text.key_bias, heads, _scale(attn))
            maps = maps.view(*maps.shape[:2], *state.sizes[level])
        if want.score or not want.last:
            o, score = cross_attention_score(
                q,
                text.k,
                None if want.last else text.v,
                heads=heads,
                text_index=state.index.text,
                text_length=text.lengths,
                key_bias=text.key_bias,
                score_mask=text.score_mask if want.score else None,
                scale=_scale(attn),
                mean=not want.score or want.pool == "mean",
            )
            if o is not None:
                x = _project_out(state, attn, o)
                state.live["x"], state.live["n"] = state.layers.add_norm(x, state.live["x"], own["norm3"])
            score = _pool(score, want.pool) if want.score else None
        return Taken(score=score, maps=maps)

    return [
        Step(
            f"{prefix}-cross-q",
            level,
            query,
            flops=lambda s, t: linear_flops(attn.to_q, area(s)),
            elements=lambda s, t: (2 * channels + 3 * width) * area(s),
            shape=lambda s, t: (width, *s),
            region=prefix,
        ),
        Step(
            f"{prefix}-cross-map",
            level,
            attention_map,
            flops=lambda s, t: attention_flops(area(s), t, width) // 2,
            elements=lambda s, t: (2 * channels + 3 * width + 5 * heads * t) * area(s),
            shape=lambda s, t: (heads, area(s), t),
            region=prefix,
            layer=name,
            reads_text=True,
            optional=True,
        ),
        Step(
            name,
            level,
            attend,
            flops=lambda s, t: attention_flops(area(s), t, width) + linear_flops(attn.to_out[0], area(s)),
            elements=lambda s, t: (2 * channels + 5 * width + heads) * area(s),
            region=prefix,
            layer=name,
            score=True,
            reads_text=True,
            heads=heads,
        ),
    ]


def feed_forward_steps(block: Any, prefix: str, level: int, channels: int) -> list[Step]:
    """``ffn-inner`` (after GEGLU) and the block's output."""
    ff = uncompiled(block.ff)
    layers = ff.net._modules
    inner = base_layer(ff.net[2]).in_features

    def gate(state: State, want: Want) -> Taken:
        g = state.live["g"] = state.layers.gated(state.live.pop("n"), layers["0"])
        return Taken(grid(g, state.sizes[level])) if want.feature else NOTHING

    def out(state: State, want: Want) -> Taken:
        g = state.live.pop("g")
        for layer in list(layers.values())[1:]:
            g = state.layers.dropped(g, layer)
        x = state.live["x"] = g + state.live["x"]
        return Taken(grid(x, state.sizes[level])) if want.feature else NOTHING

    return [
        Step(
            f"{prefix}-ffn-inner",
            level,
            gate,
            flops=lambda s, t: linear_flops(ff.net[0].proj, area(s)),
            elements=lambda s, t: (3 * channels + 4 * inner) * area(s),
            shape=lambda s, t: (inner, *s),
            region=prefix,
        ),
        Step(
            f"{prefix}-out",
            level,
            out,
            flops=lambda s, t: linear_flops(ff.net[2], area(s)),
            elements=lambda s, t: (4 * channels + 2 * inner) * area(s),
            shape=lambda s, t: (channels, *s),
            region=prefix,
        ),
    ]


def _text(state: State) -> LayerText:
    assert state.text is not None
    return state.text


def _text_index(state: State, q: Tensor) -> Tensor:
    index = state.index.text
    return torch.arange(len(q), device=q.device) if index is None else index


def _scale(attn: Any) -> float:
    """The factor of the logits; diffusers' processor for torch's fused attention does not read ``attn.scale``."""
    fused = type(attn.processor).__name__ == "AttnProcessor2_0"
    factor: float = (attn.inner_dim // attn.heads) ** -0.5 if fused else attn.scale
    return factor


def _project_out(state: State, attn: Any, x: Tensor) -> Tensor:
    for layer in attn._modules["to_out"]._modules.values():
        x = state.layers.dropped(x, layer)
    return x if attn.rescale_output_factor == 1.0 else x / attn.rescale_output_factor


def _pool(score: Tensor, pool: str | float) -> Tensor:
    """(B, H, L) → (B, H); a temperature τ pools as τ·log mean exp(score/τ), between the mean and the maximum."""
    if pool == "mean":
        return score
    if pool == "max":
        return score.amax(-1)
    temperature = float(pool)
    # A row without keys scores −inf everywhere, and the gradient of a log-sum-exp of nothing but −inf is NaN.
    none = (score == float("-inf")).all(-1)
    pooled = torch.logsumexp(score.masked_fill(none[..., None], 0.0) / temperature, dim=-1) - math.log(score.shape[-1])
    return (temperature * pooled).masked_fill(none, float("-inf"))
