"""The blocks of a UNet2DConditionModel as steps.

Modules are looked up at call time, never captured: adapters replace them in place. The arithmetic is diffusers' own
(ResnetBlock2D, Transformer2DModel, BasicTransformerBlock, Downsample2D, Upsample2D), cut at the layer ids of the
"generic diffusion feature" code (METHODS of Meng et al., arXiv 2410.03558).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.kernels.common.attention import attention_logits, join_heads, probabilities, split_heads, text_bias
from dsd_fast.kernels.cross_attention_score import cross_attention_score
from dsd_fast.kernels.token_maps import token_maps
from dsd_fast.unet.flops import attention_flops, base_layer, conv_flops, linear_flops
from dsd_fast.unet.step import Size, State, Step, Taken, Want, flat, grid


def _area(size: Size) -> int:
    return size[0] * size[1]


def input_steps(unet: Any) -> list[Step]:
    """``unet-in`` and ``unet-after-conv-in``."""
    channels, width = unet.config.in_channels, unet.config.block_out_channels[0]

    def take(state: State, want: Want) -> Taken:
        sample = 2 * state.sample - 1.0 if unet.config.center_input_sample else state.sample
        state.live["x"] = sample
        return Taken(sample)

    def conv_in(state: State, want: Want) -> Taken:
        x = state.live["x"] = unet.conv_in(state.live["x"])
        state.push(x)
        return Taken(x)

    return [
        Step(
            "unet-in",
            0,
            take,
            flops=lambda s, t: 0,
            elements=lambda s, t: channels * _area(s),
            shape=lambda s, t: (channels, *s),
        ),
        Step(
            "unet-after-conv-in",
            0,
            conv_in,
            flops=lambda s, t: conv_flops(unet.conv_in, s),
            elements=lambda s, t: (channels + width) * _area(s),
            shape=lambda s, t: (width, *s),
            pushes=width,
        ),
    ]


def output_step(unet: Any) -> Step:
    """``unet-out``: the model's output, noise or v as the model was trained."""
    width, channels = unet.config.block_out_channels[0], unet.config.out_channels

    def run(state: State, want: Want) -> Taken:
        x = state.live["x"]
        if unet.conv_norm_out is not None:
            x = unet.conv_act(unet.conv_norm_out(x))
        return Taken(unet.conv_out(x))

    return Step(
        "unet-out",
        0,
        run,
        flops=lambda s, t: conv_flops(unet.conv_out, s),
        elements=lambda s, t: (3 * width + channels) * _area(s),
        shape=lambda s, t: (channels, *s),
    )


def resnet_steps(block: Any, prefix: str, level: int, *, time_reads_text: bool, pops: bool, push: bool) -> list[Step]:
    """A ResnetBlock2D: its first convolution, its residual branch, the sum."""
    wide, narrow = block.in_channels, block.out_channels

    def conv1(state: State, want: Want) -> Taken:
        if pops:
            state.live["x"] = torch.cat([state.live["x"], state.pop()], dim=1)
        state.live["h"] = block.conv1(block.nonlinearity(block.norm1(state.live["x"])))
        return Taken()

    def increment(state: State, want: Want) -> Taken:
        h = block.norm2(state.live["h"] + state.project_time(block.time_emb_proj))
        h = state.live["h"] = block.conv2(block.dropout(block.nonlinearity(h)))
        return Taken(h)

    def out(state: State, want: Want) -> Taken:
        x = state.live["x"]
        if block.conv_shortcut is not None:
            x = block.conv_shortcut(x)
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
            elements=lambda s, t: (4 * wide + narrow) * _area(s),
            pops=pops,
        ),
        Step(
            f"{prefix}-increment",
            level,
            increment,
            flops=lambda s, t: conv_flops(block.conv2, s),
            elements=lambda s, t: (wide + 4 * narrow) * _area(s),
            shape=lambda s, t: (narrow, *s),
            reads_text=time_reads_text,
        ),
        Step(
            f"{prefix}-out",
            level,
            out,
            flops=lambda s, t: 0 if block.conv_shortcut is None else conv_flops(block.conv_shortcut, s),
            elements=lambda s, t: (wide + 3 * narrow) * _area(s),
            shape=lambda s, t: (narrow, *s),
            pushes=narrow if push else 0,
        ),
    ]


