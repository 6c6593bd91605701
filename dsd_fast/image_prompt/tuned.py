"""What a tuning learns, and where it lives: in a converter of its own, never in the model that it shares."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor
from torch.nn import Parameter

from dsd_fast.engine.lora import add_lora, free_name, lora_parameters, own_model, widened
from dsd_fast.image_prompt.converter import Conversion
from dsd_fast.image_prompt.deep_prompts import DeepPrompts, PromptedVision
from dsd_fast.image_prompt.tune_config import TuneConfig

if TYPE_CHECKING:
    from dsd_fast.models import Model

Made = TypeVar("Made", bound=Conversion)

_TARGETS = ("attn2.to_k", "attn2.to_v")


class Tuned(Generic[Made]):
    """The parameters of a tuning, and the converter that has them.

    What the converter was tuned to before goes on from there, in memory of its own.

    Args:
        base: the converter, which is not changed.
        config: the settings.

    Attributes:
        converter: with the parameters as they are.
        parameters: what is trained, by name: "attention.…" and "prompts.…".

    Raises:
        ValueError: a setting that what was learned before does not have; "full" in a UNet of 16 bits.
    """

    def __init__(self, base: Made, config: TuneConfig) -> None:
        lora, full = base.lora, config.attention == "full"
        if full and base.model.dtype.itemsize < 4:
            raise ValueError(
                f"attention: got 'full' for a UNet of {base.model.dtype}, which rounds small steps away; expected "
                "'lora', or a model loaded in float32"
            )
        model = own_model(base.engine, lambda name: f".{lora}." in name or (full and is_full(name)))
        self.parameters: dict[str, Parameter] = {}
        if config.attention == "lora":
            lora = self._learn_lora(model, lora, config)
        elif full:
            own = {name: p for name, p in model.unet.named_parameters() if is_full(name)}
            self._learn("attention", own)
        vision = self._learn_prompts(base, config) if config.prompt_tokens else base.vision
        self.converter = base.tuned(model, vision, lora, base.full or full)

    def _learn_lora(self, model: Model, lora: str | None, config: TuneConfig) -> str:
        if lora is None:
            lora = free_name(model.unet)
            add_lora(model.unet, lora, config.rank, _TARGETS, config.seed)
        elif model.unet.peft_config[lora].r != config.rank:
            raise ValueError(
                f"rank: got {config.rank}, expected {model.unet.peft_config[lora].r}, which the converter's LoRA has"
            )
        for parameter in lora_parameters(model.unet, lora).values():
            parameter.data = widened(parameter.data)
        self._learn("attention", lora_parameters(model.unet, lora))
        return lora

    def _learn_prompts(self, base: Conversion, config: TuneConfig) -> PromptedVision:
        vision = base.vision
        if isinstance(vision, PromptedVision):
            prompts, tokens = copy.deepcopy(vision.prompts), vision.prompts.tokens
            if tokens != config.prompt_tokens:
                raise ValueError(
                    f"prompt_tokens: got {config.prompt_tokens}, expected {tokens}, which the converter has"
                )
            made = PromptedVision(vision.plain, prompts)
        else:
            made = PromptedVision(vision, DeepPrompts.drawn(vision, config.prompt_tokens, config.seed))
        self._learn("prompts", dict(made.prompts.named_parameters()))
        return made

    def _learn(self, group: str, parameters: dict[str, Parameter]) -> None:
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            self.parameters[f"{group}.{name}"] = parameter

    def dropout(self, share: float) -> None:
        """Set what share of the deep prompts' numbers is left out."""
        if isinstance(self.converter.vision, PromptedVision):
            self.converter.vision.prompts.dropout = share

    def finished(self) -> Made:
        """The converter, of which nothing wants a gradient any more."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        return self.converter


def is_full(name: str) -> bool:
    """Tell whether a UNet's parameter is a matrix that "full" learns, by its path."""
    return name.replace(".base_layer", "").endswith(tuple(f"{target}.weight" for target in _TARGETS))


def full_matrices(unet: Any) -> dict[str, Tensor]:
    """Give the matrices that "full" learns, by the paths that they have without adapters."""
    named = unet.named_parameters()
    return {name.replace(".base_layer", ""): p.detach() for name, p in named if is_full(name)}
