"""The noise loss: how far what the network predicts for noised images is from what it was trained to predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsd_fast.diffusion import NoiseSchedule
from dsd_fast.engine.engine import Engine
from dsd_fast.engine.latents import Noised
from dsd_fast.engine.texts import Texts
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.prompts import PromptStates


def draw_row(random: torch.Generator, span: tuple[int, int], shape: Sequence[int]) -> tuple[int, Tensor]:
    """Draw a timestep from span[0] up to, not including, span[1], then noise, (\\*shape) float32 on the CPU."""
    time = int(torch.randint(*span, (), generator=random, device="cpu"))
    return time, torch.randn(tuple(shape), generator=random, dtype=torch.float32, device="cpu")


class NoiseLoss:
    """The mean square of what the network predicts wrongly.

    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 14; as in the training scripts of diffusers against
    what the network was trained to predict: noise, velocity or the sample.

    Args:
        engine: of the network.
        checkpoint: whether activations are computed again for the gradient, see :meth:`Engine.predict`.
    """

    def __init__(self, engine: Engine, *, checkpoint: bool = False) -> None:
        self._engine, self._checkpoint = engine, checkpoint
        self._at_once: int | None = None

    def __call__(
        self,
        texts: PromptStates,
        text_of: Tensor,
        clean: Tensor,
        times: Tensor,
        noise: Tensor,
        backward: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Measure B rows, (B,).

        Args:
            texts: M of them, leaves where they want a gradient.
            text_of: (B,) int64 on the CPU, the text of each row.
            clean: (B, C, h, w) latents, on any device.
            times: (B,) int64 on the CPU.
            noise: (B, C, h, w), on any device.
            backward: called with the sum of squares, (), of one micro-batch after the other, together ``C·h·w`` times
                the sum of what is returned; not with the mean, since float16 has no gradients as small. None: without
                gradients.
        """
        engine = self._engine
        model, shown = engine.model, Texts(texts)
        clean = upload(clean, model.device, model.dtype)
        noised = Noised.rows(model.schedule, clean, noise, times)
        wanted = _wanted(model.schedule, clean, noised)
        predict = engine.predict(shown, text_of, gradients=1, checkpoint=self._checkpoint)

        def squares(part: slice) -> Tensor:
            wrong = predict(noised.latents, times, part).to(wanted.dtype) - wanted[part]
            return wrong.square().flatten(1)

        if backward is None:
            with torch.no_grad():
                return squares(slice(None)).mean(1)
        self._at_once, losses = self._at_once or engine.rows_differentiated(shown), []
        for start in range(0, len(text_of), self._at_once):
            own = squares(slice(start, start + self._at_once))
            backward(own.sum())
            losses.append(own.detach().mean(1))
        return torch.cat(losses)


def _wanted(schedule: NoiseSchedule, clean: Tensor, noised: Noised) -> Tensor:
    """What the network is to predict, (n, C, h, w), in the noise's type."""
    kind, epsilon = schedule.prediction_type, noised.noise
    if kind == "epsilon":
        return epsilon
    if kind == "sample":
        return clean.to(epsilon.dtype)
    signal, sigma = schedule.coefficients(noised.timesteps)
    signal, sigma = (upload(each, clean.device, epsilon.dtype).view(-1, 1, 1, 1) for each in (signal, sigma))
    return signal * epsilon - sigma * clean.to(epsilon.dtype)
