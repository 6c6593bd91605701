"""The network's calls under one technique."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsd_fast.diffusion import Predict
from dsd_fast.features.inputs import Inputs, TextStates
from dsd_fast.features.technique import Technique
from dsd_fast.models.controlnet import Control, check_controls, control_residuals
from dsd_fast.unet import Output, UNetProgram
from dsd_fast.unet.adapters import split_adapters
from dsd_fast.unet.checks import upload
from dsd_fast.unet.stream import default_budget, rows_at_once

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.models.prompts import PromptStates
    from dsd_fast.unet import Plan


class Runner:
    """Runs plans of one model under one technique: its adapters and its ControlNets.

    Args:
        texts: shared by the runners of a model.
        memory_budget: bytes, see :meth:`dsd_fast.unet.plan.Plan.stream`.

    Attributes:
        adapter: of the UNet; plans that the runner is given belong to it.

    Raises:
        ValueError: an adapter that the model does not have.
        ModelError: a ControlNet that does not fit the UNet.
    """

    def __init__(
        self, program: UNetProgram, model: Model, technique: Technique, texts: TextStates, memory_budget: int | None
    ) -> None:
        check_controls(technique.controls, model)
        self.model, self.technique = model, technique
        self.adapter, self._scopes = split_adapters(model.unet, model.text_encoders, technique.adapter)
        self._texts, self._budget = texts, memory_budget
        self._noise_plan = program.plan(noise_pred=True, adapter=self.adapter)

    def compile(self, runtime: str) -> None:
        """From now on noise predictions run compiled, see :meth:`dsd_fast.unet.plan.Plan.compile`."""
        self._noise_plan.compile(runtime)

    def run(
        self, plan: Plan, latents: Tensor, timesteps: Tensor, image_of: Tensor, inputs: Inputs, prompts: Sequence[str]
    ) -> Iterator[tuple[Tensor, Output]]:
        """Any number of rows through a plan, in micro-batches: (rows, output) as :meth:`Plan.stream` yields them.

        Args:
            plan: of this runner's :attr:`adapter`.
            latents: (B, C, h, w) as the UNet sees them, on its device and in its type.
            timesteps: (B,) on the CPU.
            image_of: (B,) int64 on the CPU, which of the inputs a row belongs to.
            inputs: n images.
            prompts: one for each of the n images.
        """
        return self._run(plan, latents, timesteps, image_of, inputs, prompts, self.technique.controls)

    def _run(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        image_of: Tensor,
        inputs: Inputs,
        prompts: Sequence[str] | None,
        controls: Sequence[Control],
    ) -> Iterator[tuple[Tensor, Output]]:
        if prompts is None:
            text_of = torch.zeros_like(image_of)
            states = self._texts.of(None, self._scopes)
        else:
            used = list(dict.fromkeys(prompts))
            place = {text: number for number, text in enumerate(used)}
            text_of = torch.tensor([place[text] for text in prompts])[image_of]
            states = self._texts.of(used, self._scopes)
        at_once = self._texts_at_once(plan, int(states.states.shape[1]))
        if at_once >= len(states):
            yield from self._stream(plan, latents, timesteps, image_of, text_of, inputs, states, controls)
            return
        for first in range(0, len(states), at_once):
            own = slice(first, first + at_once)
            chosen = torch.nonzero((text_of >= first) & (text_of < own.stop)).flatten()
            there = upload(chosen, latents.device)
            parts = self._stream(
                plan,
                latents[there],
                timesteps[chosen],
                image_of[chosen],
                text_of[chosen] - first,
                inputs,
                states[own],
                controls,
            )
            for rows, out in parts:
                yield chosen[rows], out

    def predict(
        self, inputs: Inputs, prompts: Sequence[str] | None, repeats: int = 1, controlled: bool = True
    ) -> Predict:
        """The model's output for B = n · repeats rows, image by image, with its images' prompts.

        Args:
            prompts: one for each of the n images; None: the absent prompt of the family's sampler for all of them.
            repeats: rows in a row that belong to one image.
            controlled: whether the ControlNets take part.
        """
        image_of = torch.arange(len(inputs)).repeat_interleave(repeats)
        controls = self.technique.controls if controlled else ()
        return partial(
            self._predict,
            inputs=inputs,
            prompts=None if prompts is None else tuple(prompts),
            image_of=image_of,
            controls=controls,
        )

    def _predict(
        self,
        latents: Tensor,
        t: float,
        *,
        inputs: Inputs,
        prompts: Sequence[str] | None,
        image_of: Tensor,
        controls: Sequence[Control],
    ) -> Tensor:
        result = torch.empty_like(latents)
        times = torch.full((len(latents),), t)
        for rows, out in self._run(self._noise_plan, latents, times, image_of, inputs, prompts, controls):
            assert out.noise_pred is not None
            result[upload(rows, result.device)] = out.noise_pred
        return result

    def _stream(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        image_of: Tensor,
        text_of: Tensor,
        inputs: Inputs,
        states: PromptStates,
        controls: Sequence[Control],
    ) -> Iterator[tuple[Tensor, Output]]:
        text = None
        if plan.boundary < len(plan.steps):
            with torch.no_grad():
                text = plan.encode_text(states.states, states.pooled)
        # Attention maps are taken of every token.
        tokens = None if text is None else torch.arange(text.tokens)
        height, width = (side * self.model.vae_scale_factor for side in latents.shape[-2:])
        ids = self.model.time_ids(height, width)
        if not controls:
            index = None if text is None else text_of
            yield from plan.stream(
                latents,
                timesteps,
                text,
                text_index=index,
                time_ids=ids,
                map_tokens=tokens,
                memory_budget=self._budget,
            )
            return
        conditions = inputs.conditions(controls)
        keys = 0 if text is None else plan.text_bytes(text)
        at_once = self._controlled_rows(latents, int(states.states.shape[1]), keys, len(controls))
        for start in range(0, len(latents), at_once):
            chosen = slice(start, start + at_once)
            with torch.no_grad():
                residuals = control_residuals(
                    controls,
                    conditions,
                    latents[chosen],
                    timesteps[chosen].to(latents.device),
                    states.states,
                    pooled=states.pooled,
                    time_ids=ids,
                    text_index=text_of[chosen],
                    condition_index=image_of[chosen],
                )
            batches = plan.stream(
                latents[chosen],
                timesteps[chosen],
                text,
                text_index=None if text is None else text_of[chosen],
                time_ids=ids,
                residuals=residuals,
                map_tokens=tokens,
                memory_budget=self._budget,
            )
            for rows, out in batches:
                yield rows + start, out

    def _controlled_rows(self, latents: Tensor, tokens: int, keys: int, nets: int) -> int:
        """Rows whose residuals are made together.

        A ControlNet holds what the whole network's first half does, whatever the plan's end, and its residuals before
        and after their scaling; those of all nets so far are held besides, and the plan takes copies of its own rows'.
        """
        program, (height, width) = self._noise_plan.program, latents.shape[-2:]
        sizes = program.sizes(height, width)
        pushed = [(step.pushes, sizes[step.level]) for step in program.steps if step.pushes]
        pushed.append((program.unet.config.block_out_channels[-1], sizes[-1]))
        residuals = sum(channels * rows * columns for channels, (rows, columns) in pushed) * latents.itemsize
        copies = 3 + min(nets, 2)
        return rows_at_once(
            self._noise_plan, height, width, tokens, keys=keys, residuals=copies * residuals, memory_budget=self._budget
        )

    def _texts_at_once(self, plan: Plan, tokens: int) -> int:
        """Texts whose keys and values take half the budget, at least one."""
        names = (*plan.key_layers, *plan.value_layers)
        width: int = sum(plan.program.attention(name).inner_dim for name in names)
        per_text = max(1, width * tokens * self.model.dtype.itemsize)
        budget = default_budget(self.model.unet.device) if self._budget is None else self._budget
        return max(1, budget // 2 // per_text)
