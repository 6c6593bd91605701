"""A cut through the program: which steps run, what is tapped, and the run itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsd_fast.unet.adapters import AdapterScope, signature
from dsd_fast.unet.flops import linear_flops
from dsd_fast.unet.step import State, Step, Taken, Want
from dsd_fast.unet.text import TextKV

if TYPE_CHECKING:
    from dsd_fast.unet.program import UNetProgram

Index = Sequence[int] | Tensor
Residuals = tuple[Sequence[Tensor], Tensor]


@dataclass
class Output:
    """What a plan answers, one entry per requested row.

    Attributes:
        features: layer id → (B, C, h, w) in the network's type; a ``…-map`` id → (B, H, L, T).
        scores: score id → (B, H) float32, natural logarithm.
        maps: score id → (B, n, h, w) float32, probabilities averaged over heads.
        noise_pred: (B, C, h, w), the model's output as diffusers gives it (v for v-models), or None.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    noise_pred: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors with a name each, in a fixed order."""
        for kind in ("features", "scores", "maps"):
            for name, value in getattr(self, kind).items():
                yield f"{kind}[{name}]", value
        if self.noise_pred is not None:
            yield "noise_pred", self.noise_pred

    def fill(self, other: Output, rows: Tensor | slice) -> None:
        """Copy ``other`` into the rows ``rows`` of this one."""
        for (name, target), (given, value) in zip(self.tensors(), other.tensors(), strict=True):
            if name != given or target.shape[1:] != value.shape[1:]:
                raise ValueError(
                    f"out: {name} {tuple(target.shape)} cannot hold {given} {tuple(value.shape)} of this plan"
                )
            target[rows] = value.to(target.device, target.dtype)