def transformer_steps(vit: Any, prefix: str, level: int, *, push: bool) -> list[Step]:
    """A Transformer2DModel: projection in, its BasicTransformerBlocks, projection out."""
    linear: bool = vit.use_linear_projection
    inner: int = vit.inner_dim
    channels: int = vit.in_channels

    def enter(state: State, want: Want) -> Taken:
        image = state.live["image"] = state.live["x"]
        x = vit.norm(image)
        state.live["x"] = vit.proj_in(flat(x)) if linear else flat(vit.proj_in(x))
        return Taken()

    def leave(state: State, want: Want) -> Taken:
        x, image = state.live["x"], state.live.pop("image")
        size = state.sizes[level]
        x = grid(vit.proj_out(x), size) if linear else vit.proj_out(grid(x, size))
        x = state.live["x"] = x + image
        if push:
            state.push(x)
        return Taken(x)

    def project(name: str, size: Size) -> int:
        layer: Any = getattr(vit, name)
        return linear_flops(layer, _area(size)) if linear else conv_flops(layer, size)

    def elements(s: Size, t: int) -> int:
        return (3 * channels + 2 * inner) * _area(s)

    steps = [Step(f"{prefix}-in", level, enter, flops=lambda s, t: project("proj_in", s), elements=elements)]
    for index, block in enumerate(vit.transformer_blocks):
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
        pushes=channels if push else 0,
    )
    return [*steps, leaving]


def self_attention_steps(block: Any, prefix: str, level: int, channels: int) -> list[Step]:
    """``self-q``, ``self-k``, ``self-v``, ``self-map``, and the attention itself with its residual."""
    attn = block.attn1
    heads, width = attn.heads, attn.inner_dim

    def projection(name: str, source: str, last: bool = False) -> Step:
        def run(state: State, want: Want) -> Taken:
            if name == "q":
                state.live["n"] = block.norm1(state.live["x"])
            x = state.live[name] = getattr(attn, source)(state.live.pop("n") if last else state.live["n"])
            return Taken(grid(x, state.sizes[level]))

        return Step(
            f"{prefix}-self-{name}",
            level,
            run,
            flops=lambda s, t: linear_flops(getattr(attn, source), _area(s)),
            elements=lambda s, t: (channels + 5 * width) * _area(s),
            shape=lambda s, t: (width, *s),
        )

    def attention_map(state: State, want: Want) -> Taken:
        logits = attention_logits(state.live["q"], state.live["k"], None, heads, attn.scale)
        return Taken(torch.softmax(logits, dim=-1).to(state.live["q"].dtype))

    def attend(state: State, want: Want) -> Taken:
        q, k, v = (split_heads(state.live.pop(name), heads) for name in "qkv")
        o = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        state.live["x"] = _project_out(attn, join_heads(o)) + state.live["x"]
        return Taken()

    return [
        projection("q", "to_q"),
        projection("k", "to_k"),
        projection("v", "to_v", last=True),
        Step(
            f"{prefix}-self-map",
            level,
            attention_map,
            flops=lambda s, t: attention_flops(_area(s), _area(s), width) // 2,
            elements=lambda s, t: (channels + 6 * width + 3 * heads * _area(s)) * _area(s),
            shape=lambda s, t: (heads, _area(s), _area(s)),
            optional=True,
        ),
        Step(
            f"{prefix}-self",
            level,
            attend,
            flops=lambda s, t: attention_flops(_area(s), _area(s), width) + linear_flops(attn.to_out[0], _area(s)),
            elements=lambda s, t: (channels + 8 * width) * _area(s),
        ),
    ]


