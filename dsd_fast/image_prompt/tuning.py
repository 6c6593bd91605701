"""A converter's tuning, from its images to what was learned."""

from __future__ import annotations

import functools
import hashlib
import resource
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dsd_fast.engine.fingerprint import model_settings
from dsd_fast.engine.noise_loss import NoiseLoss, draw_row
from dsd_fast.image_prompt.converter import Conversion
from dsd_fast.image_prompt.files import FILES, write
from dsd_fast.image_prompt.tune_config import TuneConfig
from dsd_fast.image_prompt.tuned import Made, Tuned
from dsd_fast.images import ImageError, ImageSource, check_sources, load_image
from dsd_fast.jobs import locked, remove_stale
from dsd_fast.kernels.common.host import own_types
from dsd_fast.models.private import check_ordinary
from dsd_fast.models.prompts import PromptStates
from dsd_fast.training import Descent, FitHistory, Report, seed_of, seeded
from dsd_fast.training.order import batch_of

# Of each held-out image, at timesteps that are spread over the schedule.
_DRAWS = 4
_NEUTRAL = {"checkpointing", "save_every"}


@dataclass(frozen=True)
class Tuning:
    """How a converter came to be what it is.

    Attributes:
        history: of the training; a validation's ``validation_loss`` is the noise loss, and there is no accuracy.
        parameters: numbers that were trained.
        seconds: that the call took.
        peak_bytes: of memory: of the GPU's allocator since the call began, or of the process so far.
    """

    history: FitHistory
    parameters: int
    seconds: float
    peak_bytes: int


class Pictures:
    """Images as latents of the VAE and as pixels of CLIP, each made once.

    Args:
        base: whose engine and preprocessing make them.
        images: one or more.

    Attributes:
        latents: (N, C, h, w) on the CPU.
        prepared: (N, 3, side, side) on the CPU.
        digest: hexadecimal, of the pixels.
    """

    def __init__(self, base: Conversion, images: list[ImageSource]) -> None:
        digest = hashlib.sha256()
        # The VAE is shown what CLIP is, the centre, and nothing squeezed.
        shown = (_centre(load_image(image), base.engine.size) for image in images)
        self.latents = base.engine.encode_sources(shown, digest)
        self.prepared = torch.stack([_usable(each) for each in list(base.prepared(images))])
        digest.update(self.prepared.numpy().tobytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.latents)


def tune(
    base: Made,
    images: Iterable[ImageSource],
    validation: Iterable[ImageSource] | None,
    config: TuneConfig,
    out: Path | None,
    report: Report,
) -> tuple[Made, Tuning]:
    """See :meth:`dsd_fast.image_prompt.ImagePromptConverter.finetune`.

    Args:
        base: the converter, which is not changed.
        images, validation, config, out: as there.
        report: see :data:`~dsd_fast.training.descent.Report`.
    """
    began, device = time.monotonic(), base.model.device
    shown = _listed("images", images)
    held_out = None if validation is None else _listed("validation", validation)
    if config.patience is not None and held_out is None:
        raise ValueError("patience: needs validation, the held-out images that it goes by")
    steps = base.model.schedule.num_train_timesteps
    if config.timestep_range is not None and config.timestep_range[1] > steps:
        raise ValueError(f"timestep_range: got {config.timestep_range}, expected at most (0, {steps})")
    parts = {"unet": base.model.unet, "vision": base.vision}
    check_ordinary("finetune", parts)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # The caller's program may be without gradients, or mix precisions; this is training, in the model's types.
    learning = (torch.inference_mode(False), torch.enable_grad(), own_types(device))
    with ExitStack() as stack:
        for context in (*learning, nullcontext() if out is None else locked(out)):
            stack.enter_context(context)
        if out is not None:
            for name in FILES:
                remove_stale(out / name)
        tuned = Tuned(base, config)
        pictures = Pictures(base, shown)
        checked = None if held_out is None else Pictures(base, held_out)
        fingerprint = {} if out is None else _fingerprint(base, config, pictures, checked)
        history = training(tuned, pictures, config, checked, fingerprint, out, report).fit()
        count = sum(parameter.numel() for parameter in tuned.parameters.values())
        converter = tuned.finished()
        if out is not None:
            write(out, converter)
    return converter, Tuning(history, count, time.monotonic() - began, _peak_bytes(device))


