"""What a fit learns, and where it lives: in the matcher, never in the model that it shares."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dsd_fast.matching.config import MatchConfig
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.pairs import PairScorer
from dsd_fast.models.private import private
from dsd_fast.unet.adapters import activate, active_names, adapter_names

if TYPE_CHECKING:
    from dsd_fast.models import Model

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Adaptation:
    """What a matcher has learned besides its configuration.

    Attributes:
        model: the matcher's model with a UNet of its own that shares all weights, where there is a LoRA.
        lora: name of the adapter in that UNet, or None.
        prompt: (n, E) float32 vectors that follow the tokens of each text, or None.
    """

    model: Model
    lora: str | None = None
    prompt: Tensor | None = None

    def scorer(self, config: MatchConfig, adapter: str | tuple[str, ...] | None) -> PairScorer:
        """The scores under what was learned."""
        return PairScorer(self.model, config, adapter, prompt=self.prompt, chosen=self.lora is not None)


class Learned:
    """The parameters of a fit, and the scorer that computes with them.

    Args:
        adaptation: what the matcher has learned before; what the methods train goes on from there, and the rest stays.
        config: the matcher's.
        adapter: the matcher's.
        methods: "lora", "prompt", "heads".
        fit: the settings.

    Attributes:
        scorer: computes with the parameters as they are, save those of heads, see :meth:`weights`.

    Raises:
        ValueError: a method that does not fit the matcher's configuration or model.
    """

    def __init__(
        self,
        adaptation: Adaptation,
        config: MatchConfig,
        adapter: str | tuple[str, ...] | None,
        methods: tuple[str, ...],
        fit: FitConfig,
    ) -> None:
        self._model, self._config, self._methods = adaptation.model, config, methods
        self.parameters: dict[str, Parameter] = {}
        if "heads" in methods and not config.attention_weight:
            raise ValueError("method: heads learns weights of the attention term, whose attention_weight is 0")
        if "heads" in methods and config.official:
            raise ValueError("method: heads learns weights that the official score does not have; use official=False")
        if "lora" in methods:
            adaptation = self._with_lora(adaptation, adapter, fit)
        if "prompt" in methods:
            adaptation = self._with_prompt(adaptation, fit)
        self._adaptation = adaptation
        self.scorer = adaptation.scorer(config, adapter)
        self.dropout(False)
        if "heads" in methods:
            self._heads()

    def _with_lora(self, adaptation: Adaptation, adapter: str | tuple[str, ...] | None, fit: FitConfig) -> Adaptation:
        name = adaptation.lora
        model = own_model(adaptation.model, name)
        if name is None:
            name = _free_name(model.unet)
            _add_lora(model.unet, name, adapter, fit)
        elif model.unet.peft_config[name].r != fit.rank:
            raise ValueError(f"rank: the matcher's LoRA has {model.unet.peft_config[name].r}, got {fit.rank}")
        for path, parameter in model.unet.named_parameters():
            if f".{name}." in path:
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
                parameter.requires_grad_(True)
                self.parameters[f"lora.{path}"] = parameter
        return replace(adaptation, model=model, lora=name)

    def _with_prompt(self, adaptation: Adaptation, fit: FitConfig) -> Adaptation:
        before = adaptation.prompt
        if before is None:
            # They begin as copies of what the network knows best to disregard: the padding of an empty text.
            states = adaptation.model.encode_prompts([""]).states[0].detach()
            if len(states) < fit.prompt_tokens:
                raise ValueError(f"prompt_tokens: got {fit.prompt_tokens}, expected at most {len(states)}")
            before = states[len(states) - fit.prompt_tokens :]
            before = before.to(torch.promote_types(before.dtype, torch.float32))
        elif len(before) != fit.prompt_tokens:
            raise ValueError(f"prompt_tokens: the matcher has {len(before)}, got {fit.prompt_tokens}")
        self.parameters["prompt"] = Parameter(before.to(adaptation.model.unet.device, copy=True))
        # Weights that want gradients, as a pipeline's do, would get them.
        model = adaptation.model if "lora" in self._methods else own_model(adaptation.model)
        return replace(adaptation, model=model, prompt=self.parameters["prompt"])

    def _heads(self) -> None:
        weights = self.scorer.weights
        every = torch.cat(list(weights.values()))
        self._unit = float(every.abs().mean()) or 1 / len(every)
        self._sizes = {name: len(value) for name, value in weights.items()}
        self.parameters["heads"] = Parameter(every / self._unit)

    @property
    def learns_network(self) -> bool:
        """Whether a gradient goes through the network; the weights of heads alone need none."""
        return "lora" in self._methods or "prompt" in self._methods

    def weights(self) -> dict[str, Tensor]:
        """Score id → (H,) weights of its heads; differentiable."""
        if "heads" not in self.parameters:
            return self.scorer.weights
        parts = torch.split(self.parameters["heads"] * self._unit, list(self._sizes.values()))
        return dict(zip(self._sizes, parts, strict=True))

    def settle(self) -> PairScorer:
        """The scorer, with the weights of heads as they are now."""
        self.scorer.weights = {name: value.detach().clone() for name, value in self.weights().items()}
        return self.scorer

    def finished(self) -> tuple[Adaptation, MatchConfig]:
        """What the matcher then has: nothing in it wants a gradient any more."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        prompt = self._adaptation.prompt
        adaptation = replace(self._adaptation, prompt=None if prompt is None else prompt.detach())
        if "lora" not in self._methods:
            adaptation = replace(adaptation, model=self._model)
        if "heads" not in self.parameters:
            return adaptation, self._config
        return adaptation, replace(
            self._config, layers={name: tuple(value.tolist()) for name, value in self.weights().items()}
        )

    def dropout(self, training: bool) -> None:
        """Whether the LoRA that is trained leaves inputs out."""
        name = self._adaptation.lora
        for module in self.scorer.model.unet.modules() if "lora" in self._methods else ():
            if name in getattr(module, "lora_dropout", {}):
                module.lora_dropout[name].train(training)


