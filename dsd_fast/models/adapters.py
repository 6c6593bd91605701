"""What PEFT keeps of a LoRA on a network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsd_fast.models.errors import ModelError


def lora_layers(unet: Any, name: str) -> dict[str, Any]:
    """PEFT's layers of an adapter, by the paths of the modules that they adapt.

    Raises:
        ModelError: no such adapter, or one of another kind than plain LoRA.
    """
    configs = getattr(unet, "peft_config", None) or {}
    if name not in configs:
        raise ModelError(f"the UNet has no adapter {name!r}; it has {', '.join(sorted(configs)) or 'none'}")
    found = {path: layer for path, layer in unet.named_modules() if name in getattr(layer, "lora_A", ())}
    plain = found and not getattr(configs[name], "modules_to_save", None)
    if not plain or any(name in layer.lora_variant or layer.lora_B[name].bias is not None for layer in found.values()):
        raise ModelError(f"adapter {name!r} is of another kind than plain LoRA, such as DoRA or LoRA with biases")
    return found


def lora_settings(ranks: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The arguments of PEFT's LoraConfig for a LoRA of such ranks and alphas, by the paths of the adapted modules."""
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*ranks.values(), strict=True))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}": r for path, (r, _) in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, (_, a) in ranks.items() if a != alpha},
        "target_modules": sorted(ranks),
    }
