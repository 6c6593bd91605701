"""A cut through the program: which steps run, what is tapped, and the run itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from dsd_fast.unet import checks
from dsd_fast.unet.adapters import AdapterScope, Signature, signature
from dsd_fast.unet.checks import Index, Residuals
from dsd_fast.unet.cost import flops_by_step, run_bytes
from dsd_fast.unet.execution import regions, run_eager
from dsd_fast.unet.output import Output
from dsd_fast.unet.request import Request
from dsd_fast.unet.runtime import Runtime, make_runtime
from dsd_fast.unet.step import Step, Want
from dsd_fast.unet.stream import stream
from dsd_fast.unet.text import TextKV

if TYPE_CHECKING:
    from dsd_fast.unet.program import UNetProgram


class Plan:
    """Made by :meth:`UNetProgram.plan`; see there for the arguments.

    Attributes:
        steps: the steps that run, in order.
        wants: what is taken from each of them.
        features, scores, maps, noise_pred, pool: what was asked for.
        boundary: how many of the steps do not depend on the text and run once per noised latent.
        kept_skips: numbers of the skip connections that a step uses; no other is kept.
        reads_time: whether a step reads the time embedding.
        key_layers, value_layers: score ids whose keys, and whose values, the steps read.
        regions: the steps again, in the parts that a runtime compiles.
        runtime: the name given to :meth:`compile`, or None.
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
        self.wants = tuple(
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
        self.regions = regions(self.steps, self.wants)
        self.runtime: str | None = None
        self._runtime: Runtime | None = None
        self.kept_skips = frozenset(range(pushes - pops, pushes))
        ran = {step.name for step in self.steps}
        self.reads_time = any(name in ran for name, _ in program.time_blocks)
        layers = (step.layer for step in self.steps if step.layer is not None)
        self.key_layers: tuple[str, ...] = tuple(dict.fromkeys(layers))
        cross = [step.name for step in self.steps if step.score]
        self.value_layers: tuple[str, ...] = tuple(cross[:-1] if self.steps[-1].score else cross)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """The same plan, compiled for the same runtime, of a copy of the program."""
        program = copy.deepcopy(self.program, memo)
        copied = Plan(program, self.features, self.scores, self.maps, self.noise_pred, self.pool, None)
        memo[id(self)] = copied
        copied._adapter = copy.deepcopy(self._adapter, memo)
        return copied if self.runtime is None else copied.compile(self.runtime)

    @property
    def adapter(self) -> tuple[str, ...] | None:
        """The adapters active during the plan's calls; None: those active on the network at each call."""
        return self._adapter.names

    def active(self) -> AbstractContextManager[None]:
        """Inside the ``with`` block the network is under the plan's adapters."""
        return self._adapter.active()

    def compile(self, runtime: str = "inductor") -> Plan:
        """From now on :meth:`run` and :meth:`stream` take a compiled runtime; the plan itself, for chaining.

        "inductor" compiles each block of the network by itself, blocks of equal structure once. "cudagraph" records
        runs of those as CUDA graphs and replays them; what it answers is copied out, and where gradients are wanted it
        runs as "inductor" does. Both compute P, M and B rounded up to a bucket
        (:func:`dsd_fast.unet.request.bucket`) and compile at the first request of a bucket, of other latent sizes or
        another number of tokens. While a module has a hook or a forward of its own, runs are not compiled.

        Raises:
            ValueError: an unknown runtime; "cudagraph" with a network that is not on a CUDA device.
        """
        self._runtime, self.runtime = make_runtime(self, runtime), runtime
        return self

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
        self.program.check()
        bias, mask, length = checks.states(self, states, pooled, key_bias, score_mask, lengths)
        with self._adapter.active():
            return TextKV(
                k={name: self.program.attention(name).to_k(states) for name in self.key_layers},
                v={name: self.program.attention(name).to_v(states) for name in self.value_layers},
                count=len(states),
                tokens=states.shape[1],
                lengths=length,
                key_bias=bias,
                score_mask=mask,
                pooled=pooled,
                signature=self.signatures(),
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
        checkpoint: bool = False,
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
            checkpoint: where gradients are wanted, drop the activations of each region (a residual block, a transformer
                block) and compute them again in the backward pass: the same gradients, more slowly, in the memory of
                one region's activations and of what travels between regions. ``unet.enable_gradient_checkpointing()``
                asks for it at every call.

        Raises:
            ValueError: an argument that does not fit, by name; a text encoded under another adapter.
            RuntimeError: in the backward pass of a run with ``checkpoint``, when a weight was written to, or an adapter
                was added, deleted, fused or unfused since the run.
        """
        if torch.compiler.is_compiling():
            checks.not_checkpointed(checkpoint)
        else:
            self.program.check()
            checkpoint = checkpoint or self.program.checkpointing
        with self._adapter.active():
            request = self._request(
                latents, timesteps, text, latent_index, text_index, time_ids, residuals, map_tokens, checkpoint
            )
            if self._runtime is None or not request.rows or self.program.weights.hooked():
                return run_eager(self, request).into(out)
            return self._runtime.run(self, request, out)

    @overload
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
        out: None = None,
        memory_budget: int | None = None,
    ) -> Iterator[tuple[Tensor, Output]]: ...

    @overload
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
        out: Output,
        memory_budget: int | None = None,
    ) -> Output: ...

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
    ) -> Output | Iterator[tuple[Tensor, Output]]:
        """:meth:`run` for any number of rows, split by a memory budget; no gradients.

        Rows of one latent are kept together, so that what does not depend on the text is computed once. Latents and
        residuals may lie in host memory; each micro-batch moves its own to the network's device. When the device runs
        out of memory the micro-batch is halved, once, with a warning.

        Args:
            memory_budget: bytes for activations and text keys together, and for the copy of the keys that a compiled
                runtime keeps; what "cudagraph" keeps of recordings for other buckets is not in it. None leaves
                activations what :func:`dsd_fast.unet.stream.default_budget` says, or the bytes of one row if those are
                more. All other arguments are those of :meth:`run`.

        Returns:
            ``out``, filled, if it is given; else an iterator of (rows, Output), ``rows`` (b,) int64 saying which
            requested rows the micro-batch answers.

        Raises:
            ValueError: as :meth:`run`, at the call; a budget too small for the texts and one row.
        """
        if out is not None:
            out.check_rows(len(latents) if latent_index is None else len(latent_index))
        # The arguments are checked here, so under the plan's adapters; each micro-batch switches to them itself.
        with self._adapter.active():
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
        dtype, device = self.program.dtype, self.program.device
        sizes = self.program.sizes(height, width)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        result = Output()
        for step, want in zip(self.steps, self.wants, strict=True):
            size = sizes[step.level]
            if want.feature and step.shape is not None:
                value = torch.empty((rows, *step.shape(size, tokens)), dtype=dtype, device=device)
                if step.name in self.features:
                    result.features[step.name] = value
                if step.name == "unet-out" and self.noise_pred:
                    result.noise_pred = value if step.name not in self.features else torch.empty_like(value)
            if want.score:
                result.scores[step.name] = torch.empty((rows, step.heads), dtype=real, device=device)
            if want.maps:
                count = step.keys(size, map_tokens)
                result.maps[step.name] = torch.empty((rows, count, *size), dtype=real, device=device)
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
        with self._adapter.active():
            return flops_by_step(self, latents, texts, rows, self.program.sizes(height, width), tokens)

    def run_bytes(self, rows: int, height: int, width: int, tokens: int, *, map_tokens: int = 0) -> int:
        """Bytes alive at the peak of a run of ``rows`` rows, weights and text keys aside (an upper estimate)."""
        return run_bytes(self, rows, self.program.sizes(height, width), tokens, map_tokens)

    def text_bytes(self, text: TextKV) -> int:
        """Bytes of ``text`` and of the copy that a compiled runtime keeps beside it."""
        if self._runtime is None:
            return text.nbytes
        return text.nbytes + self._runtime.held(text.narrowed(self.key_layers, self.value_layers))

    def signatures(self) -> dict[str, Signature]:
        """What adapters do now to the key and value projections of each layer whose keys the plan reads."""
        modules = {name: self.program.attention(name) for name in self.key_layers}
        return {name: signature([module.to_k, module.to_v]) for name, module in modules.items()}

    def _request(
        self,
        latents: Tensor,
        timesteps: Tensor | Sequence[int] | int,
        text: TextKV | None,
        latent_index: Index | None,
        text_index: Index | None,
        time_ids: Tensor | None,
        residuals: Residuals | None,
        map_tokens: Tensor | Sequence[int] | None,
        checkpoint: bool,
    ) -> Request:
        checks.latents(self, latents)
        device, count = latents.device, len(latents)
        latent_rows = None if latent_index is None else checks.index("latent_index", latent_index, None, count, device)
        rows = count if latent_rows is None else len(latent_rows)
        text_rows = checks.text(self, text, text_index, rows, device)
        return Request(
            rows=rows,
            latents=latents.contiguous(memory_format=torch.channels_last),
            times=checks.timesteps(timesteps, count, device),
            text=None if text is None else text.narrowed(self.key_layers, self.value_layers),
            latent_index=latent_rows,
            text_index=text_rows,
            time_ids=checks.time_ids(self, time_ids, count, device),
            residuals=checks.residuals(self, residuals, rows, self.program.sizes(*latents.shape[-2:])),
            map_tokens=checks.map_tokens(self, map_tokens, rows, text, device),
            checkpoint=checkpoint,
        )
