"""Rows to images: which rows go together, and how they are computed."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsd_fast.diffusion import (
    CLEAN,
    Predict,
    RowNoise,
    guidance_embedding,
    guided,
    img2img,
    named_scheduler,
    sample,
    scheduler_timesteps,
    within,
)
from dsd_fast.diffusion.schedulers import check_draws
from dsd_fast.engine import Engine, ImagePrompt, Prompt
from dsd_fast.engine.fingerprint import model_settings, scheduler_settings
from dsd_fast.engine.items import prompt_check
from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.images import load_image, to_tensor
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.controlnet import Control
from dsd_fast.models.prompts import check_clip_skip, token_limit
from dsd_fast.models.tuners import adapter_names

if TYPE_CHECKING:
    from dsd_fast.models import Model

# Of a row, those that are the configuration's where it says nothing.
_DEFAULTS = ("negative_prompt", "steps", "guidance", "guidance_rescale", "clip_skip")
_MICRO_CONDITIONING = ("original_size", "crop", "target_size")


class Sampler:
    """Makes images of rows, many at a time; an image depends on its row, the model and the settings alone.

    Conditional and unconditional rows share one latent, so that what comes before the network reads a text is computed
    once; equal texts share their keys and values, which are made once for all steps; a row of guidance 1 or less has no
    unconditional row.

    Args:
        model: from :func:`dsd_fast.load` or :func:`dsd_fast.from_pipeline`.
        config: what rows do not say themselves; None: its defaults.
        controls: ControlNets, to which rows give a condition each, or none.

    Attributes:
        model: under the configuration's scheduler.
        config, controls: as given.
        engine: under the configuration's adapters.

    Raises:
        ValueError: a setting that does not fit the model, by name; a scheduler that draws noise for a whole batch.
        ModelError: a ControlNet that does not fit the UNet.
    """

    def __init__(self, model: Model, config: GenerateConfig | None = None, *, controls: Sequence[Control] = ()) -> None:
        config = config or GenerateConfig()
        self.config, self.controls = config, tuple(controls)
        self.model = under_scheduler(model, config.scheduler)
        self._scheduler = self.model.new_scheduler()
        check_draws(self._scheduler, config.eta)
        self.engine = Engine(
            self.model,
            config.adapter,
            image_size=config.image_size,
            memory_budget=config.memory_budget,
            controls=controls,
        )
        self._engines: dict[tuple[str, ...] | None, Engine] = {_names(config.adapter): self.engine}
        self._wrong = prompt_check(self.model)
        self._runtime: str | None = None
        self._walks: dict[tuple[int, float], int] = {}
        # What no row could be made with is said once, and not by each of them.
        check_clip_skip(self.model.text_encoders, config.clip_skip)
        if config.negative_prompt is not None:
            self._check_prompt("negative_prompt", config.negative_prompt)
        self._steps_taken(config.steps, None)
        # Refuses a branch that the network does not have.
        self.engine.keeping_plans(config.cache_branch_id)

    def compile(self, runtime: str = "inductor") -> Sampler:
        """From now on the network runs compiled, see :meth:`dsd_fast.unet.plan.Plan.compile`; the sampler itself.

        Raises:
            ValueError: an unknown runtime; "cudagraph" with a model that is not on a CUDA device.
        """
        for engine in self._engines.values():
            engine.compile(runtime)
        self._runtime = runtime
        return self

    def resolve(self, row: GenerateRow) -> GenerateRow:
        """Fill in what a row leaves to the configuration, and check it; a resolved row stays as it is.

        Strength is filled in where there is an image to start from, SDXL's sizes for SDXL.

        Raises:
            ValueError: a value outside its range or that does not fit the model, by field; strength without an image,
                SDXL's sizes of another model, another number of conditions than of ControlNets.
        """
        own, config = vars(row), vars(self.config)
        filled = {name: config[name] if own[name] is None else own[name] for name in _DEFAULTS}
        self._check_prompt("prompt", row.prompt)
        if filled["negative_prompt"] is not None:
            self._check_prompt("negative_prompt", filled["negative_prompt"])
        if isinstance(row.prompt, ImagePrompt):
            filled["clip_skip"] = row.clip_skip
            if row.clip_skip is not None:
                raise ValueError(f"clip_skip: got {row.clip_skip} of an image as a prompt, which no encoder reads")
        check_clip_skip(self.model.text_encoders, filled["clip_skip"])
        size = filled["size"] = row.size or self.engine.size
        if any(side % self.model.vae_scale_factor for side in size):
            raise ValueError(f"size: got {size}, expected multiples of {self.model.vae_scale_factor} pixels")
        strength = row.strength
        if row.image is None and strength is not None:
            raise ValueError(f"strength: got {strength!r} without an image to start from, expected None")
        if row.image is not None and strength is None:
            strength = self.config.strength
        filled["strength"] = strength
        self._steps_taken(filled["steps"], strength)
        filled["adapter"] = _names(self.config.adapter if row.adapter is None else row.adapter)
        self._under(filled["adapter"])
        if row.conditions and len(row.conditions) != len(self.controls):
            raise ValueError(
                f"conditions: got {len(row.conditions)} for {len(self.controls)} ControlNets, expected one for each"
            )
        for name in _MICRO_CONDITIONING:
            if self.model.family == "sdxl":
                filled[name] = own[name] or ((0, 0) if name == "crop" else size)
            elif own[name] is not None:
                raise ValueError(f"{name}: got {own[name]!r} for a model that reads no image sizes, expected None")
        return replace(row, **filled)

    def group(self, row: GenerateRow) -> Hashable:
        """Tell of a resolved row what rows that are computed together have in common."""
        assert row.steps is not None
        started = None if row.image is None else self._steps_taken(row.steps, row.strength)
        # A row that enters the interval of guidance makes all that it is with run whole.
        own = self.config.cache_interval > 1 and self.config.guidance_interval is not None and self._is_guided(row)
        return row.size, row.steps, started, row.adapter, bool(row.conditions), own

    def rows_at_once(self, row: GenerateRow) -> int:
        """Tell how many resolved rows like this one fill the memory budget."""
        engine = self._under(row.adapter)
        size = self.model.latent_size(row.size)
        tokens = token_limit(self.model.tokenizers, self.model.text_encoders)
        together = engine.images_together(engine.noise_plan, 1 + self._is_guided(row), tokens, size)
        texts, kept = self._held(engine, size)
        return max(1, min(together, texts - 1, kept // (1 + self._is_guided(row))))

    @torch.no_grad()
    def latents(self, rows: Sequence[GenerateRow]) -> Tensor:
        """Sample the clean latents of n resolved rows of one group, (n, C, h, w) float32 on the model's device.

        Raises:
            ImageError: an image of a row that cannot be used.
            ValueError: no rows, or rows of several groups.
        """
        return torch.cat([self._sampled(engine, part) for engine, part in self._parts_of_group(rows)])

    @torch.no_grad()
    def predicted(self, rows: Sequence[GenerateRow]) -> tuple[list[float], Tensor]:
        """Sample as :meth:`latents` does, and tell at each step which clean latents the network's answer stands for.

        Returns:
            The timesteps of its calls, and −1; (calls + 1, n, C, h, w) float32 on the model's device, the last of which
            are those of :meth:`latents`. An answer between two timesteps of the schedule is read as one at the nearer.

        Raises:
            ImageError, ValueError: as there.
        """
        found = []
        for engine, part in self._parts_of_group(rows):
            seen: list[tuple[float, Tensor]] = []
            latents = self._sampled(engine, part, seen)
            found.append(torch.stack([*(clean for _, clean in seen), latents]))
        return [*(t for t, _ in seen), CLEAN], torch.cat(found, dim=1)

    @torch.no_grad()
    def pixels(self, rows: Sequence[GenerateRow]) -> Tensor:
        """Make the images of n resolved rows of one group, (n, 3, H, W) in [−1, 1] in the model's type; see latents."""
        return self._under(rows[0].adapter).decode_latents(self.latents(rows))

    def settings(self) -> dict[str, Any]:
        """Tell what changes images besides the rows, as JSON.

        The model's, see :func:`~dsd_fast.engine.fingerprint.model_settings`; "row_adapters", the same of the other
        adapters that the model has, because which of them rows will name is not known before all are read; "scheduler";
        "controls"; and "config", of which :class:`GenerateConfig` is made again but for its memory budget and a
        scheduler that is no name.

        Raises:
            ValueError: a ControlNet's condition that a later run could not tell from another.
        """
        config = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        del config["memory_budget"]
        if not isinstance(config["scheduler"], str):
            config["scheduler"] = None
        return {
            **model_settings(self.engine),
            "row_adapters": {name: self._adapter_settings(name) for name in sorted(self._other_adapters())},
            "scheduler": scheduler_settings(self.model),
            "controls": [control.settings() for control in self.controls],
            "config": {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()},
        }

    def _other_adapters(self) -> set[str]:
        """Names of the adapters that rows may be under, and the configuration is not."""
        networks = (self.model.unet, *self.model.text_encoders)
        return set().union(*map(adapter_names, networks)) - set(_names(self.config.adapter) or ())

    def _adapter_settings(self, name: str) -> list[Any]:
        told = model_settings(self._under((name,)))
        return [told["weights"], told["adapters"], told["adapter_strengths"]]

    def _parts_of_group(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[Engine, Sequence[GenerateRow]]]:
        groups = {self.group(row) for row in rows}
        if len(groups) != 1:
            raise ValueError(f"rows: got {len(rows)} of {len(groups)} groups, expected at least one, of one group")
        engine = self._under(rows[0].adapter)
        # The encoders may have changed since the last call.
        engine.forget()
        for part in self._parts(engine, rows):
            yield engine, part

    def _parts(self, engine: Engine, rows: Sequence[GenerateRow]) -> Iterator[Sequence[GenerateRow]]:
        """Rows whose texts' keys, made once for all steps, and whose kept activations are held at once."""
        most, most_kept = self._held(engine, self.model.latent_size(rows[0].size))
        part: list[GenerateRow] = []
        texts: set[object] = set()
        kept = 0
        for row in rows:
            own: set[object] = {(row.prompt, row.clip_skip)}
            if self._is_guided(row):
                own.add((self._negative(row), None))
            sent = 1 + self._is_guided(row)
            if part and (len(texts | own) > most or kept + sent > most_kept):
                yield part
                part, texts, kept = [], set(), 0
            part.append(row)
            texts |= own
            kept += sent
        yield part

    def _held(self, engine: Engine, size: tuple[int, int]) -> tuple[int, int]:
        """How many texts' keys, and how many rows' kept activations, are held at once."""
        kept, taken = sys.maxsize, 0
        if self.config.cache_interval > 1:
            kept, taken = engine.rows_kept(self.config.cache_branch_id, size)
        return engine.texts_together(engine.noise_plan, size, taken), kept

    def _sampled(
        self, engine: Engine, rows: Sequence[GenerateRow], seen: list[tuple[float, Tensor]] | None = None
    ) -> Tensor:
        first, config, device = rows[0], self.config, self.model.device
        assert first.size is not None
        assert first.steps is not None
        draws = RowNoise([row.seed for row in rows], config.noise, self.model.dtype)
        clean = None
        if first.image is not None:
            pixels = [to_tensor(load_image(row.image), first.size) for row in rows if row.image is not None]
            clean = engine.encode_images(pixels, draws.from_posterior).to(device, draws.held or torch.float32)
        start = draws.start((self.model.latent_channels, *self.model.latent_size(first.size)))
        predict = self._predict(engine, rows)
        if seen is not None:
            predict = self._noting(predict, seen)
        options: dict[str, Any] = {"steps": first.steps, "draws": draws, "eta": config.eta}
        if clean is None:
            latents = sample(self._scheduler, predict, upload(start, device), **options)
        else:
            assert first.strength is not None
            latents = img2img(self._scheduler, predict, clean, start, strength=first.strength, **options)
        return latents.float()

    def _predict(self, engine: Engine, rows: Sequence[GenerateRow]) -> Predict:
        """What the sampler calls: guided where rows ask for it, of unconditional rows before all conditional ones."""
        with_guide = [number for number, row in enumerate(rows) if self._is_guided(row)]
        prompts = [*(self._negative(rows[number]) for number in with_guide), *(row.prompt for row in rows)]
        texts, text_of = engine.texts(prompts, [*[None] * len(with_guide), *(row.clip_skip for row in rows)])
        latent_of = torch.tensor([*with_guide, *range(len(rows))], dtype=torch.int64, device="cpu")
        predict = engine.predict(
            texts,
            text_of,
            latent_of=latent_of,
            condition_of=latent_of,
            conditions=self._conditions(rows),
            time_ids=self._time_ids(rows),
            timestep_cond=self._guidance_embedding(rows),
            cache_interval=self.config.cache_interval,
            cache_branch_id=self.config.cache_branch_id,
        )
        if not with_guide:
            return predict
        scales = [float(row.guidance or 0) if self._is_guided(row) else 1.0 for row in rows]
        answer = guided(predict, scales, [float(row.guidance_rescale or 0) for row in rows])
        if self.config.guidance_interval is None:
            return answer
        plain = partial(predict, part=slice(len(with_guide), None))
        return within(self.model.schedule, self.config.guidance_interval, answer, plain)

    def _noting(self, predict: Predict, seen: list[tuple[float, Tensor]]) -> Predict:
        """As `predict`; notes the timestep of each call, and the clean latents that its answer stands for."""

        def predict_noting(latents: Tensor, t: float) -> Tensor:
            output = predict(latents, t)
            seen.append((t, self.model.schedule.to_original(output, latents, round(t)).float()))
            return output

        return predict_noting

    def _conditions(self, rows: Sequence[GenerateRow]) -> list[Tensor]:
        """(n, 3, H, W) in [0, 1] for each ControlNet, or none."""
        if not rows[0].conditions:
            return []
        size = rows[0].size
        assert size is not None
        return [
            upload(
                torch.stack([control.prepare(load_image(row.conditions[number]), size) for row in rows]),
                self.model.device,
                self.model.dtype,
            )
            for number, control in enumerate(self.controls)
        ]

    def _time_ids(self, rows: Sequence[GenerateRow]) -> Tensor | None:
        """(n, 6), SDXL's."""
        if self.model.family != "sdxl":
            return None
        ids = [[*(row.original_size or ()), *(row.crop or ()), *(row.target_size or ())] for row in rows]
        return torch.tensor(ids, dtype=torch.float32, device="cpu")

    def _guidance_embedding(self, rows: Sequence[GenerateRow]) -> Tensor | None:
        """(n, E), of a network that was distilled with guidance."""
        width = self.engine.program.guidance_width
        return guidance_embedding([float(row.guidance or 0) for row in rows], width) if width else None

    def _is_guided(self, row: GenerateRow) -> bool:
        return bool(row.guidance is not None and row.guidance > 1 and not self.engine.program.guidance_width)

    def _negative(self, row: GenerateRow) -> Prompt | None:
        """The unconditional text; an absent one is the empty one, save where it is zeros."""
        return "" if row.negative_prompt is None and not self.model.absent_prompt_is_zeros else row.negative_prompt

    def _under(self, adapter: tuple[str, ...] | None) -> Engine:
        if adapter not in self._engines:
            engine = self._engines[adapter] = self.engine.under(adapter, self.controls)
            if self._runtime is not None:
                engine.compile(self._runtime)
        return self._engines[adapter]

    def _check_prompt(self, name: str, prompt: Prompt) -> None:
        if isinstance(prompt, ImagePrompt):
            try:
                prompt.check(self.model)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        elif (wrong := self._wrong(prompt)) is not None:
            raise ValueError(f"{name}: {wrong[1]}")

    def _steps_taken(self, steps: int, strength: float | None) -> int:
        """Of a walk that the scheduler takes; asked once for each."""
        key = (steps, 1.0 if strength is None else float(strength))
        if key not in self._walks:
            self._walks[key] = len(scheduler_timesteps(self._scheduler, *key))
        return self._walks[key]


def to_uint8(pixels: Tensor) -> Tensor:
    """Round (n, 3, H, W) pixels in [−1, 1] to (n, H, W, 3) uint8, where they are."""
    values = pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return values.permute(0, 2, 3, 1).contiguous()


def under_scheduler(model: Model, scheduler: Any) -> Model:
    """The model under a named scheduler, a given one, or its own.

    Raises:
        ValueError: one for another kind of process or of prediction.
    """
    if scheduler is None:
        return model
    if isinstance(scheduler, str):
        return model.with_scheduler(named_scheduler(scheduler, model.new_scheduler()))
    result = model.with_scheduler(scheduler)
    wanted, own = model.schedule.prediction_type, result.schedule.prediction_type
    if own != wanted:
        raise ValueError(f"scheduler: its prediction_type is {own!r}, expected the model's {wanted!r}")
    return result


def _names(adapter: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    return (adapter,) if isinstance(adapter, str) else adapter
