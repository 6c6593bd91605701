"""The models and ControlNets that the official feature extractor knows by short names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dsd_fast.models import Model, from_pipeline, load
from dsd_fast.models.controlnet import Control, load_controlnet
from dsd_fast.models.load import resolve_device

Device = str | torch.device


class Version(NamedTuple):
    """
    Attributes:
        source: hub id, or "mini".
        families: of :class:`~dsd_fast.models.Model`, that a model under this name may have.
        variant: of the weight files.
        scheduler: class of diffusers that the official code puts in the place of the model's own.
    """

    source: str
    families: tuple[str, ...]
    variant: str | None = None
    scheduler: str | None = None


VERSIONS = {
    "1-5": Version("stable-diffusion-v1-5/stable-diffusion-v1-5", ("sd1",)),
    "2-1": Version("stabilityai/stable-diffusion-2-1-base", ("sd2",), scheduler="EulerDiscreteScheduler"),
    "xl": Version("stabilityai/stable-diffusion-xl-base-1.0", ("sdxl",), "fp16"),
    "pgv2": Version("playgroundai/playground-v2-1024px-aesthetic", ("sdxl",), "fp16"),
    "mini": Version("mini", ("sd1", "sd2")),
}
# Of other architectures than the UNets that this package's engine runs.
_UNSUPPORTED = ("pixart-sigma", "pixart-sigma-512", "pixart-alpha", "if", "hunyuan", "flux")

_CONTROLS = {"canny": "lllyasviel/sd-controlnet-canny", "canny-xl": "diffusers/controlnet-canny-sdxl-1.0"}
_DTYPES = ("float16", "bfloat16", "float32")


def version_named(name: str) -> Version:
    """
    Raises:
        NotImplementedError: an official version of another architecture.
        ValueError: no official version.
    """
    if name in _UNSUPPORTED:
        raise NotImplementedError(f"version: {name!r} is no Stable Diffusion UNet; supported are {', '.join(VERSIONS)}")
    if name not in VERSIONS:
        raise ValueError(f"version: got {name!r}, expected one of {', '.join(VERSIONS)}")
    return VERSIONS[name]


def load_version(name: str, device: Device, dtype: str, lora: str | None, lora_filename: str | None) -> Model:
    """A model by its official name, with the LoRA active.

    Args:
        dtype: "float16", "bfloat16" or "float32".
        lora: with ``lora_filename`` the folder or hub id of a LoRA; without it a whole model that is loaded instead.

    Raises:
        NotImplementedError, ValueError: as :func:`version_named` and :func:`dsd_fast.load`.
    """
    version = version_named(name)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected {' or '.join(_DTYPES)}")
    if lora_filename is not None and lora is None:
        raise ValueError("offline_lora_filename: given without offline_lora, the folder that it lies in")
    source = version.source if lora is None or lora_filename is not None else lora
    model = load(source, device=device, dtype=dtype, variant=version.variant)
    check_family(name, model)
    if version.scheduler is not None:
        import diffusers

        scheduler = getattr(diffusers, version.scheduler)
        model = model.with_scheduler(scheduler.from_config(model.new_scheduler().config))
    if lora is not None and lora_filename is not None:
        model.load_lora(lora, "offline", lora_filename)
    return model


def load_other(source: str, device: Device, dtype: str, lora: str | None, lora_filename: str | None) -> Model:
    """A model by another name than the official ones, with the LoRA active.

    Args:
        source: see :func:`dsd_fast.load`.
        lora, lora_filename: folder or hub id, and file in it.

    Raises:
        ValueError: one of the last two without the other, and as :func:`dsd_fast.load`.
    """
    if (lora is None) != (lora_filename is None):
        raise ValueError("offline_lora, offline_lora_filename: with a model of one's own both are given, or neither")
    model = load(source, device=device, dtype=dtype)
    if lora is not None:
        model.load_lora(lora, "offline", lora_filename)
    return model


def version_of(source: str, model: Model) -> str:
    """The official version whose ControlNets fit a model."""
    if source == "mini":
        return "mini"
    return next(name for name, version in VERSIONS.items() if model.family in version.families)


def own_model(given: Any, version: str, device: Device, lora: str | None, lora_filename: str | None) -> Model:
    """The model of an external pipeline, or the model itself, which must be what and where it was said to be.

    Raises:
        NotImplementedError, ValueError: as :func:`check_family`; a LoRA besides, or a model on another device.
    """
    for name, value in (("offline_lora", lora), ("offline_lora_filename", lora_filename)):
        if value is not None:
            raise ValueError(f"{name}: got {value!r}, but an external model brings its own; load the LoRA into that")
    model = given if isinstance(given, Model) else from_pipeline(given)
    check_family(version, model)
    wanted = resolve_device(device)
    if wanted.type != model.device.type or wanted.index not in (None, model.device.index):
        raise ValueError(f"device: got {str(wanted)!r}, but the external model is on {str(model.device)!r}")
    return model


def check_family(name: str, model: Model) -> None:
    """
    Raises:
        NotImplementedError, ValueError: as :func:`version_named`; a model of another family than the version's.
    """
    families = version_named(name).families
    if model.family not in families:
        raise ValueError(f"version: got {name!r}, but the model is of family {model.family!r}, not {families[0]!r}")


def load_controls(names: Sequence[str | Control] | None, version: str, model: Model) -> tuple[Control, ...]:
    """ControlNets by their official names, in the model's type and on its device; the official ones are float16.

    Args:
        names: of "canny", which with the version "mini" is the shipped one, and "canny-xl"; or Controls as they are.

    Raises:
        NotImplementedError: "depth", whose preprocessor is another package's.
        ValueError: one string, or an unknown name.
    """
    if isinstance(names, str):
        raise ValueError(f"control: got the str {names!r}, expected a list of names")
    return tuple(each if isinstance(each, Control) else _load_control(each, version, model) for each in names or ())


def _load_control(name: str, version: str, model: Model) -> Control:
    if name == "depth":
        raise NotImplementedError(
            "control: 'depth' needs the MiDaS preprocessor of controlnet_aux; give dsd_fast.models.controlnet.Control"
            "(load_controlnet('lllyasviel/sd-controlnet-depth'), condition=your function)"
        )
    if name not in _CONTROLS:
        raise ValueError(f"control: got {name!r}, expected of {', '.join(_CONTROLS)}, or Controls")
    source = "mini" if version == "mini" and name == "canny" else _CONTROLS[name]
    return Control(load_controlnet(source, device=model.device, dtype=model.dtype))