def own_model(model: Model, lora: str | None = None) -> Model:
    """``model`` with a UNet of its own on the same weights, save those of the adapter ``lora``, which are copied."""
    own = copy.copy(model)
    own.unet = private(model.unet, lambda name: lora is not None and f".{lora}." in name)
    return own


def put_lora(
    model: Model, weights: Mapping[str, Tensor], adapter: str | tuple[str, ...] | None, what: str
) -> tuple[Model, str]:
    """``model`` with a UNet of its own that has a LoRA, and its name; see ``models.lora.put_unet_lora``."""
    from dsd_fast.models.lora import put_unet_lora

    own = own_model(model)
    name = _free_name(own.unet)
    active = _chosen(own.unet, adapter)
    # PEFT draws first weights, which those of the file replace.
    with torch.random.fork_rng(devices=[]):
        put_unet_lora(own.unet, weights, name, what)
    activate(own.unet, (*active, name))
    return own, name


def _add_lora(unet: Any, name: str, adapter: str | tuple[str, ...] | None, fit: FitConfig) -> None:
    from peft import LoraConfig

    kinds = ("attn2",) if fit.attention == "cross" else ("attn1", "attn2")
    active = _chosen(unet, adapter)
    config = LoraConfig(
        r=fit.rank,
        lora_alpha=fit.rank,
        lora_dropout=fit.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=[f"{kind}.{projection}" for kind in kinds for projection in _PROJECTIONS],
    )
    training = unet.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        unet.add_adapter(config, name)
    unet.train(training)
    activate(unet, (*active, name))


def _chosen(unet: Any, adapter: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The UNet's adapters that are active for the matcher."""
    if adapter is None:
        return active_names(unet)
    names = (adapter,) if isinstance(adapter, str) else adapter
    return tuple(name for name in names if name in adapter_names(unet))


def _free_name(unet: Any) -> str:
    taken = adapter_names(unet)
    return next(name for number in range(len(taken) + 1) if (name := f"fitted{number or ''}") not in taken)
