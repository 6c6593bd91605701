"""The model's output with gradients, for rows of any number, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsd_fast.engine.texts import Texts
from dsd_fast.kernels.common.host import as_tensor, own_types
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.unet import Plan
from dsd_fast.unet.checkpoint import Checkpoints
from dsd_fast.unet.stream import gradient_budget, rows_at_once


@dataclass(eq=False)
class Differentiable:
    """Rows of a plan, differentiable in the latents and in the texts' states; see :meth:`Engine.predict`.

    Rows go through the network in micro-batches. As many of a call as its share of the memory holds keep what their
    backward pass reads; the others keep their latents and are computed again there (Chen et al. 2016, "Training Deep
    Nets with Sublinear Memory Cost"), one micro-batch at a time. Those come first, because a backward pass begins with
    the last, so that nothing is held any more when they are computed again.

    Attributes:
        plan: the whole network.
        texts: of all rows.
        time_ids: SDXL's image sizes of (P, C, h, w) latents, see :meth:`Plan.run`.
        timestep_cond: see :meth:`Plan.run`.
        calls: that are differentiated together, which share the memory.
        checkpoint: compute all rows again.
        memory_budget: bytes; None: the device's default.
        known: what one row keeps, by what it depends on; filled.
    """

    plan: Plan
    texts: Texts
    time_ids: Callable[[Tensor], Tensor | None]
    timestep_cond: Tensor | None
    calls: int
    checkpoint: bool
    memory_budget: int | None
    known: dict[tuple[object, ...], int]
    _sizes: tuple[int, int, bool] | None = None

    def wanted(self, latents: Tensor, text_of: Tensor) -> Tensor:
        """Tell of (B,) texts which rows have a gradient: all if latents or weights want one, else of texts that do."""
        if latents.requires_grad or any(each.requires_grad for each in self.plan.network.module.parameters()):
            return torch.ones(len(text_of), dtype=torch.bool, device="cpu")
        plain = text_of == len(self.texts)
        own, absent = (_wants_gradient(each) for each in (self.texts.states, self.texts.unconditional))
        return (plain & absent) | (~plain & own)

    def rows(self, latents: Tensor, t: float | Tensor, text_of: Tensor, latent_of: Tensor) -> tuple[Tensor, Tensor]:
        """Predict for all rows: their numbers (B,), and the outputs in that order."""
        times = t if isinstance(t, Tensor) else as_tensor([t]).repeat(len(latents))
        with own_types(latents.device):
            size, held, by_region = self.sizes(latents, text_of[:1])
            # Rows of one latent side by side: what comes before the network reads a text is computed once for them.
            order = latent_of.argsort(stable=True)
            checkpointed = Checkpoints(self.plan.network).around(None)
            outputs = []
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                arguments = (latents, times, text_of[rows], latent_of[rows], by_region)
                again = len(order) - start > held
                outputs.append(checkpointed(self._run, *arguments) if again else self._run(*arguments))
        return order, torch.cat(outputs)

    def sizes(self, latents: Tensor, text_of: Tensor) -> tuple[int, int, bool]:
        """Tell rows of a micro-batch, rows that keep what is read again, and whether one by itself is too large.

        Args:
            latents: (P, C, h, w), of which the first is tried with the text (1,).
        """
        if self._sizes is None:
            memory = gradient_budget(latents.device) if self.memory_budget is None else self.memory_budget // 2
            height, width = latents.shape[-2:]
            at_once = rows_at_once(self.plan, height, width, self.texts.tokens, memory_budget=self.memory_budget)
            held = memory // self.calls // self._row_bytes(latents, text_of)
            self._sizes = max(1, min(at_once, held)), 0 if self.checkpoint else held, held < 1
        return self._sizes

    def _row_bytes(self, latents: Tensor, text_of: Tensor) -> int:
        """Bytes that one row keeps for its backward pass, as it is without a compiled runtime."""
        network = self.plan.network
        key = (latents.shape[1:], latents.dtype, self.texts.tokens, network.checkpointing)
        if key not in self.known:
            row = latents[:1].detach().requires_grad_()
            zero = torch.zeros(1, dtype=torch.int64, device="cpu")
            bare = replace(self, plan=self.plan.bare())
            self.known[key] = kept_bytes(lambda: bare._run(row, zero, text_of, zero, False), network.module)
        return self.known[key]

    def _run(self, latents: Tensor, times: Tensor, text_of: Tensor, latent_of: Tensor, by_region: bool) -> Tensor:
        used, latent = torch.unique(latent_of, return_inverse=True)
        texts, text = torch.unique(text_of, return_inverse=True)
        sizes, embedding = (
            each[used] if each is not None and each.ndim == 2 else each
            for each in (self.time_ids(latents), self.timestep_cond)
        )
        out = self.plan.run(
            latents[upload(used, latents.device)],
            times[used],
            self.texts.keys(self.plan, texts),
            latent_index=latent,
            text_index=text,
            time_ids=sizes,
            timestep_cond=embedding,
            checkpoint=by_region,
        )
        assert out.noise_pred is not None
        return out.noise_pred


def kept_bytes(compute: Callable[[], object], *modules: torch.nn.Module) -> int:
    """Count the bytes that autograd keeps of ``compute()`` for a backward pass, the modules' weights aside."""
    weights = {x.untyped_storage().data_ptr() for each in modules for x in (*each.parameters(), *each.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    del result
    return sum(storage.nbytes() for storage in kept.values())


def _wants_gradient(states: Any) -> bool:
    tensors: Iterable[Tensor | None] = () if states is None else (states.states, states.pooled)
    return any(each is not None and each.requires_grad for each in tensors)
