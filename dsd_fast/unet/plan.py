"""A cut that can be run: under its adapters, whole or in micro-batches, as it is or compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, overload

import torch
from torch import Tensor

from dsd_fast.kernels.common.library import traced
from dsd_fast.unet import checks
from dsd_fast.unet.adapters import AdapterScope
from dsd_fast.unet.checks import Index, Residuals
from dsd_fast.unet.cost import Memory, flops_by_step
from dsd_fast.unet.cut import Cut
from dsd_fast.unet.execution import collect, run_eager
from dsd_fast.unet.network import Network
from dsd_fast.unet.output import Output
from dsd_fast.unet.request import Request
from dsd_fast.unet.runtime import Runtime, make_runtime
from dsd_fast.unet.step import Taken
from dsd_fast.unet.stream import micro_batches, rows_at_once
from dsd_fast.unet.text import TextKV

HOST = torch.device("cpu")


class Plan(Cut):
    """Made by :meth:`UNetProgram.plan`; see there for the arguments, and :class:`Cut` for the other attributes.

    Attributes:
        runtime: the name given to :meth:`compile`, or None.
    """

    def __init__(
        self,
        network: Network,
        features: tuple[str, ...],
        scores: tuple[str, ...],
        maps: tuple[str, ...],
        noise_pred: bool,
        pool: str | float,
        enter: str | None,
        adapter: str | Sequence[str] | None,
    ) -> None:
        super().__init__(network, features, scores, maps, noise_pred, pool, enter)
        self._adapter = AdapterScope(network.module, adapter)
        self.runtime: str | None = None
        self._runtime: Runtime | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as the same plan, compiled for the same runtime, of a copy of the program."""
        return _planned, (self.network, self._cut(), self._adapter, self.runtime)

    def _cut(self) -> tuple[Any, ...]:
        return self.features, self.scores, self.maps, self.noise_pred, self.pool, self.enter

    @property
    def program(self) -> Network:
        """The network that is cut."""
        return self.network

    @property
    def compiled(self) -> bool:
        """Whether runs are computed in buckets, as compiled runtimes do."""
        return self.runtime is not None

    @property
    def adapter(self) -> tuple[str, ...] | None:
        """The adapters active during the plan's calls; None: those active on the network at each call."""
        return self._adapter.names

    def active(self) -> AbstractContextManager[None]:
        """Inside the ``with`` block the network is under the plan's adapters; threads that want others wait."""
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
        self._runtime, self.runtime = make_runtime(runtime, self.network.device), runtime
        return self

    def bare(self) -> Plan:
        """Give this plan as it runs without a compiled runtime."""
        return self if self._runtime is None else _planned(self.network, self._cut(), self._adapter, None)

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
        self.network.check()
        bias, mask, length = checks.states(self.network, states, pooled, key_bias, score_mask, lengths)
        with self._adapter.active():
            return TextKV(
                k={name: self.network.attention(name).to_k(states) for name in self.key_layers},
                v={name: self.network.attention(name).to_v(states) for name in self.value_layers},
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
        timestep_cond: Tensor | None = None,
        time_ids: Tensor | None = None,
        residuals: Residuals | None = None,
        kept: Tensor | None = None,
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
            timestep_cond: (P, E) or (E,) guidance embeddings (:func:`dsd_fast.diffusion.guidance_embedding`) for a
                network that reads them (LCM); None leaves them out, as diffusers does.
            time_ids: (P, 6) or (6,) original size, crop and target size in pixels (SDXL).
            residuals: a ControlNet's (down, mid) residuals, one row per requested row.
            kept: (B, C, h, w), for a plan that enters the network after its start: what :attr:`Output.features` of
                ``enter`` were, of an earlier run of the same latents, texts and rows.
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
        if traced():
            checks.not_checkpointed(checkpoint)
        else:
            self.network.check()
            checkpoint = checkpoint or (torch.is_grad_enabled() and self.network.checkpointing)
        with self._adapter.active():
            rows = (latent_index, text_index, timestep_cond, time_ids, residuals, map_tokens)
            return self._answer(Request(self, latents, timesteps, text, *rows, kept=kept, checkpoint=checkpoint), out)

    @overload
    def stream(
        self,
        latents: Tensor,
        timesteps: Tensor | Sequence[int] | int,
        text: TextKV | None,
        *,
        latent_index: Index | None = None,
        text_index: Index | None = None,
        timestep_cond: Tensor | None = None,
        time_ids: Tensor | None = None,
        residuals: Residuals | None = None,
        kept: Tensor | None = None,
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
        timestep_cond: Tensor | None = None,
        time_ids: Tensor | None = None,
        residuals: Residuals | None = None,
        kept: Tensor | None = None,
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
        timestep_cond: Tensor | None = None,
        time_ids: Tensor | None = None,
        residuals: Residuals | None = None,
        kept: Tensor | None = None,
        map_tokens: Tensor | Sequence[int] | None = None,
        out: Output | None = None,
        memory_budget: int | None = None,
    ) -> Output | Iterator[tuple[Tensor, Output]]:
        """:meth:`run` for any number of rows, split by a memory budget; no gradients.

        Rows of one latent are kept together, so that what does not depend on the text is computed once. Latents,
        residuals and what is kept may lie in host memory; each micro-batch moves its own to the network's device. When
        the device runs out of memory the micro-batch is halved, once, with a warning.

        Args:
            memory_budget: bytes for activations and text keys together, and for the copy of the keys that a compiled
                runtime keeps; what "cudagraph" keeps of recordings for other buckets is not in it. None leaves
                activations what :func:`dsd_fast.unet.stream.default_budget` says, on a GPU at most 8 GiB, or the bytes
                of one row if those are more. All other arguments are those of :meth:`run`.

        Returns:
            ``out``, filled, if it is given; else an iterator of (rows, Output), ``rows`` (b,) int64 saying which
            requested rows the micro-batch answers.

        Raises:
            ValueError: as :meth:`run`, at the call; a budget too small for the texts and one row.
        """
        if out is not None:
            out.check_rows(len(latents) if latent_index is None else len(latent_index))
        self.network.check()
        # The arguments are checked here, so under the plan's adapters; each micro-batch switches to them itself.
        with self._adapter.active():
            rows = (latent_index, text_index, timestep_cond, time_ids, residuals, map_tokens)
            request = Request(self, latents, timesteps, text, *rows, kept=kept, device=HOST)
            tokens = request.index.tokens
            size = rows_at_once(
                self,
                *request.sizes[0],
                0 if text is None else text.tokens,
                keys=0 if text is None else self.text_bytes(text),
                map_tokens=0 if tokens is None else tokens.shape[1],
                residuals=sum(x[:1].nbytes for x in request.every_residual),
                memory_budget=memory_budget,
            )
        batches = micro_batches(request, size, self.network.device, self._run_rows)
        if out is None:
            return batches
        out.fill(batches)
        return out

    def _run_rows(self, request: Request) -> Output:
        """One micro-batch of a request that was checked: what may have changed since is checked again."""
        self.network.check()
        with self._adapter.active():
            checks.text(self, request.text)
            return self._answer(request, None)

    def _answer(self, request: Request, out: Output | None) -> Output:
        if self._runtime is None or not request.rows or self.network.weights.hooked():
            return run_eager(self, request).into(out)
        return self._runtime.run(self, request, out)

    def empty_output(self, rows: int, height: int, width: int, *, tokens: int = 77, map_tokens: int = 0) -> Output:
        """An uninitialised :class:`Output` for ``rows`` rows of (height, width) latents, on the network's device."""
        dtype, device = self.network.dtype, self.network.device
        sizes = self.network.sizes(height, width)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        result = Output()
        for step, want in zip(self.steps, self.wants, strict=True):
            size = sizes[step.level]
            feature = score = drawn = None
            if want.feature and step.shape is not None:
                feature = torch.empty((rows, *step.shape(size, tokens)), dtype=dtype, device=device)
            if want.score:
                score = torch.empty((rows, step.heads), dtype=real, device=device)
            if want.maps:
                drawn = torch.empty((rows, step.keys(size, map_tokens), *size), dtype=real, device=device)
            collect(self, result, ((step, want),), [Taken(feature, score, drawn)])
        if self.noise_pred and self.network.output_id in result.features and result.noise_pred is not None:
            # Two results, though one step gives both.
            result.noise_pred = torch.empty_like(result.noise_pred)
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
            return flops_by_step(self, latents, texts, rows, self.network.sizes(height, width), tokens)

    def run_bytes(self, rows: int, height: int, width: int, tokens: int, *, map_tokens: int = 0) -> int:
        """Bytes alive at the peak of a run of ``rows`` rows, weights and text keys aside (an upper estimate)."""
        return Memory(self, self.network.sizes(height, width), tokens, map_tokens).of(rows)

    def room(self, available: int) -> int:
        return available if self._runtime is None else self._runtime.room(available)

    def text_bytes(self, text: TextKV) -> int:
        """Bytes of ``text`` and of the copy that a compiled runtime keeps beside it."""
        if self._runtime is None:
            return text.nbytes
        return text.nbytes + self._runtime.held(text.narrowed(self.key_layers, self.value_layers))


def _planned(network: Network, cut: tuple[Any, ...], adapter: AdapterScope, runtime: str | None) -> Plan:
    features, scores, maps, noise_pred, pool, enter = cut
    plan = Plan(network, features, scores, maps, noise_pred, pool, enter, None)
    plan._adapter = adapter
    return plan if runtime is None else plan.compile(runtime)
