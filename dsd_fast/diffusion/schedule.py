"""The noise schedule: how a latent is noised at a timestep, and what a model's output says about it.

With ᾱ_t the cumulative product of 1 − β up to timestep t, a noised latent is z_t = √ᾱ_t z₀ + √(1 − ᾱ_t) ε (Ho et al.
2020, "Denoising Diffusion Probabilistic Models", eq. 4). A model predicts ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) z₀ (Salimans &
Ho 2022, "Progressive Distillation", section 4 and appendix D), or z₀ itself ("sample"). Each of the three determines
the others.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsd_fast.diffusion.schedulers import check_scheduler
from dsd_fast.kernels.common.host import as_tensor
from dsd_fast.kernels.common.transfer import upload

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

_COSINE_MAX_BETA = 0.999


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Cumulative alphas of a discrete diffusion process and what its model predicts.

    Coefficients are taken in float64 and applied in the tensors' own dtype, float32 at least; results come back in the
    dtype of the first tensor argument. Methods are differentiable and run on the tensors' device. Timesteps are an int,
    a sequence of ints or an integer tensor with one entry for all rows or one per row; keep tensors of timesteps on the
    CPU, because checking them elsewhere waits for the device.

    Attributes:
        alphas_cumprod: ᾱ, (S,) float64 on the CPU.
        prediction_type: "epsilon", "v_prediction" or "sample".
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod
        if abar.ndim != 1 or abar.numel() == 0 or abar.dtype != torch.float64 or abar.device.type != "cpu":
            raise ValueError(
                f"alphas_cumprod has shape {tuple(abar.shape)}, dtype {abar.dtype}, device {abar.device}; "
                "expected a non-empty 1-D float64 CPU tensor"
            )
        if not bool(((abar >= 0) & (abar <= 1)).all()):
            raise ValueError("alphas_cumprod holds values outside 0 to 1")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {self.prediction_type!r}, expected one of {PREDICTION_TYPES}")

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """Reads the schedule of a diffusers scheduler or of its config, without changing it.

        A scheduler's own ᾱ counts. diffusers holds it in float32; where it is, to that rounding, what the config's
        betas give, it is computed from them in float64. Betas "linear", "scaled_linear" and "squaredcos_cap_v2" (Nichol
        & Dhariwal 2021, eq. 17), `trained_betas`, and `rescale_betas_zero_snr` (Lin et al. 2023, algorithm 1; ᾱ of the
        last timestep is then exactly 0, where some diffusers schedulers put 2⁻²⁴) are understood.

        Raises:
            ValueError: no scheduler of a discrete diffusion process (a flow-matching one); a prediction type of another
                kind; a config with betas of another kind; a scheduler whose ᾱ does not say how it adds noise
                (:func:`dsd_fast.diffusion.schedulers.check_scheduler`).
        """
        if not isinstance(scheduler, Mapping) and not hasattr(scheduler, "alphas_cumprod"):
            # Such a scheduler may carry beta_start and the like over from another one's config.
            raise ValueError(f"scheduler is a {type(scheduler).__name__}, expected one of a discrete diffusion process")
        if isinstance(scheduler, Mapping):
            return cls(_alphas_cumprod(scheduler), scheduler.get("prediction_type") or "epsilon")
        own = as_tensor(scheduler.alphas_cumprod).detach().to("cpu", torch.float64, copy=True)
        try:
            exact = _alphas_cumprod(scheduler.config)
        except ValueError:
            # Betas that are not known here; the numbers are there all the same.
            exact = own
        # A product of S factors in float32, each rounded, which cancels about as a random walk does; 2⁻²⁴ as above.
        eps = torch.finfo(torch.float32).eps
        close = own.shape == exact.shape and torch.allclose(own, exact, rtol=4 * len(own) ** 0.5 * eps, atol=eps)
        schedule = cls(exact if close else own, scheduler.config.get("prediction_type") or "epsilon")
        check_scheduler(scheduler, schedule.alphas_cumprod)
        return schedule

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps S; the legal ones are 0 … S − 1."""
        return self.alphas_cumprod.numel()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: int | Sequence[int] | Tensor) -> Tensor:
        """z_t = √ᾱ_t z₀ + √(1 − ᾱ_t) ε: what the UNet is given at timestep t.

        Equal to an Euler scheduler's `add_noise` followed by `scale_model_input`.

        Args:
            latents: z₀, (N, C, h, w), scaled as the UNet expects them.
            noise: ε, a shape that broadcasts to that of `latents`, usually (C, h, w) or (N, C, h, w).
            timesteps: one, or (N,).

        Raises:
            ValueError: timesteps out of range or not integers, or shapes that do not fit.
        """
        check_noise(noise, latents)
        signal, sigma = self._coefficients(timesteps, latents)
        dtype = sigma.dtype
        return (signal * latents.to(dtype) + sigma * upload(noise, latents.device, dtype)).to(latents.dtype)

    def coefficients(self, timesteps: int | Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t) of S timesteps, (S,) float64 on the CPU each.

        Raises:
            ValueError: timesteps out of range or not integers.
        """
        abar = self.alphas_cumprod[self._timestep_index(timesteps)]
        return abar.sqrt(), (1.0 - abar).sqrt()

    def sigma(self, t: float) -> float:
        """√((1 − ᾱ_t) / ᾱ_t) of one timestep; between two of the schedule log σ is linear, as in diffusers.

        Raises:
            ValueError: a timestep out of range.
        """
        low, share = math.floor(t), t - math.floor(t)
        signal, sigma = self.coefficients([low, low + (share > 0)])
        below, above = (sigma / signal).tolist()
        return float(below if not share else below ** (1 - share) * above**share)

    def to_epsilon(self, model_output: Tensor, latents: Tensor, timesteps: int | Sequence[int] | Tensor) -> Tensor:
        """The noise ε that a model output stands for.

        Args:
            model_output: (N, C, h, w), the UNet's output in the schedule's prediction type.
            latents: z_t, (N, C, h, w), the UNet's input.
            timesteps: one, or (N,).

        Raises:
            ValueError: timesteps out of range or not integers, shapes that do not fit, or a "sample" prediction at a
                timestep without noise, which leaves ε undetermined.
        """
        return self._convert(model_output, latents, timesteps, "epsilon")

    def to_v(self, model_output: Tensor, latents: Tensor, timesteps: int | Sequence[int] | Tensor) -> Tensor:
        """v = √ᾱ_t ε − √(1 − ᾱ_t) z₀; arguments and errors as for `to_epsilon`."""
        return self._convert(model_output, latents, timesteps, "v_prediction")

    def to_original(self, model_output: Tensor, latents: Tensor, timesteps: int | Sequence[int] | Tensor) -> Tensor:
        """The clean latent z₀; arguments as for `to_epsilon`.

        Raises:
            ValueError: as for `to_epsilon`, and for an "epsilon" prediction at a timestep without signal (zero terminal
                SNR), which leaves z₀ undetermined.
        """
        return self._convert(model_output, latents, timesteps, "sample")

    def _convert(self, output: Tensor, latents: Tensor, timesteps: int | Sequence[int] | Tensor, target: str) -> Tensor:
        if output.shape != latents.shape:
            raise ValueError(f"model_output has shape {tuple(output.shape)}, expected {tuple(latents.shape)}")
        a, s = self._coefficients(timesteps, output, latents, divides=target != self.prediction_type)
        if target == self.prediction_type:
            return output
        x, z = output.to(a.dtype), latents.to(a.dtype)
        if self.prediction_type == "epsilon":
            result = (z - s * x) / a if target == "sample" else (x - s * z) / a
        elif self.prediction_type == "v_prediction":
            result = a * z - s * x if target == "sample" else a * x + s * z
        else:
            result = (z - a * x) / s if target == "epsilon" else (a * z - x) / s
        return result.to(output.dtype)

    def _coefficients(
        self, timesteps: int | Sequence[int] | Tensor, *tensors: Tensor, divides: bool = False
    ) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t), shaped to broadcast over rows; with `divides`, a divisor of 0 is refused."""
        first = tensors[0]
        index = self._timestep_index(timesteps)
        rows = first.shape[0] if first.ndim else 1
        if index.numel() not in (1, rows):
            raise ValueError(f"timesteps has {index.numel()} entries, expected 1 or {rows}, one per row")
        abar = self.alphas_cumprod[index]
        if divides and self.prediction_type != "v_prediction":
            bad = abar == (0.0 if self.prediction_type == "epsilon" else 1.0)
            if bool(bad.any()):
                lacks = "signal" if self.prediction_type == "epsilon" else "noise"
                raise ValueError(
                    f"timesteps holds {int(index[bad][0])}, where this schedule has no {lacks}: "
                    f"a prediction of type {self.prediction_type!r} cannot be converted there"
                )
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
        shape = (-1,) + (1,) * (first.ndim - 1)
        factors = upload(torch.stack(self.coefficients(index)), first.device, dtype)  # (2, 1 or N)
        signal, sigma = (each.reshape(shape) for each in factors)
        return signal, sigma

    def _timestep_index(self, timesteps: int | Sequence[int] | Tensor) -> Tensor:
        index = as_tensor(timesteps).cpu().reshape(-1)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise ValueError(f"timesteps has dtype {index.dtype}, expected integers")
        bad = (index < 0) | (index >= self.num_train_timesteps)
        if bool(bad.any()):
            raise ValueError(f"timesteps holds {int(index[bad][0])}, expected 0 to {self.num_train_timesteps - 1}")
        return index.long()


