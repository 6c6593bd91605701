"""ControlNets: a copy of the UNet's encoder that reads a picture beside the latent, and adds to the UNet's skips.

Zhang, Rao, Agrawala 2023, "Adding Conditional Control to Text-to-Image Diffusion Models". Several nets are summed, as
in diffusers' MultiControlNetModel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from dsd_fast.images.canny import canny
from dsd_fast.images.load import load_image
from dsd_fast.kernels.common.host import as_tensor, ordinary
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.architecture import TIME_IDS
from dsd_fast.models.errors import ModelError
from dsd_fast.models.hub import find_folder
from dsd_fast.models.load import (
    DIFFUSERS_STEM,
    check_weights,
    load_network,
    read_json,
    resolve_device,
    resolve_dtype,
    weight_patterns,
)
from dsd_fast.models.private import uncompiled

if TYPE_CHECKING:
    from dsd_fast.models.bundle import Model


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet and what it is shown.

    Attributes:
        net: diffusers ControlNetModel, as `load_controlnet` gives it; of a compiled one, the module inside.
        condition: from the picture, at the network's input size, to what the net sees; None: the picture itself.
        scale: factor on the net's residuals, "conditioning_scale".
    """

    net: Any
    condition: Callable[[Image.Image], Image.Image] | None = canny
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Raises ModelError or ValueError for what is no ControlNet, no function or no number."""
        # Past the guard of a frozen dataclass.
        object.__setattr__(self, "net", uncompiled(self.net))
        if "ControlNetModel" not in (cls.__name__ for cls in type(self.net).__mro__):
            raise ModelError(f"net is of type {type(self.net).__name__}, expected a diffusers ControlNetModel")
        if self.net.config.global_pool_conditions:
            raise ModelError("net has global_pool_conditions, expected a ControlNet with a residual at each position")
        if self.condition is not None and not callable(self.condition):
            raise ValueError(f"condition is of type {type(self.condition).__name__}, expected a function or None")
        if not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale!r}, expected a finite number")

    def settings(self) -> dict[str, Any]:
        """What of it changes results, but for the net's weights, as JSON."""
        return {"condition": None if self.condition is None else named(self.condition), "scale": self.scale}

    def prepare(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """The condition of a picture as the net takes it.

        The picture is resized first, by Pillow's bicubic filter, as in the official code of "Not All Diffusion Model
        Activations Have Been Evaluated as Discriminative Features": edges depend on the size.

        Args:
            image: a Pillow image.
            size: (height, width) in pixels of the diffusion model's input.

        Returns:
            (3, height, width) float32 in [0, 1], contiguous.

        Raises:
            ImageError: the picture, or what `condition` made of it, cannot be converted to RGB.
            ValueError: `condition` changed the size.
        """
        shape = (size[1], size[0])
        picture = load_image(image)
        if picture.size != shape:
            picture = picture.resize(shape, Image.Resampling.BICUBIC)
        if self.condition is not None:
            picture = load_image(self.condition(picture))
        if picture.size != shape:
            raise ValueError(f"condition made {picture.size} of a picture of (width, height) = {shape}")
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return pixels.view(*size, 3).permute(2, 0, 1).contiguous().float().div_(255)


@ordinary()
def load_controlnet(
    source: str | os.PathLike[str] = "mini",
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """A diffusers ControlNetModel, in eval mode and without gradients to its weights.

    Only safetensors and JSON files are read or downloaded.

    Args:
        source: "mini", the ControlNet for edges of the shipped model; a folder in diffusers' layout; or a hub id.
        device, dtype, revision, variant, local_files_only, cache_dir: as in `dsd_fast.load`.

    Raises:
        ModelError: naming what was given and what was expected, as `dsd_fast.load` does.
    """
    from diffusers import ControlNetModel

    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
    folder, _ = find_folder(
        source,
        ["config.json", *weight_patterns(DIFFUSERS_STEM, variant)],
        what="ControlNet",
        shipped="controlnet",
        revision=revision,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    name = os.fspath(source)
    what = f"ControlNet {name!r}"
    check_weights(folder, DIFFUSERS_STEM, variant, what)
    kind = read_json(folder / "config.json", name).get("_class_name")
    if kind != "ControlNetModel":
        raise ModelError(f"{what} is a {kind}, expected a ControlNetModel")
    net = load_network(ControlNetModel, folder, torch_dtype, variant, what)
    # As the UNet: the layout that convolutions run fastest in.
    return net.requires_grad_(False).to(torch_device, memory_format=torch.channels_last)


def check_controls(controls: Sequence[Control], model: Model) -> None:
    """Refuses nets that are not made for a model's UNet.

    Raises:
        ModelError: naming the net by its position, and both sides.
    """
    unet, text = model.unet.config, ("addition_embed_type", "projection_class_embeddings_input_dim")
    for number, control in enumerate(controls):
        net, what = control.net, f"controls[{number}]"
        pairs = [(key, net.config.get(key), unet.get(key)) for key in ("in_channels", *text)]
        if _reads_text(net):
            pairs.append(("cross_attention_dim", net.config.cross_attention_dim, unet.cross_attention_dim))
        pairs.append(("residuals of (channels, halvings)", _residuals(net), _residuals(model.unet)))
        pairs.append(("pixels per latent position", _factor(net), model.vae_scale_factor))
        pairs.append(("dtype", net.dtype, model.dtype))
        pairs.append(("device", net.device, model.device))
        for key, given, expected in pairs:
            if given != expected:
                raise ModelError(f"{what}: the ControlNet has {key} = {given}, expected the UNet's {expected}")


def control_residuals(
    controls: Sequence[Control],
    conditions: Sequence[Tensor],
    latents: Tensor,
    timesteps: Tensor | Sequence[int] | int,
    states: Tensor,
    *,
    pooled: Tensor | None = None,
    time_ids: Tensor | None = None,
    latent_index: Sequence[int] | Tensor | None = None,
    text_index: Sequence[int] | Tensor | None = None,
    condition_index: Sequence[int] | Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """What the nets add to the UNet's skips and to its middle, as `Plan.run` takes them: Σ scaleᵢ · netᵢ.

    Row b is latent ``latent_index[b]`` with text ``text_index[b]`` and condition ``condition_index[b]``; without an
    index row b takes number b, or the only one. Differentiable in latents, states and conditions.

    Args:
        controls: one or more, made for the same UNet (`check_controls`).
        conditions: of each control (N, 3, H, W) in [0, 1], as from `Control.prepare`; any floating-point type.
        latents: (P, C, h, w) as the UNet is given them, in the nets' type and on their device.
        timesteps: one, or (P,).
        states: (M, T, E) text states.
        pooled: (M, E2), SDXL's pooled states.
        time_ids: (6,) or (P, 6), SDXL's image sizes.

    Returns:
        (down, mid): a tensor (B, C', h', w') for each of the UNet's skips, and (B, C', h', w') for its middle.

    Raises:
        ValueError: shapes, indices, types or devices that do not fit; naming the argument.
    """
    if not controls or len(controls) != len(conditions):
        raise ValueError(f"conditions: got {len(conditions)} for {len(controls)} controls, expected one for each")
    device, dtype = latents.device, latents.dtype
    times = upload(as_tensor(timesteps), device)
    if times.ndim > 1 or (times.ndim == 1 and len(times) != len(latents)):
        raise ValueError(f"timesteps: got {tuple(times.shape)}, expected one or ({len(latents)},)")
    times = times.expand(len(latents))
    for number, (control, condition) in enumerate(zip(controls, conditions, strict=True)):
        _check_inputs(control.net, number, condition, latents, states)
        if len(condition) != len(conditions[0]):
            raise ValueError(f"conditions[{number}]: got {len(condition)} pictures, conditions[0] {len(conditions[0])}")
    if any(control.net.config.addition_embed_type == "text_time" for control in controls):
        if pooled is None or pooled.ndim != 2 or len(pooled) != len(states):
            got = None if pooled is None else tuple(pooled.shape)
            raise ValueError(f"pooled: got {got}, expected ({len(states)}, width): a ControlNet reads pooled states")
        if time_ids is None or time_ids.shape not in ((TIME_IDS,), (len(latents), TIME_IDS)):
            got = None if time_ids is None else tuple(time_ids.shape)
            raise ValueError(
                f"time_ids: got {got}, expected ({TIME_IDS},) or ({len(latents)}, {TIME_IDS}): "
                "a ControlNet reads image sizes"
            )
        time_ids = upload(time_ids, device).expand(len(latents), TIME_IDS)
    given = {
        "latent_index": (latent_index, len(latents)),
        "text_index": (text_index, len(states)),
        "condition_index": (condition_index, len(conditions[0])),
    }
    lengths = [count if index is None else len(index) for index, count in given.values()]
    rows = next((length for length in lengths if length != 1), 1)
    of_latent, of_text, of_condition = (_index(name, index, count, rows) for name, (index, count) in given.items())
    of_latent, of_text = upload(of_latent, device), upload(of_text, device)
    added = None
    if pooled is not None and time_ids is not None:
        added = {"text_embeds": pooled[of_text], "time_ids": time_ids[of_latent]}
    total: list[Tensor] = []
    for control, condition in zip(controls, conditions, strict=True):
        pictures = upload(condition[upload(of_condition, condition.device)], device, dtype)
        down, mid = control.net(
            latents[of_latent],
            times[of_latent],
            states[of_text],
            pictures,
            conditioning_scale=control.scale,
            added_cond_kwargs=added,
            return_dict=False,
        )
        total = [a + b for a, b in zip(total, (*down, mid), strict=True)] if total else [*down, mid]
    *down, mid = total
    return down, mid


def _check_inputs(net: Any, number: int, condition: Tensor, latents: Tensor, states: Tensor) -> None:
    channels, factor = net.config.in_channels, _factor(net)
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"latents: got {tuple(latents.shape)}, expected (P, {channels}, h, w)")
    wanted = (3, latents.shape[2] * factor, latents.shape[3] * factor)
    if condition.ndim != 4 or condition.shape[1:] != wanted or not condition.is_floating_point():
        raise ValueError(
            f"conditions[{number}]: got {tuple(condition.shape)} {condition.dtype}, expected (N, {wanted[0]}, "
            f"{wanted[1]}, {wanted[2]}) floating point, {factor} pixels a latent position"
        )
    width = net.config.cross_attention_dim
    if states.ndim != 3 or (_reads_text(net) and states.shape[2] != width):
        raise ValueError(f"states: got {tuple(states.shape)}, expected (M, T, {width}) for controls[{number}]")
    for name, value in (("latents", latents), ("states", states)):
        if value.dtype != net.dtype or value.device != net.device:
            raise ValueError(
                f"{name}: got {value.dtype} on {value.device}, expected {net.dtype} on {net.device}, "
                f"as controls[{number}]"
            )


def _index(name: str, value: Sequence[int] | Tensor | None, count: int, rows: int) -> Tensor:
    """(rows,) int64 where ``value`` is, every value from 0 to count − 1."""
    if value is None:
        if count not in (1, rows):
            raise ValueError(f"{name}: needed when there are {count} for {rows} rows")
        return torch.arange(count, device="cpu").expand(rows)
    index = as_tensor(value)
    if index.ndim != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
        raise ValueError(f"{name}: got {tuple(index.shape)} {index.dtype}, expected a list of integers")
    if len(index) != rows:
        raise ValueError(f"{name}: got {len(index)} entries, expected {rows}")
    if rows and not 0 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(f"{name}: values from {int(index.min())} to {int(index.max())}, expected 0 to {count - 1}")
    return index.long()


def _residuals(network: Any) -> list[tuple[int, int]]:
    """Channels and number of halvings of every skip of an encoder, the middle last."""
    found, level = [(network.conv_in.out_channels, 0)], 0
    for block in network.down_blocks:
        found += [(resnet.out_channels, level) for resnet in block.resnets]
        for downsampler in block.downsamplers or ():
            level += 1
            found.append((downsampler.out_channels, level))
    middle = network.mid_block.resnets[-1].out_channels if network.mid_block is not None else found[-1][0]
    return [*found, (middle, level)]


def named(function: Callable[..., Any]) -> str:
    """The same in every process, as far as a function has a name; an object is told by its representation."""
    if isinstance(function, partial):
        given = [repr(value) for value in function.args] + [f"{k}={v!r}" for k, v in sorted(function.keywords.items())]
        return f"{named(function.func)}({', '.join(given)})"
    if isinstance(function, FunctionType | BuiltinFunctionType | type):
        return f"{function.__module__}.{function.__qualname__}"
    return f"{type(function).__module__}.{function!r}"


def _reads_text(net: Any) -> bool:
    return any(getattr(block, "has_cross_attention", False) for block in (*net.down_blocks, net.mid_block))


def _factor(net: Any) -> int:
    """Pixels of the condition per latent position along one side."""
    return int(2 ** (len(net.config.conditioning_embedding_out_channels) - 1))