def training(
    tuned: Tuned[Made],
    pictures: Pictures,
    config: TuneConfig,
    validation: Pictures | None,
    fingerprint: dict[str, Any],
    folder: Path | None,
    report: Report,
) -> Descent:
    """Prepare the training.

    Args:
        tuned: the parameters.
        pictures: to learn from.
        config: the settings.
        validation: held-out images to choose the best parameters by, or None.
        fingerprint, folder, report: see :class:`~dsd_fast.training.Descent`.
    """
    converter = tuned.converter
    engine, device = converter.engine, converter.model.device
    loss = NoiseLoss(engine, checkpoint=config.checkpointing)
    span = config.timestep_range or (0, engine.model.schedule.num_train_timesteps)
    shape = pictures.latents.shape[1:]

    with torch.no_grad():
        # The begin state, and one that stands for all others.
        template = converter.prompt_of([*converter.map.mapped(converter.pooled(pictures.prepared[:1]))]).states()

    def states_of(prepared: Tensor) -> PromptStates:
        vectors, pooled = converter.vectors_of(converter.pooled(prepared))
        rows = template[torch.zeros(len(prepared), dtype=torch.int64, device="cpu")]
        return replace(rows, states=torch.cat([rows.states[:, :-1], vectors[:, None]], dim=1), pooled=pooled)

    def step_losses(step: int, backward: Callable[[Tensor], None]) -> None:
        chosen = batch_of(len(pictures), config.batch_size, step, config.seed)
        randoms = [torch.Generator().manual_seed(seed_of(config.seed, step, n)) for n in range(len(chosen))]
        times, noise = zip(*(draw_row(random, span, shape) for random in randoms), strict=True)
        prepared = pictures.prepared[chosen]

        def states() -> PromptStates:
            # Dropout draws from torch's own generators: the same both times.
            with seeded(seed_of(config.seed, step, 0, 2), device):
                return states_of(prepared)

        learns = config.prompt_tokens > 0
        if learns:
            tuned.dropout(config.prompt_dropout)
        # The image encoder keeps nothing while the UNet runs, which needs the memory: it is gone through once more.
        with torch.no_grad():
            shown = states()
        leaves = [each.detach().requires_grad_(learns) for each in (shown.states, shown.pooled) if each is not None]
        loss(
            replace(shown, states=leaves[0], pooled=leaves[1] if leaves[1:] else None),
            torch.arange(len(chosen), device="cpu"),
            pictures.latents[chosen],
            torch.tensor(times, device="cpu"),
            torch.stack(noise),
            lambda squares: backward(squares / (len(chosen) * shape.numel())),
        )
        if learns:
            again = states()
            tensors = [each for each in (again.states, again.pooled) if each is not None]
            torch.autograd.backward(tensors, [leaf.grad for leaf in leaves])
        tuned.dropout(0.0)

    @torch.no_grad()
    def validate() -> tuple[None, float]:
        assert validation is not None
        parts = (states_of(part) for part in torch.split(validation.prepared, converter.config.batch))
        states = functools.reduce(PromptStates.followed_by, parts)
        count = len(validation)
        edges = [span[0] + (span[1] - span[0]) * place // _DRAWS for place in range(_DRAWS + 1)]
        losses = []
        for place in range(_DRAWS):
            seeds = (seed_of(config.seed, number, place, 3) for number in range(count))
            part = (edges[place], max(edges[place + 1], edges[place] + 1))
            rows = (draw_row(torch.Generator().manual_seed(seed), part, shape) for seed in seeds)
            times, noise = zip(*rows, strict=True)
            text_of, drawn = torch.arange(count, device="cpu"), torch.tensor(times, device="cpu")
            losses.append(loss(states, text_of, validation.latents, drawn, torch.stack(noise)))
        return None, float(torch.cat(losses).mean())

    norms = {id(parameter) for parameter in tuned.parameters.values() if parameter.ndim == 1}

    def group(name: str) -> tuple[str, bool]:
        return name.split(".")[0], id(tuned.parameters[name]) not in norms

    return Descent(
        tuned.parameters,
        step_losses,
        group,
        lambda key, step: config.rate(key[0], step),
        lambda key: config.weight_decay if key[1] else 0.0,
        steps=config.steps,
        clip_norm=config.clip_norm,
        scaled=converter.model.dtype == torch.float16,
        validate=None if validation is None else validate,
        validate_every=config.validate_every,
        patience=config.patience,
        folder=folder,
        fingerprint=fingerprint,
        save_every=config.save_every,
        report=report,
    )


def _listed(name: str, images: Iterable[ImageSource]) -> list[ImageSource]:
    check_sources(images)
    listed = list(images)
    if not listed:
        raise ValueError(f"{name}: got none, expected at least one image")
    return listed


def _centre(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest part of an image, at its centre, that has the shape of (height, width) pixels."""
    height, width = size
    scale = min(image.height / height, image.width / width)
    high, wide = max(1, round(height * scale)), max(1, round(width * scale))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return image.crop((left, top, left + wide, top + high))


def _usable(prepared: Tensor | ImageError) -> Tensor:
    if isinstance(prepared, ImageError):
        raise prepared
    return prepared


def _fingerprint(
    base: Conversion, config: TuneConfig, pictures: Pictures, validation: Pictures | None
) -> dict[str, Any]:
    """All that changes the result; not the device, nor what only changes memory or time."""
    return {
        **model_settings(base.engine, {"vision": base.vision}),
        **base.settings(),
        "images": pictures.digest,
        "validation": None if validation is None else validation.digest,
        **{f"tune.{key}": value for key, value in asdict(config).items() if key not in _NEUTRAL},
    }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