class Plan:
    """Made by :meth:`UNetProgram.plan`; see there for the arguments.

    Attributes:
        steps: the steps that run, in order.
        features, scores, maps, noise_pred, pool: what was asked for.
        boundary: how many of the steps do not depend on the text and run once per noised latent.
    """

    def __init__(
        self,
        program: UNetProgram,
        features: tuple[str, ...],
        scores: tuple[str, ...],
        maps: tuple[str, ...],
        noise_pred: bool,
        pool: str | float,
        adapter: str | Sequence[str] | None,
    ) -> None:
        self.program = program
        self.features, self.scores, self.maps = features, scores, maps
        self.noise_pred, self.pool = noise_pred, pool
        self._adapter = AdapterScope(program.unet, adapter)
        tapped = {*features, *scores, *maps, *(["unet-out"] if noise_pred else [])}
        end = max(i for i, step in enumerate(program.steps) if step.name in tapped)
        self.steps: tuple[Step, ...] = tuple(
            step for step in program.steps[: end + 1] if not step.optional or step.name in features
        )
        self._wants = tuple(
            Want(
                feature=step.name in features or (noise_pred and step.name == "unet-out"),
                score=step.name in scores,
                maps=step.name in maps,
                last=step is self.steps[-1],
                pool=pool,
            )
            for step in self.steps
        )
        self.boundary = next((i for i, step in enumerate(self.steps) if step.reads_text), len(self.steps))
        pushes = sum(1 for step in program.steps if step.pushes)
        pops = sum(1 for step in self.steps if step.pops)
        self._keep = frozenset(range(pushes - pops, pushes))
        self.text_layers: tuple[str, ...] = tuple(step.name for step in self.steps if step.score)
        self._mapped = tuple(step.name for step in self.steps if step.name.endswith("-cross-map"))

    @property
    def adapter(self) -> tuple[str, ...] | None:
        """The adapters active during the plan's calls; None: those active on the network at each call."""
        return self._adapter.names

    def encode_text(
        self,
        states: Tensor,
        pooled: Tensor | None = None,
        key_bias: Tensor | None = None,
        score_mask: Tensor | None = None,
        lengths: Index | None = None,
    ) -> TextKV:
        """Project texts to the keys and values of the layers this plan runs, once per text. Differentiable.

        Args:
            states: (M, T, E) text-encoder states in the network's type.
            pooled: (M, E') pooled states, for networks that read them (SDXL).
            key_bias: (M, T) float32 added to the logits: −inf masks a key, log n counts it n times.
            score_mask: (M, T) bool, the keys that count in scores; the outputs attend to all.
            lengths: (M,) real lengths; keys beyond are neither attended to nor scored.

        Raises:
            ValueError: a shape or type that does not fit, by name.
        """
        unet = self.program.unet
        self.program.check()
        width = unet.config.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        if states.ndim != 3 or states.shape[2] != width:
            raise ValueError(f"states: got {tuple(states.shape)}, expected (M, T, {width})")
        self._check_type("states", states)
        count, tokens = states.shape[:2]
        if self.program.reads_pooled_text and (pooled is None or pooled.ndim != 2 or len(pooled) != count):
            got = None if pooled is None else tuple(pooled.shape)
            raise ValueError(f"pooled: got {got}, expected ({count}, E): this network reads pooled text states")
        device = states.device
        length = None
        if lengths is not None:
            length = _index("lengths", lengths, count, tokens + 1, device)
        for name, value, dtype in (("key_bias", key_bias, None), ("score_mask", score_mask, torch.bool)):
            if value is not None and (value.shape != (count, tokens) or (dtype and value.dtype != dtype)):
                raise ValueError(
                    f"{name}: got {tuple(value.shape)} {value.dtype}, expected (M, T) = ({count}, {tokens})"
                    + (f" {dtype}" if dtype else "")
                )
        real = torch.float64 if states.dtype == torch.float64 else torch.float32
        k, v = {}, {}
        with self._adapter.active():
            for index, name in enumerate(self.text_layers):
                attention = self.program.attention(name)
                k[name] = attention.to_k(states)
                if index < len(self.text_layers) - 1 or not self._wants[-1].last or self.steps[-1].name != name:
                    v[name] = attention.to_v(states)
            for name in self._mapped:
                if name.removesuffix("-map") not in k:
                    k[name.removesuffix("-map")] = self.program.attention(name.removesuffix("-map")).to_k(states)
            signatures = self._signatures(k)
        return TextKV(
            k=k,
            v=v,
            count=count,
            tokens=tokens,
            lengths=length,
            key_bias=None if key_bias is None else key_bias.to(device, real),
            score_mask=None if score_mask is None else score_mask.to(device),
            pooled=pooled,
            signature=signatures,
        )

    def run(
        self,
        latents: Tensor,
        timesteps: Tensor | Sequence[int] | int,
        text: TextKV | None,
        *,
        latent_index: Index | None = None,
        text_index: Index | None = None,
        time_ids: Tensor | None = None,
        residuals: Residuals | None = None,
        map_tokens: Tensor | Sequence[int] | None = None,
        out: Output | None = None,
    ) -> Output:
        """One micro-batch: row b is latent ``latent_index[b]`` with text ``text_index[b]``.

        Differentiable; never splits.

        Args:
            latents: (P, C, h, w) noised latents in the network's type.
            timesteps: (P,) or one for all.
            text: M texts encoded by this plan or one with the same layers; None if no step of the plan reads text.
            latent_index, text_index: (B,); without them B = P and B = M.
            time_ids: (P, 6) or (6,) original size, crop and target size in pixels (SDXL).
            residuals: a ControlNet's (down, mid) residuals, one row per requested row.
            map_tokens: (n,) or (B, n) token positions for ``maps``.
            out: an :class:`Output` to fill and return.

        Raises:
            ValueError: an argument that does not fit, by name; a text encoded under another adapter.
        """
        if not torch.compiler.is_compiling():
            self.program.check()
        with self._adapter.active():
            result = self._run(latents, timesteps, text, latent_index, text_index, time_ids, residuals, map_tokens)
        if out is None:
            return result
        out.fill(result, slice(None))
        return out

    def stream(
        self,
        latents: Tensor,
        timesteps: Tensor | Sequence[int] | int,
        text: TextKV | None,
        *,
        latent_index: Index | None = None,
        text_index: Index | None = None,
        time_ids: Tensor | None = None,
        residuals: Residuals | None = None,
        map_tokens: Tensor | Sequence[int] | None = None,
        out: Output | None = None,
        memory_budget: int | None = None,
    ) -> Any:
        """:meth:`run` for any number of rows, split by a memory budget; no gradients.

        Rows of one latent are kept together, so that what does not depend on the text is computed once. Latents may
        lie in host memory; each micro-batch moves its own to the network's device. When the device runs out of
        memory the micro-batch is halved, once, with a warning.

        Args:
            memory_budget: bytes for activations and text keys together; None takes
                :func:`dsd_fast.unet.stream.default_budget`. All other arguments are those of :meth:`run`.

        Returns:
            ``out``, filled, if it is given; else an iterator of (rows, Output), ``rows`` (b,) int64 saying which
            requested rows the micro-batch answers.

        Raises:
            ValueError: as :meth:`run`; a budget too small for the texts and one row.
        """
        from dsd_fast.unet.stream import stream

        batches = stream(
            self, latents, timesteps, text, latent_index, text_index, time_ids, residuals, map_tokens, memory_budget
        )
        if out is None:
            return batches
        for rows, result in batches:
            out.fill(result, rows)
        return out

    def empty_output(self, rows: int, height: int, width: int, *, tokens: int = 77, map_tokens: int = 0) -> Output:
        """An uninitialised :class:`Output` for ``rows`` rows of (height, width) latents, on the network's device."""
        unet, sizes = self.program.unet, self.program.sizes(height, width)
        result = Output()
        for step, want in zip(self.steps, self._wants, strict=True):
            size = sizes[step.level]
            if want.feature and step.shape is not None:
                value = torch.empty((rows, *step.shape(size, tokens)), dtype=unet.dtype, device=unet.device)
                if step.name in self.features:
                    result.features[step.name] = value
                if step.name == "unet-out" and self.noise_pred:
                    result.noise_pred = value if step.name not in self.features else torch.empty_like(value)
            if want.score:
                result.scores[step.name] = torch.empty((rows, step.heads), device=unet.device)
            if want.maps:
                result.maps[step.name] = torch.empty((rows, map_tokens, *size), device=unet.device)
        return result

    def flops(self, *, latents: int, texts: int, rows: int, height: int, width: int, tokens: int) -> int:
        """FLOPs (two per multiply-add) of :meth:`encode_text` for ``texts`` texts and one :meth:`run`.

        Args:
            latents, texts, rows: P, M, B.
            height, width: of the latents.
            tokens: T.
        """
        table = self.flops_by_step(latents=latents, texts=texts, rows=rows, height=height, width=width, tokens=tokens)
        return sum(table.values())

    def flops_by_step(
        self, *, latents: int, texts: int, rows: int, height: int, width: int, tokens: int
    ) -> dict[str, int]:
        """:meth:`flops` apart: ``text``, ``time``, and each step by name."""
        sizes = self.program.sizes(height, width)
        with self._adapter.active():
            table = {"text": self._text_flops(texts, tokens), "time": self._time_flops(latents, rows)}
            for index, (step, want) in enumerate(zip(self.steps, self._wants, strict=True)):
                count = latents if index < self.boundary else rows
                if step.score and want.last:
                    # Without the output only q kᵀ is left: half of the attention's products, no projection.
                    attention = self.program.attention(step.name)
                    area = sizes[step.level][0] * sizes[step.level][1]
                    table[step.name] = count * 2 * area * tokens * attention.inner_dim * max(1, want.score + want.maps)
                else:
                    table[step.name] = count * step.flops(sizes[step.level], tokens)
        return table

    def row_bytes(self, height: int, width: int, tokens: int, *, map_tokens: int = 0) -> int:
        """Bytes of activations that one row needs at the plan's peak, its outputs included (an upper estimate)."""
        sizes = self.program.sizes(height, width)
        config = self.program.unet.config
        areas = [h * w for h, w in sizes]
        # The row's latents and time embedding live as long as the run.
        held = config.in_channels * areas[0] + 4 * 4 * config.block_out_channels[0]
        kept = pushed = peak = 0
        stack: list[int] = []
        for step, want in zip(self.steps, self._wants, strict=True):
            if step.pops and stack:
                held -= stack.pop()
            peak = max(peak, held + kept + step.elements(sizes[step.level], tokens))
            if step.pushes:
                if pushed in self._keep:
                    stack.append(step.pushes * areas[step.level])
                    held += stack[-1]
                pushed += 1
            if want.feature and step.shape is not None:
                kept += _product(step.shape(sizes[step.level], tokens))
            kept += 2 * (step.heads if want.score else 0)
            kept += 2 * map_tokens * areas[step.level] if want.maps else 0
        return int((peak + kept) * self.program.unet.dtype.itemsize)

    def _run(
        self,
        latents: Tensor,
        timesteps: Tensor | Sequence[int] | int,
        text: TextKV | None,
        latent_index: Index | None,
        text_index: Index | None,
        time_ids: Tensor | None,
        residuals: Residuals | None,
        map_tokens: Tensor | Sequence[int] | None,
    ) -> Output:
        channels = self.program.unet.config.in_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents: got {tuple(latents.shape)}, expected (P, {channels}, h, w)")
        self._check_type("latents", latents)
        device, count = latents.device, len(latents)
        times = _times(timesteps, count, device)
        latent_rows = None if latent_index is None else _index("latent_index", latent_index, None, count, device)
        rows = count if latent_rows is None else len(latent_rows)
        text_rows = self._check_text(text, text_index, rows, device)
        if text_index is not None and latent_index is None and text_rows is not None and len(text_rows) != rows:
            raise ValueError(f"text_index: got {len(text_rows)} rows, latents have {rows}")
        state = State(
            sample=latents,
            embedding=latents,
            latent_index=latent_rows,
            text_index=text_rows,
            text=text,
            sizes=self.program.sizes(*latents.shape[-2:]),
            keep=self._keep,
            residuals=self._check_residuals(residuals, rows),
            map_tokens=self._check_map_tokens(map_tokens, rows, text, device),
        )
        self._embed(state, times, time_ids)
        result = Output()
        for step, want in zip(self.steps, self._wants, strict=True):
            if step.reads_text:
                state.expand()
            self._collect(result, step, want, step.run(state, want), state)
        return result

    def _collect(self, result: Output, step: Step, want: Want, taken: Taken, state: State) -> None:
        if want.feature:
            assert taken.feature is not None
            value = state.rows(taken.feature, state.expanded)
            if step.name in self.features:
                result.features[step.name] = value
            if step.name == "unet-out" and self.noise_pred:
                result.noise_pred = value
        if taken.score is not None:
            result.scores[step.name] = taken.score
        if taken.maps is not None:
            result.maps[step.name] = taken.maps

    def _embed(self, state: State, times: Tensor, time_ids: Tensor | None) -> None:
        unet = self.program.unet
        embedding = unet.time_embedding(unet.time_proj(times).to(state.sample.dtype))
        if self.program.reads_pooled_text and self.boundary < len(self.steps):
            count = len(state.sample)
            if time_ids is None or time_ids.shape not in ((6,), (count, 6)):
                got = None if time_ids is None else tuple(time_ids.shape)
                raise ValueError(f"time_ids: got {got}, expected (6,) or ({count}, 6): this network reads image sizes")
            assert state.text is not None
            pooled = state.text.pooled
            assert pooled is not None
            pooled = pooled if state.text_index is None else pooled.index_select(0, state.text_index)
            ids = unet.add_time_proj(time_ids.to(embedding.device).expand(count, 6).flatten()).view(count, -1)
            added = torch.cat([pooled, state.rows(ids.to(pooled.dtype), False)], dim=-1).to(embedding.dtype)
            embedding = state.rows(embedding, False) + unet.add_embedding(added)
            state.embedding_expanded = True
        state.embedding = torch.nn.functional.silu(embedding)

    def _check_text(self, text: TextKV | None, index: Index | None, rows: int, device: torch.device) -> Tensor | None:
        if text is None:
            if self.boundary < len(self.steps):
                raise ValueError(f"text: needed by step {self.steps[self.boundary].name!r}")
            return None
        missing = [name for name in self.text_layers if name not in text.k]
        missing += [name for name in self.text_layers[:-1] if name in text.k and name not in text.v]
        if missing:
            raise ValueError(f"text: encoded by a plan that does not run {missing[0]!r}; use this plan's encode_text")
        if not torch.compiler.is_compiling():
            now = self._signatures(self.text_layers)
            given = text.signature or {}
            if any(given.get(name, now[name]) != now[name] for name in now):
                raise ValueError(
                    "text: encoded under another adapter than this call's; encode it again with this plan's encode_text"
                )
        if index is None:
            if len(text) != rows:
                raise ValueError(f"text_index: needed when there are {len(text)} texts for {rows} rows")
            return None
        return _index("text_index", index, rows, len(text), device)

    def _check_residuals(self, residuals: Residuals | None, rows: int) -> Residuals | None:
        if residuals is None:
            return None
        down, mid = residuals
        pushes = sum(1 for step in self.program.steps if step.pushes)
        if len(down) != pushes:
            raise ValueError(f"residuals: got {len(down)} down residuals, expected {pushes} and one for the middle")
        for value in (*down, mid):
            if len(value) != rows:
                raise ValueError(f"residuals: got {len(value)} rows, expected one per requested row, {rows}")
        return down, mid

    def _check_map_tokens(
        self, tokens: Tensor | Sequence[int] | None, rows: int, text: TextKV | None, device: torch.device
    ) -> Tensor | None:
        if not self.maps:
            return None
        if tokens is None or text is None:
            raise ValueError("map_tokens: needed for a plan with maps")
        chosen = torch.as_tensor(tokens)
        if chosen.ndim not in (1, 2) or (chosen.ndim == 2 and len(chosen) != rows):
            raise ValueError(f"map_tokens: got {tuple(chosen.shape)}, expected (n,) or ({rows}, n)")
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < text.tokens:
            raise ValueError(f"map_tokens: positions outside 0 to {text.tokens - 1}")
        return chosen.to(device, torch.int64).expand(rows, -1)

    def _check_type(self, name: str, value: Tensor) -> None:
        unet = self.program.unet
        if value.dtype != unet.dtype or value.device != unet.device:
            raise ValueError(
                f"{name}: got {value.dtype} on {value.device}, expected the network's {unet.dtype} on {unet.device}"
            )

    def _signatures(self, names: Any) -> dict[str, Any]:
        modules = {name: self.program.attention(name) for name in names}
        return {name: signature([module.to_k, module.to_v]) for name, module in modules.items()}

    def _text_flops(self, texts: int, tokens: int) -> int:
        total = 0
        for name in self.text_layers:
            attention = self.program.attention(name)
            total += linear_flops(attention.to_k, texts * tokens)
            if name != self.steps[-1].name:
                total += linear_flops(attention.to_v, texts * tokens)
        return total

    def _time_flops(self, latents: int, rows: int) -> int:
        unet, ran = self.program.unet, {step.name for step in self.steps}
        blocks = [block for name, block in self.program.time_blocks if name in ran]
        if not blocks:
            return 0
        made, read = unet.time_embedding, latents
        total = linear_flops(made.linear_1, latents) + linear_flops(made.linear_2, latents)
        if self.program.reads_pooled_text:
            added, read = unet.add_embedding, rows
            total += linear_flops(added.linear_1, rows) + linear_flops(added.linear_2, rows)
        return total + sum(linear_flops(block.time_emb_proj, read) for block in blocks)


def _times(timesteps: Tensor | Sequence[int] | int, count: int, device: torch.device) -> Tensor:
    times = torch.as_tensor(timesteps, device=device)
    if times.ndim > 1 or (times.ndim == 1 and len(times) != count):
        raise ValueError(f"timesteps: got {tuple(times.shape)}, expected one or ({count},)")
    return times.expand(count)


def _index(name: str, value: Index, count: int | None, limit: int, device: torch.device) -> Tensor:
    """Checked on the host before it is uploaded: a wrong index is an error here, never a fault of the device."""
    index = torch.as_tensor(value)
    if index.ndim != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
        raise ValueError(f"{name}: got {tuple(index.shape)} {index.dtype}, expected a list of integers")
    if count is not None and len(index) != count:
        raise ValueError(f"{name}: got {len(index)} entries, expected {count}")
    if not torch.compiler.is_compiling() and len(index):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name}: values from {low} to {high}, expected 0 to {limit - 1}")
    return index.to(device, torch.int64)


def _product(shape: Sequence[int]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result
