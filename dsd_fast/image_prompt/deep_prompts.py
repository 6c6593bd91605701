"""Deep prompts: learned tokens among those of CLIP's image encoder, anew at every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsd_fast.engine.lora import widened
from dsd_fast.models.private import private


class DeepPrompts(nn.Module):
    """The tokens of all layers, and what they go through.

    Jia et al. 2022, "Visual Prompt Tuning", deep; as in SD-IPC's CLIPVisionModelWithPrompt (prompt_clip.py), under its
    names.

    Args:
        layers, tokens, width: of the encoder, and how many learned tokens each layer has.
        norm_eps: of the layer norm.
        replace_first: whether the tokens take the place of the first patches at the first layer, too, as in SD-IPC's
            code, which loses those patches; else they come between the class token and the patches.

    Attributes:
        deep_prompt_embeddings: (layers, tokens, width).
        prompt_proj: one for all layers.
        prompt_norm: of the encoder's final states.
    """

    def __init__(
        self, layers: int, tokens: int, width: int, *, norm_eps: float = 1e-5, replace_first: bool = False
    ) -> None:
        super().__init__()
        self.replace_first = replace_first
        options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        self.deep_prompt_embeddings = nn.Parameter(torch.zeros(layers, tokens, width, **options))
        self.prompt_proj = nn.Linear(width, width, **options)
        self.prompt_norm = nn.LayerNorm(width, eps=norm_eps, **options)
        self.dropout = 0.0
        self.requires_grad_(False)

    @classmethod
    def drawn(cls, vision: Any, tokens: int, seed: int) -> DeepPrompts:
        """Draw the first values for an encoder, as SD-IPC's code does: ±√(6 / (3·patches + width)), Kaiming, fan out.

        Args:
            vision: transformers' CLIPVisionModel.
            tokens: of each layer.
            seed: of the draws.
        """
        config = vision.config
        made = cls(config.num_hidden_layers, tokens, config.hidden_size, norm_eps=config.layer_norm_eps)
        random = torch.Generator().manual_seed(seed)
        bound = math.sqrt(6 / (3 * (config.image_size // config.patch_size) ** 2 + config.hidden_size))
        with torch.no_grad():
            made.deep_prompt_embeddings.uniform_(-bound, bound, generator=random)
            nn.init.kaiming_normal_(made.prompt_proj.weight, a=0, mode="fan_out", generator=random)
            # As torch draws a Linear's.
            made.prompt_proj.bias.uniform_(-(config.hidden_size**-0.5), config.hidden_size**-0.5, generator=random)
        return made

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], vision: Any, what: str, *, replace_first: bool = False) -> DeepPrompts:
        """Take values by the names of SD-IPC's code, alone or behind "vision_model.encoder."; others are left aside.

        Args:
            vision: transformers' CLIPVisionModel that they are for.
            what: they are, in errors.

        Raises:
            ValueError: one that is missing, of another shape than the encoder's, or not finite.
        """
        prefix = "vision_model.encoder."
        values = {name.removeprefix(prefix): value for name, value in tensors.items()}
        config, tokens = vision.config, 0
        embeddings = values.get("deep_prompt_embeddings")
        if embeddings is not None and embeddings.ndim == 3:
            tokens = embeddings.shape[1]
        options: dict[str, Any] = {"norm_eps": config.layer_norm_eps, "replace_first": replace_first}
        made = cls(config.num_hidden_layers, tokens, config.hidden_size, **options)
        own = made.state_dict()
        for name, value in own.items():
            if name not in values:
                raise ValueError(f"{what} has no {name}, expected deep prompts")
            if values[name].shape != value.shape or not values[name].isfinite().all():
                shape = tuple(values[name].shape)
                raise ValueError(f"{what}: {name} is of {shape}, expected finite numbers of {tuple(value.shape)}")
        made.to(widened(values["deep_prompt_embeddings"]).dtype).load_state_dict({name: values[name] for name in own})
        return made

    @property
    def tokens(self) -> int:
        """How many each layer has."""
        return int(self.deep_prompt_embeddings.shape[1])

    def at(self, layer: int, states: Tensor) -> Tensor:
        """Put a layer's tokens into its input (B, T, W)."""
        prompts = self.prompt_proj(self.deep_prompt_embeddings[layer]).expand(len(states), -1, -1)
        prompts = F.dropout(prompts, self.dropout, self.dropout > 0).to(states.dtype)
        begin = 1 + self.tokens if layer or self.replace_first else 1
        return torch.cat([states[:, :1], prompts, states[:, begin:]], dim=1)


class PromptedVision(nn.Module):
    """CLIP's image encoder with deep prompts, on the weights of one without.

    Args:
        vision: transformers' CLIPVisionModel, which stays as it is.
        prompts: moved to its device, float32 or more.

    Attributes:
        config: the encoder's.
        plain: the encoder without them.
        prompts: as given.
    """

    def __init__(self, vision: Any, prompts: DeepPrompts) -> None:
        super().__init__()
        self.config = vision.config
        self.plain = private(vision).eval()
        self.prompts = prompts.to(widened(vision.post_layernorm.weight))

    def forward(self, pixel_values: Tensor) -> Any:
        """Encode prepared pictures (B, 3, h, w); of what transformers' model gives it has the ``pooler_output``."""
        vision, prompts = self.plain, self.prompts
        states = vision.pre_layrnorm(vision.embeddings(pixel_values))
        for number, layer in enumerate(vision.encoder.layers):
            states = layer(prompts.at(number, states), None)  # (B, 1 + tokens + patches, W)
        first = prompts.prompt_norm(states[:, 0].to(prompts.prompt_norm.weight.dtype))
        return SimpleNamespace(pooler_output=vision.post_layernorm(first.to(states.dtype)))
