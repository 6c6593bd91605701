"""The model's output as samplers and inversions call for it: of the whole network, or of its shallow steps between."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from dsd_fast.engine.gradients import Differentiable
from dsd_fast.kernels.common.host import as_tensor
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.unet import Output, Plan

EVERY = slice(None)
# A group of texts takes a copy of its rows' of what is kept.
KEPT_COPIES = 2


class Send(Protocol):
    """:meth:`dsd_fast.engine.Engine.rows` for the texts and conditions of one request."""

    def __call__(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        *,
        text_of: Tensor,
        latent_of: Tensor,
        condition_of: Tensor | None,
        kept: Tensor | None,
        held: int,
    ) -> Iterator[tuple[Tensor, Output]]: ...


class Prediction:
    """Made by :meth:`dsd_fast.engine.Engine.predict`; see there.

    With a shallow plan the whole network runs at the first call, at every ``interval``-th after a whole run, where a
    row is asked for that the last whole run left out, and where a timestep is above the last, which begins another
    walk.

    Args:
        send: rows through a plan.
        text_of, latent_of, condition_of: of all rows, see :meth:`dsd_fast.engine.Engine.rows`.
        whole: the whole network's plan, which with a shallow plan gives the activation that is kept as well.
        shallow: a plan that enters the network with that activation, or None.
        interval: at most so many calls later the whole network runs again.
        differentiable: how rows are computed while gradients are on; None: without any, always.
    """

    def __init__(
        self,
        send: Send,
        text_of: Tensor,
        latent_of: Tensor | None,
        condition_of: Tensor | None,
        whole: Plan,
        shallow: Plan | None = None,
        interval: int = 1,
        differentiable: Differentiable | None = None,
    ) -> None:
        self._differentiable = differentiable
        self._send, self._whole, self._shallow, self._interval = send, whole, shallow, interval
        self._text_of, self._condition_of = text_of, condition_of
        self._latent_of = torch.arange(len(text_of), device="cpu") if latent_of is None else latent_of
        self._kept: Tensor | None = None
        # The rows whose activations the last whole run left, and how many calls ago that was.
        self._covered = range(0)
        self._age = 0
        self._last = math.inf

    def __call__(self, latents: Tensor, t: float | Tensor, part: slice = EVERY) -> Tensor:
        """Predict for P latents at one timestep.

        Args:
            latents: (P, C, h, w), of another floating type taken in the network's.
            t: the timestep; or (P,) on the CPU, one for each latent, where none keeps anything for the next call.
            part: which of the B rows; all by default.

        Returns:
            The output for each of those rows.
        """
        latents = latents.to(self._whole.network.dtype)
        if self._differentiable is not None and torch.is_grad_enabled():
            return self._with_gradients(self._differentiable, latents, t, part)
        with torch.no_grad():
            return self._without(latents, t, part)

    def _with_gradients(
        self, differentiable: Differentiable, latents: Tensor, t: float | Tensor, part: slice
    ) -> Tensor:
        every = torch.arange(len(self._text_of), device="cpu")[part]
        wanted = differentiable.wanted(latents, self._text_of[every])
        outputs, order = [], [every[wanted], every[~wanted]]
        if wanted.any():
            rows = order[0]
            found, output = differentiable.rows(latents, t, self._text_of[rows], self._latent_of[rows])
            order[0] = rows[found]
            outputs.append(output)
        if not wanted.all():
            with torch.no_grad():
                outputs.append(self._without(latents, t, order[1]))
        place = torch.cat(order).argsort()
        return torch.cat(outputs)[upload(place, latents.device)]

    def _without(self, latents: Tensor, t: float | Tensor, part: slice | Tensor) -> Tensor:
        result = latents.new_empty(len(self._text_of[part]), *latents.shape[1:])
        if self._shallow is None or isinstance(part, Tensor):
            self._fill(result, None, self._sent(self._whole, latents, t, part, None))
            return result
        assert isinstance(t, float | int)
        rows = range(len(self._text_of))[part]
        kept = self._buffer(latents)[part]
        covered = all(row in self._covered for row in rows)
        if covered and self._age < self._interval and t <= self._last:
            self._fill(result, None, self._sent(self._shallow, latents, t, part, kept))
        else:
            # Until all are filled nothing counts as kept: a run may be interrupted.
            self._covered = range(0)
            self._fill(result, kept, self._sent(self._whole, latents, t, part, None))
            self._covered, self._age = rows, 0
        self._age, self._last = self._age + 1, t
        return result

    def _sent(
        self, plan: Plan, latents: Tensor, t: float | Tensor, part: slice | Tensor, kept: Tensor | None
    ) -> Iterator[tuple[Tensor, Output]]:
        return self._send(
            plan,
            latents,
            t if isinstance(t, Tensor) else as_tensor([t]).repeat(len(latents)),
            text_of=self._text_of[part],
            latent_of=self._latent_of[part],
            condition_of=None if self._condition_of is None else self._condition_of[part],
            kept=kept,
            held=0 if self._kept is None else KEPT_COPIES * self._kept.nbytes,
        )

    def _fill(self, result: Tensor, kept: Tensor | None, batches: Iterator[tuple[Tensor, Output]]) -> None:
        for rows, out in batches:
            assert out.noise_pred is not None
            own = upload(rows, result.device)
            result[own] = out.noise_pred
            if kept is not None:
                (kept[own],) = out.features.values()

    def _buffer(self, latents: Tensor) -> Tensor:
        assert self._shallow is not None
        shape = (len(self._text_of), *self._shallow.kept_shape(*latents.shape[-2:]))
        if self._kept is None or self._kept.shape != shape:
            self._kept, self._covered = latents.new_empty(shape), range(0)
        return self._kept