def _alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """ᾱ of a diffusers scheduler config, (S,) float64."""
    abar = torch.cumprod(1.0 - _betas(config), dim=0)
    if config.get("rescale_betas_zero_snr"):
        root = abar.sqrt()
        abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return abar


def _betas(config: Mapping[str, Any]) -> Tensor:
    """β of a diffusers scheduler config, (S,) float64."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64, device="cpu")
    missing = [key for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule") if key not in config]
    if missing:
        raise ValueError(
            f"scheduler {config.get('_class_name', 'config')} lacks {', '.join(missing)}, "
            "expected a scheduler of a discrete diffusion process"
        )
    steps, start, end = int(config["num_train_timesteps"]), float(config["beta_start"]), float(config["beta_end"])
    kind = config["beta_schedule"]
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64, device="cpu") ** 2
    if kind == "squaredcos_cap_v2":

        def abar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        ratios = [abar((i + 1) / steps) / abar(i / steps) for i in range(steps)]
        return torch.tensor([min(1 - ratio, _COSINE_MAX_BETA) for ratio in ratios], dtype=torch.float64, device="cpu")
    raise ValueError(f"beta_schedule is {kind!r}, expected linear, scaled_linear or squaredcos_cap_v2")


def check_noise(noise: Tensor, latents: Tensor) -> None:
    """Refuses noise that does not broadcast to latents.

    Raises:
        ValueError: telling both shapes.
    """
    ends = zip(reversed(noise.shape), reversed(latents.shape), strict=False)
    if noise.ndim > latents.ndim or any(size not in (1, expected) for size, expected in ends):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, expected one that broadcasts to {tuple(latents.shape)}"
        )
