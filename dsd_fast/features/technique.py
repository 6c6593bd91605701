"""What keeps features true to the image (Meng et al., arXiv 2410.06719, section 5): prompts, ControlNets, LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsd_fast.models.controlnet import Control
from dsd_fast.models.prompts import check_unicode


@dataclass(frozen=True)
class Technique:
    """One way to extract features; the parts combine. With none of them it is the plain way.

    Attributes:
        name: in tables and pictures; made of the parts unless given.
        prompts: one prompt for all images, or one each, instead of the request's.
        controls: ControlNets, whose residuals are summed.
        adapter: names of the adapters active, PEFT's of any kind, in the UNet and the text encoders, () for none; None
            leaves the model as it stands.
        denoise_from: noise the image to this timestep and denoise it from there to each timestep asked for, instead of
            noising it to those timesteps.
        denoise_steps: network calls of the way down to each timestep; None: one way through every timestep for all.
        inversion: follow the deterministic sampler backwards from the clean latent to the timesteps asked for (DDIM
            inversion, Song et al. 2021) instead of adding noise. ControlNets take part, save with the official
            timesteps: the official walk leaves them out.

    Raises:
        ValueError: parts that exclude each other, or a value that is not allowed.
    """

    name: str = ""
    prompts: str | Sequence[str] | None = None
    controls: Sequence[Control] = ()
    adapter: str | Sequence[str] | None = None
    denoise_from: int | None = None
    denoise_steps: int | None = None
    inversion: bool = False

    def __post_init__(self) -> None:
        check_unicode("name", self.name)
        if self.inversion and self.denoise_from is not None:
            raise ValueError("inversion, denoise_from: both are given, and each says how the latents are made")
        if self.denoise_steps is not None and self.denoise_from is None:
            raise ValueError("denoise_steps: given without denoise_from")
        if self.denoise_steps is not None and self.denoise_steps < 1:
            raise ValueError(f"denoise_steps: got {self.denoise_steps}, expected at least 1")
        if self.prompts is not None and not isinstance(self.prompts, str):
            object.__setattr__(self, "prompts", tuple(self.prompts))
        if isinstance(self.controls, Control):
            raise ValueError("controls: got one Control, expected a sequence of them")
        object.__setattr__(self, "controls", tuple(self.controls))
        if self.adapter is not None:
            object.__setattr__(
                self, "adapter", (self.adapter,) if isinstance(self.adapter, str) else tuple(self.adapter)
            )
        if not self.name:
            object.__setattr__(self, "name", self._described())

    def _described(self) -> str:
        parts = []
        if self.prompts is not None:
            parts.append("prompt")
        if self.controls:
            parts.append("control" if len(self.controls) == 1 else f"{len(self.controls)} controls")
        if self.adapter:
            parts.append(f"lora {' '.join(self.adapter)}")
        if self.denoise_from is not None:
            parts.append(f"from t = {self.denoise_from}")
        if self.inversion:
            parts.append("inversion")
        return " + ".join(parts) or "plain"

    def settings(self) -> dict[str, Any]:
        """What of it changes results, but for the weights of its networks, as JSON."""
        return {
            "prompts": list(self.prompts) if isinstance(self.prompts, tuple) else self.prompts,
            "controls": [each.settings() for each in self.controls],
            "adapter": None if self.adapter is None else list(self.adapter),
            "denoise_from": self.denoise_from,
            "denoise_steps": self.denoise_steps,
            "inversion": self.inversion,
        }