def cross_attention_steps(block: Any, prefix: str, level: int, channels: int) -> list[Step]:
    """``cross-q``, ``cross-map``, and the attention itself, which answers the score id ``…-cross``."""
    attn = block.attn2
    heads, width = attn.heads, attn.inner_dim
    name = f"{prefix}-cross"

    def query(state: State, want: Want) -> Taken:
        q = state.live["q"] = attn.to_q(block.norm2(state.live["x"]))
        return Taken(grid(q, state.sizes[level]))

    def attention_map(state: State, want: Want) -> Taken:
        q, text = state.live["q"], _text(state)
        texts = _text_index(state, q)
        k = text.k[name][texts]
        bias = text_bias(k.shape[1], text.lengths, text.key_bias, texts, torch.float32)
        logits = attention_logits(q, k, bias, heads, attn.scale)
        return Taken(probabilities(logits, torch.logsumexp(logits, dim=-1)).to(q.dtype))

    def attend(state: State, want: Want) -> Taken:
        q, text = state.live.pop("q"), _text(state)
        maps = score = None
        if want.maps:
            assert state.map_tokens is not None
            maps = token_maps(
                q, text.k[name], state.map_tokens, _text_index(state, q), text.lengths, text.key_bias, heads, attn.scale
            )
            maps = maps.view(*maps.shape[:2], *state.sizes[level])
        if want.score or not want.last:
            o, score = cross_attention_score(
                q,
                text.k[name],
                None if want.last else text.v[name],
                heads=heads,
                text_index=state.text_index,
                text_length=text.lengths,
                key_bias=text.key_bias,
                score_mask=text.score_mask if want.score else None,
                scale=attn.scale,
                mean=not want.score or want.pool == "mean",
            )
            if o is not None:
                state.live["x"] = _project_out(attn, o) + state.live["x"]
            score = _pool(score, want.pool) if want.score else None
        return Taken(score=score, maps=maps)

    return [
        Step(
            f"{prefix}-cross-q",
            level,
            query,
            flops=lambda s, t: linear_flops(attn.to_q, _area(s)),
            elements=lambda s, t: (2 * channels + 3 * width) * _area(s),
            shape=lambda s, t: (width, *s),
        ),
        Step(
            f"{prefix}-cross-map",
            level,
            attention_map,
            flops=lambda s, t: attention_flops(_area(s), t, width) // 2,
            elements=lambda s, t: (2 * channels + 3 * width + 4 * heads * t) * _area(s),
            shape=lambda s, t: (heads, _area(s), t),
            reads_text=True,
            optional=True,
        ),
        Step(
            name,
            level,
            attend,
            flops=lambda s, t: attention_flops(_area(s), t, width) + linear_flops(attn.to_out[0], _area(s)),
            elements=lambda s, t: (2 * channels + 5 * width + heads) * _area(s),
            score=True,
            reads_text=True,
            heads=heads,
        ),
    ]


def feed_forward_steps(block: Any, prefix: str, level: int, channels: int) -> list[Step]:
    """``ffn-inner`` (after GEGLU) and the block's output."""
    ff = block.ff
    inner = base_layer(ff.net[2]).in_features

    def gate(state: State, want: Want) -> Taken:
        g = state.live["g"] = ff.net[0](block.norm3(state.live["x"]))
        return Taken(grid(g, state.sizes[level]))

    def out(state: State, want: Want) -> Taken:
        g = state.live.pop("g")
        for layer in ff.net[1:]:
            g = layer(g)
        x = state.live["x"] = g + state.live["x"]
        return Taken(grid(x, state.sizes[level]))

    return [
        Step(
            f"{prefix}-ffn-inner",
            level,
            gate,
            flops=lambda s, t: linear_flops(ff.net[0].proj, _area(s)),
            elements=lambda s, t: (3 * channels + 4 * inner) * _area(s),
            shape=lambda s, t: (inner, *s),
        ),
        Step(
            f"{prefix}-out",
            level,
            out,
            flops=lambda s, t: linear_flops(ff.net[2], _area(s)),
            elements=lambda s, t: (4 * channels + 2 * inner) * _area(s),
            shape=lambda s, t: (channels, *s),
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
        elements=lambda s, t: (4 * module.channels + channels) * _area(s),
        shape=lambda s, t: (channels, *s),
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
        x = state.live["x"] = module(state.live["x"], state.sizes[level])
        return Taken(x)

    return Step(
        name,
        level,
        run,
        flops=lambda s, t: conv_flops(module.conv, s),
        elements=lambda s, t: (3 * channels) * _area(s),
        shape=lambda s, t: (channels, *s),
    )


def mid_residual_step(level: int) -> Step:
    """Adds a ControlNet's middle residual; nothing without one."""

    def run(state: State, want: Want) -> Taken:
        if state.residuals is not None:
            state.expand()
            state.live["x"] = state.live["x"] + state.residuals[1]
        return Taken()

    return Step("mid-residual", level, run, flops=lambda s, t: 0, elements=lambda s, t: 0)


def _text(state: State) -> Any:
    assert state.text is not None
    return state.text


def _text_index(state: State, q: Tensor) -> Tensor:
    return torch.arange(len(q), device=q.device) if state.text_index is None else state.text_index


def _project_out(attn: Any, x: Tensor) -> Tensor:
    for layer in attn.to_out:
        x = layer(x)
    return x if attn.rescale_output_factor == 1.0 else x / attn.rescale_output_factor


def _pool(score: Tensor, pool: str | float) -> Tensor:
    """(B, H, L) → (B, H); a temperature τ pools as τ·log mean exp(score/τ), between the mean and the maximum."""
    if pool == "mean":
        return score
    if pool == "max":
        return score.amax(-1)
    temperature = float(pool)
    count = torch.log(torch.tensor(float(score.shape[-1])))
    return temperature * (torch.logsumexp(score / temperature, dim=-1) - count.to(score))
