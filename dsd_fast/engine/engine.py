"""A model as methods use it: sizes, budget, adapters, ControlNets, then any number of texts, images and rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsd_fast.engine.adapters import Adapters
from dsd_fast.engine.encoding import Encoding
from dsd_fast.engine.gradients import Differentiable
from dsd_fast.engine.prediction import KEPT_COPIES, Prediction
from dsd_fast.engine.texts import Texts, texts_held
from dsd_fast.kernels.common.host import own_types
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.controlnet import Control, check_controls, control_residuals
from dsd_fast.models.prompts import token_limit
from dsd_fast.unet import Output, Plan, UNetProgram
from dsd_fast.unet.stream import rows_at_once

if TYPE_CHECKING:
    from dsd_fast.models import Model

# Noised latents held at once: enough images to fill any micro-batch, whatever the number of images given.
_LATENT_BYTES = 64 << 20
# Micro-batches computed together: enough that a partly filled last one costs little, few enough that results come soon.
_MICRO_BATCHES = 4
# Of the memory budget, activations that are kept from call to call take at most one in so many parts.
_KEPT_SHARE = 4


class Engine(Encoding):
    """One model under some adapters and ControlNets, at one image size and within one memory budget.

    Args:
        model: from :func:`dsd_fast.load` or :func:`dsd_fast.from_pipeline`.
        adapter: names of the adapters active during its calls, in the UNet and the text encoders, () for none; None
            leaves the model as it stands at each call.
        image_size: (height, width) in pixels; the model's own if None.
        memory_budget: bytes, see :meth:`dsd_fast.unet.plan.Plan.stream`.
        controls: ControlNets, whose residuals are summed.

    Attributes:
        model, memory_budget: as given.
        controls: the ControlNets.
        program: the UNet's.
        adapters: see :class:`~dsd_fast.engine.adapters.Adapters`.
        size, latent_size: (height, width) of images in pixels, and of their latents.
        noise_plan: the whole network, as :meth:`predict` runs it.

    Raises:
        ValueError: an adapter that the model does not have; a size that is no multiple of the VAE's factor.
        ModelError: a ControlNet that does not fit the UNet.
    """

    def __init__(
        self,
        model: Model,
        adapter: str | Sequence[str] | None = None,
        *,
        image_size: tuple[int, int] | None = None,
        memory_budget: int | None = None,
        controls: Sequence[Control] = (),
    ) -> None:
        self.size = image_size or model.image_size
        self.latent_size = model.latent_size(self.size)
        super().__init__(memory_budget)
        self._join(model, UNetProgram(model.unet), Adapters(model.unet, model.text_encoders, adapter), controls)

    def _join(self, model: Model, program: UNetProgram, adapters: Adapters, controls: Sequence[Control]) -> None:
        check_controls(controls, model)
        self.model, self.program, self.adapters, self.controls = model, program, adapters, tuple(controls)
        self.noise_plan = self.plan(noise_pred=True)
        self._keeping: dict[int, tuple[Plan, Plan]] = {}
        self._row_bytes: dict[tuple[object, ...], int] = {}

    def under(self, adapter: str | Sequence[str] | None, controls: Sequence[Control] = ()) -> Engine:
        """View the same engine under other adapters and ControlNets; equal encoders' adapters share text states.

        Raises:
            ValueError: an adapter that the model does not have.
            ModelError: a ControlNet that does not fit the UNet.
        """
        adapters = Adapters(self.model.unet, self.model.text_encoders, adapter)
        return self._view(self.model, self.program, adapters, controls)

    def with_unet(self, model: Model) -> Engine:
        """View the same engine on a model of another UNet, of which the adapters active at each call count."""
        return self._view(model, UNetProgram(model.unet), self.adapters.with_unet(model.unet), self.controls)

    def _view(self, model: Model, program: UNetProgram, adapters: Adapters, controls: Sequence[Control]) -> Engine:
        other = Engine.__new__(Engine)
        other.size, other.latent_size, other.memory_budget = self.size, self.latent_size, self.memory_budget
        other._remembered = self._remembered
        other._join(model, program, adapters, controls)
        return other

    def compile(self, runtime: str) -> None:
        """Let :meth:`predict` run compiled from now on, see :meth:`dsd_fast.unet.plan.Plan.compile`."""
        self.noise_plan.compile(runtime)
        self._keeping.clear()

    def plan(
        self,
        *,
        features: Sequence[str] = (),
        scores: Sequence[str] = (),
        maps: Sequence[str] = (),
        noise_pred: bool = False,
        pool: str | float = "mean",
        enter: str | None = None,
    ) -> Plan:
        """Cut the network, under the engine's adapters, see :meth:`UNetProgram.plan`."""
        return self.program.plan(
            features=features,
            scores=scores,
            maps=maps,
            noise_pred=noise_pred,
            pool=pool,
            adapter=self.adapters.unet,
            enter=enter,
        )

    def keeping_plans(self, branch: int) -> tuple[Plan, Plan]:
        """Make the two plans of :meth:`predict` with ``cache_branch_id=branch``: the whole network, its shallow steps.

        Raises:
            ValueError: a branch that the network does not have.
        """
        entries = self.program.entries
        if not 0 <= branch < len(entries):
            raise ValueError(f"cache_branch_id: got {branch}, expected 0 to {len(entries) - 1} for this network")
        if branch not in self._keeping:
            name = entries[branch]
            plans = self.plan(noise_pred=True, features=[name]), self.plan(noise_pred=True, enter=name)
            if self.noise_plan.runtime is not None:
                for plan in plans:
                    plan.compile(self.noise_plan.runtime)
            self._keeping[branch] = plans
        return self._keeping[branch]

    def images_held(self, latents: int) -> int:
        """Tell how many images may be noised together, to ``latents`` latents each."""
        height, width = self.latent_size
        return max(1, _LATENT_BYTES // (latents * self.program.latent_channels * height * width * 4))

    def images_together(self, plan: Plan, rows: int, tokens: int, size: tuple[int, int] | None = None) -> int:
        """Tell how many images of ``rows`` rows, with texts of ``tokens`` tokens, fill a few micro-batches of a plan.

        Args:
            size: (h, w) of the latents; the engine's own if None.

        Raises:
            ValueError: a memory budget that does not hold one row.
        """
        at_once = rows_at_once(plan, *(size or self.latent_size), tokens, memory_budget=self.memory_budget)
        return max(1, -(-_MICRO_BATCHES * at_once // rows))

    def rows_kept(self, branch: int, size: tuple[int, int]) -> tuple[int, int]:
        """Tell how many rows' activations :meth:`predict` may keep, one at least, and the bytes that those then take.

        Args:
            size: (h, w) of the latents.
        """
        row = math.prod(self.keeping_plans(branch)[1].kept_shape(*size)) * self.model.dtype.itemsize
        rows = max(1, self.memory // (_KEPT_SHARE * KEPT_COPIES * row))
        return rows, rows * KEPT_COPIES * row

    def texts_together(self, plan: Plan, size: tuple[int, int] | None = None, held: int = 0) -> int:
        """Tell how many texts' keys and values are held at once beside a row of (h, w) latents; see Texts.groups.

        Args:
            held: bytes of a given memory budget that are taken already.
        """
        tokens = token_limit(self.model.tokenizers, self.model.text_encoders)
        return texts_held(plan, size or self.latent_size, tokens, self._budget(held))

    def _time_ids(self, latents: Tensor) -> Tensor | None:
        return self.model.time_ids(*(side * self.model.vae_scale_factor for side in latents.shape[-2:]))

    def _budget(self, held: int) -> int | None:
        return None if self.memory_budget is None else self.memory_budget - held

    def rows(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        texts: Texts,
        text_of: Tensor,
        *,
        latent_of: Tensor | None = None,
        tokens: Tensor | Sequence[int] | None = None,
        conditions: Sequence[Tensor] = (),
        condition_of: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        kept: Tensor | None = None,
        held: int = 0,
    ) -> Iterator[tuple[Tensor, Output]]:
        """Send any number of rows through a plan: (rows, output) of micro-batches, as :meth:`Plan.stream` yields them.

        Args:
            plan: from :meth:`plan`.
            latents: (P, C, h, w) as the UNet sees them, on its device and in its type.
            timesteps: (P,) on the CPU.
            texts: of all rows.
            text_of: (B,) int64 on the CPU, the text of each row by its number.
            latent_of: (B,) int64 on the CPU, the latent of each row; row b is latent b if None.
            tokens: (n,) token positions for the plan's maps.
            conditions: (N, 3, H, W) in [0, 1] for each of the engine's ControlNets; without any they take no part.
            condition_of: (B,) int64 on the CPU, the condition of each row.
            time_ids: (P, 6) on the CPU, SDXL's image sizes; None: those of the latents, see
                :meth:`dsd_fast.models.Model.time_ids`.
            timestep_cond: (P, E) on the CPU, see :meth:`Plan.run`.
            kept: (B, C, h, w) that a plan enters the network with, see :meth:`Plan.run`.
            held: bytes of a given memory budget that are taken already.
        """
        budget = self._budget(held)
        if time_ids is None:
            time_ids = self._time_ids(latents)
        stream = partial(
            plan.stream,
            latents,
            timesteps,
            time_ids=time_ids,
            timestep_cond=timestep_cond,
            memory_budget=budget,
        )
        latent_of = torch.arange(len(latents), device="cpu") if latent_of is None else latent_of
        shown = (latents, timesteps, time_ids, conditions, condition_of)
        batches = self._rows(plan, stream, shown, texts, text_of, latent_of, tokens, kept, budget)
        while True:
            # Not around the yield: what the caller's own program is under is none of our business.
            with own_types(self.model.device):
                answered = next(batches, None)
            if answered is None:
                return
            yield answered

    def _rows(
        self,
        plan: Plan,
        stream: Callable[..., Iterator[tuple[Tensor, Output]]],
        shown: tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor], Tensor | None],
        texts: Texts,
        text_of: Tensor,
        latent_of: Tensor,
        tokens: Tensor | Sequence[int] | None,
        kept: Tensor | None,
        budget: int | None,
    ) -> Iterator[tuple[Tensor, Output]]:
        latents, timesteps, time_ids, conditions, condition_of = shown
        size: tuple[int, int] = (latents.shape[-2], latents.shape[-1])
        if conditions:
            # ControlNets are networks of their own, which know no counts.
            states = texts.chosen().to(latents.device).expanded()
            residuals_of = partial(
                control_residuals,
                self.controls,
                conditions,
                latents,
                timesteps,
                states.states,
                pooled=states.pooled,
                time_ids=time_ids,
            )
        for keys, chosen, own in texts.groups(plan, text_of, size, budget):
            at_once, residuals = len(chosen), None
            if conditions:
                beside = 0 if keys is None else plan.text_bytes(keys)
                at_once = self._controlled_rows(latents, texts.tokens, beside, budget)
            for start in range(0, len(chosen), max(1, at_once)):
                rows, local = chosen[start : start + at_once], own[start : start + at_once]
                if conditions:
                    condition_index = None if condition_of is None else condition_of[rows]
                    with torch.no_grad():
                        residuals = residuals_of(
                            latent_index=latent_of[rows], text_index=text_of[rows], condition_index=condition_index
                        )
                batches = stream(
                    keys,
                    latent_index=latent_of[rows],
                    text_index=None if keys is None else local,
                    residuals=residuals,
                    kept=kept if kept is None or len(rows) == len(kept) else kept[upload(rows, kept.device)],
                    map_tokens=None if keys is None else tokens,
                )
                for part, out in batches:
                    yield rows[part], out

    def predict(
        self,
        texts: Texts,
        text_of: Tensor,
        *,
        latent_of: Tensor | None = None,
        conditions: Sequence[Tensor] = (),
        condition_of: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        cache_interval: int = 1,
        cache_branch_id: int = 0,
        gradients: int = 0,
        checkpoint: bool = False,
    ) -> Prediction:
        """Make what samplers and inversions call for the model's output for P latents at one timestep.

        Latents of another floating type are taken in the network's. Keys and values are made once for all timesteps
        where they fit the budget.

        Args:
            texts, text_of, latent_of, conditions, condition_of, time_ids, timestep_cond: as for :meth:`rows`.
            cache_interval: run the whole network at every so many calls, and between them the shallow steps alone, on
                what the last whole run left of the deep ones (Ma et al. 2023, "DeepCache: Accelerating Diffusion Models
                for Free"); for one walk at a time, of falling timesteps. See :class:`Prediction` for when it runs whole
                besides.
            cache_branch_id: of :attr:`UNetProgram.entries`, where the shallow steps enter.
            gradients: how many calls a gradient goes through together. Those made while torch's gradients are on are
                then differentiable in the latents and in the texts' states, exactly, however many rows there are: what
                does not fit the memory budget, half of which is for this, is computed again in the backward pass. 0: no
                call is. See :func:`dsd_fast.diffusion.last_calls`.
            checkpoint: compute all of it again: less memory, more time.

        Returns:
            A prediction of B rows, row b with text ``text_of[b]`` of latent ``latent_of[b]``, B = P without it.

        Raises:
            ValueError: a branch that the network does not have; gradients beside conditions or a cache interval.
        """
        if gradients and (conditions or cache_interval != 1):
            given = "conditions" if conditions else f"cache_interval {cache_interval}"
            raise ValueError(f"gradients: got {gradients} beside {given}, expected them without")
        send = partial(self.rows, texts=texts, conditions=conditions, time_ids=time_ids, timestep_cond=timestep_cond)
        rows = (text_of, latent_of, condition_of)
        if cache_interval == 1:
            differentiable = None
            if gradients:
                sizes = self._time_ids if time_ids is None else lambda latents: time_ids
                about = (sizes, timestep_cond, gradients, checkpoint, self.memory_budget, self._row_bytes)
                differentiable = Differentiable(self.noise_plan, texts, *about)
            return Prediction(send, *rows, self.noise_plan, differentiable=differentiable)
        return Prediction(send, *rows, *self.keeping_plans(cache_branch_id), cache_interval)

    def rows_differentiated(self, texts: Texts) -> int:
        """Tell how many rows of one :meth:`predict` with gradients are one micro-batch of which all is kept.

        Args:
            texts: that want gradients.

        Raises:
            ValueError: a memory budget that does not hold one row.
        """
        latents = torch.zeros(1, self.program.latent_channels, *self.latent_size, dtype=self.model.dtype, device="cpu")
        about = (self._time_ids, None, 1, False, self.memory_budget, self._row_bytes)
        differentiable = Differentiable(self.noise_plan, texts, *about)
        return differentiable.sizes(latents.to(self.model.device), torch.zeros(1, dtype=torch.int64, device="cpu"))[0]

    def _controlled_rows(self, latents: Tensor, tokens: int, keys: int, budget: int | None) -> int:
        """Rows whose residuals are made together.

        A ControlNet holds what the whole network's first half does, whatever the plan's end, and its residuals before
        and after their scaling; those of all nets so far are held besides, and the plan takes copies of its own rows'.
        """
        height, width = latents.shape[-2:]
        shapes = self.program.residual_shapes(height, width)
        residuals = (3 + min(len(self.controls), 2)) * sum(map(math.prod, shapes)) * latents.itemsize
        return rows_at_once(
            self.noise_plan, height, width, tokens, keys=keys, residuals=residuals, memory_budget=budget
        )
