"""What a fit learns, and where it lives: in the matcher, never in the model that it shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dsd_fast.engine.lora import add_lora, free_name, lora_parameters, own_model, widened
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.score import PairScorer

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_LAYERS = {"cross": ("attn2",), "all": ("attn1", "attn2")}


class Learned:
    """The parameters of a fit, and the scorer that computes with them.

    Args:
        base: the matcher's scorer: what it has learned before goes on from there, or stays.
        lora: name of the adapter that it has learned before, or None.
        methods: "lora", "prompt", "heads".
        fit: the settings.

    Attributes:
        scorer: computes with the parameters as they are, save those of heads, see :meth:`weights`. Its UNet is its own,
            on the base's weights and under the base's adapters.
        lora: name of the adapter in that UNet, or None.
        parameters: what is trained, by name.

    Raises:
        ValueError: a method that does not fit the matcher's configuration, or a setting that what was learned before
            does not have.
    """

    def __init__(self, base: PairScorer, lora: str | None, methods: tuple[str, ...], fit: FitConfig) -> None:
        config = base.config
        if "heads" in methods and not config.attention_weight:
            raise ValueError("method: heads learns weights of the attention term, whose attention_weight is 0")
        if "heads" in methods and config.official:
            raise ValueError("method: heads learns weights that the official score does not have; use official=False")
        self._base, self._methods = base, methods
        self.lora = lora
        self.parameters: dict[str, Parameter] = {}
        model = own_model(base.engine, lambda name: lora is not None and f".{lora}." in name)
        if "lora" in methods:
            self._learn_lora(model.unet, fit)
        prompt = self._learn_prompt(fit) if "prompt" in methods else base.prompt
        self.scorer = PairScorer(base.engine.with_unet(model), config, prompt)
        if "heads" in methods:
            self._learn_heads()

    def _learn_lora(self, unet: Any, fit: FitConfig) -> None:
        if self.lora is None:
            self.lora = free_name(unet)
            targets = [f"{kind}.{projection}" for kind in _LAYERS[fit.attention] for projection in _PROJECTIONS]
            add_lora(unet, self.lora, fit.rank, targets, fit.seed)
        else:
            _check_lora(unet, self.lora, fit)
        self._dropouts = _set_dropout(unet, self.lora, fit.lora_dropout)
        for path, parameter in lora_parameters(unet, self.lora).items():
            parameter.data = widened(parameter.data)
            parameter.requires_grad_(True)
            self.parameters[f"lora.{path}"] = parameter

    def _learn_prompt(self, fit: FitConfig) -> Parameter:
        before = self._base.prompt
        if before is None:
            # They begin as copies of what the network knows best to disregard: the padding of an empty text.
            states = self._base.encode_texts([""], unconditional=False).states.states[0]
            if len(states) < fit.prompt_tokens:
                raise ValueError(f"prompt_tokens: got {fit.prompt_tokens}, expected at most {len(states)}")
            before = states[len(states) - fit.prompt_tokens :]
        elif len(before) != fit.prompt_tokens:
            raise ValueError(f"prompt_tokens: the matcher has {len(before)}, got {fit.prompt_tokens}")
        kind = torch.promote_types(before.dtype, torch.float32)
        self.parameters["prompt"] = Parameter(before.to(self._base.plan.program.device, kind, copy=True))
        return self.parameters["prompt"]

    def _learn_heads(self) -> None:
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

    def current(self) -> PairScorer:
        """The scorer, with the weights of heads as they are now."""
        self.scorer.weights = {name: value.detach().clone() for name, value in self.weights().items()}
        return self.scorer

    def finished(self) -> PairScorer:
        """The scorer that the matcher then has: nothing in it wants a gradient any more."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        config, prompt = self._base.config, self.scorer.prompt
        if "heads" in self.parameters:
            config = replace(config, layers={name: tuple(value.tolist()) for name, value in self.weights().items()})
        return PairScorer(self.scorer.engine, config, None if prompt is None else prompt.detach())

    def dropout(self, training: bool) -> None:
        """Whether the LoRA leaves inputs out."""
        for module in self._dropouts if "lora" in self._methods else ():
            module.train(training)


def _check_lora(unet: Any, name: str, fit: FitConfig) -> None:
    """Refuses settings that the adapter does not have."""
    found = unet.peft_config[name].r
    if found != fit.rank:
        raise ValueError(f"rank: the matcher's LoRA has {found}, got {fit.rank}")
    attention = "all" if any(".attn1." in path for path in lora_parameters(unet, name)) else "cross"
    if attention != fit.attention:
        raise ValueError(f"attention: the matcher's LoRA has {attention!r}, got {fit.attention!r}")


def _set_dropout(unet: Any, name: str, share: float) -> list[nn.Module]:
    """Gives the adapter's layers their dropout, switched off; the modules."""
    found: list[nn.Module] = []
    for layer in unet.modules():
        if name in getattr(layer, "lora_A", ()):
            layer.lora_dropout[name] = nn.Dropout(share).eval() if share else nn.Identity()
            found.append(layer.lora_dropout[name])
    return found
