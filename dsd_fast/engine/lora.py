"""What is trained in a network without touching the model that others share: its own UNet, and a LoRA in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dsd_fast.engine.engine import Engine
from dsd_fast.kernels.common.host import ordinary
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.private import private
from dsd_fast.models.tuners import adapter_names
from dsd_fast.unet.adapters import activate, active_names

if TYPE_CHECKING:
    from dsd_fast.models import Model


def own_model(engine: Engine, copied: Callable[[str], bool] = lambda name: False) -> Model:
    """Give the engine's model with a UNet of its own on the same weights, under the engine's adapters as they are now.

    Args:
        copied: by a parameter's name, whether it is the UNet's own as well.
    """
    with engine.adapters.active():
        unet = private(engine.model.unet, copied)
    return engine.model.with_unet(unet)


def put_lora(engine: Engine, weights: Mapping[str, Tensor], what: str) -> tuple[Model, str]:
    """:func:`own_model` with a LoRA in it, float32 or more, and its name; see ``models.lora.put_unet_lora``."""
    from dsd_fast.models.lora import put_unet_lora

    own = own_model(engine)
    name, active = free_name(own.unet), active_names(own.unet)
    with _adding():
        put_unet_lora(own.unet, weights, name, what)
    activate(own.unet, (*active, name))
    for path, parameter in lora_parameters(own.unet, name).items():
        # PEFT has rounded them to the UNet's type.
        given = weights[path.replace(f".{name}.", ".")]
        parameter.data = given.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
    return own, name


def free_name(unet: Any) -> str:
    """Give a name that no adapter of the UNet has."""
    taken = adapter_names(unet)
    return next(name for number in range(len(taken) + 1) if (name := f"fitted{number or ''}") not in taken)


def add_lora(unet: Any, name: str, rank: int, targets: Sequence[str], seed: int) -> None:
    """Add a LoRA to the active ones, in float32 or more.

    Down N(0, 1/rank), up 0, as in the official code of DSD; scale 1.

    Args:
        targets: ends of the paths of the modules that it adapts.
        seed: of the first weights.
    """
    from peft import LoraConfig

    active, training = active_names(unet), unet.training
    with _adding():
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), name)
    unet.train(training)
    activate(unet, (*active, name))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in lora_parameters(unet, name).items():
            down = ".lora_A." in path
            drawn = (
                torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu") / rank
                if down
                else torch.zeros((), dtype=torch.float32, device="cpu")
            )
            # Before they are drawn: a network of 16 bits would round them.
            parameter.data = widened(parameter.data)
            parameter.copy_(upload(drawn, parameter.device))


def lora_parameters(unet: Any, name: str) -> dict[str, Parameter]:
    """Give the matrices of an adapter, by their paths."""
    return {path: parameter for path, parameter in unet.named_parameters() if f".{name}." in path}


def widened(x: Tensor) -> Tensor:
    """``x`` in float32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def _adding() -> Iterator[None]:
    """Around the addition of an adapter: PEFT draws first weights, which others replace, and warns of a second one."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), ordinary():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield
