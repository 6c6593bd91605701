"""LoRA files of every naming, read by the names of a model's own layers.

diffusers reads most of them too, but drops the norms of kohya's DoRA, of kohya's attention layers the alphas that
differ from the most frequent one, and, before 0.40, the scale of layers of another rank than most. Under early
transformers 5 SDXL's second text encoder takes no weights from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from dsd_fast.models.errors import ModelError
from dsd_fast.models.kohya import layer_paths, text_names, unet_names

PARTS: Final = ("unet", "text_encoder", "text_encoder_2")
# Before the path of a layer that PEFT has wrapped.
PEFT: Final = "base_model.model."

# Endings of the two matrices: of PEFT, of kohya's scripts, and of diffusers of 2023 in three manners.
_MATRICES = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_down.weight": ".lora_up.weight",
    ".lora.down.weight": ".lora.up.weight",
    "_lora.down.weight": "_lora.up.weight",
    ".lora_linear_layer.down.weight": ".lora_linear_layer.up.weight",
}
_KINDS = {
    **dict.fromkeys(_MATRICES, "down"),
    **dict.fromkeys(_MATRICES.values(), "up"),
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_B.bias": "bias",
}
_OTHERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon in its Tucker form",
    "lora_embedding_": "LoRA on embeddings",
    "oft_": "OFT",
    "boft_": "BOFT",
    "diff": "differences of whole weights",
}
# What diffusers' attention processors of 2023 called the projections of a UNet and of a text encoder.
_OLD_UNET = {
    "to_q": "processor.to_q",
    "to_k": "processor.to_k",
    "to_v": "processor.to_v",
    "to_out.0": "processor.to_out",
}
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

# Settings of PEFT under which an adapter is more than its matrices.
_MORE = (
    "alora_invocation_tokens",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
# Ways to draw the first matrices that leave the layer's own weight as it is.
_DRAWN = (True, False, None, "eva", "gaussian", "orthogonal")
# PEFT's own, for settings that do not say it.
_ALPHA = 8


@dataclass(frozen=True)
class LoraLayer:
    """What W x + b of one layer becomes: (W + alpha / rank · up · down) x + b + alpha / rank · bias.

    Attributes:
        down: (rank, in), of a convolution (rank, in, k, k).
        up: (out, rank), of a convolution (out, rank, 1, 1).
        alpha: the factor on the product is alpha / rank.
        magnitude: (out,), the norms that DoRA (Liu et al. 2024) gives the sum's rows; None: those they have.
        bias: (out,), or None.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


def read_lora(
    tensors: Mapping[Any, Any],
    unet: Any,
    text_encoders: Sequence[Any],
    what: str,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    home: str | None = None,
) -> dict[str, dict[str, LoraLayer]]:
    """What a file holds for the "unet", the "text_encoder" and the "text_encoder_2", by the paths of the layers.

    Args:
        tensors: under the names of PEFT, of diffusers, be it of 2023, of kohya's scripts or of LyCORIS.
        unet, text_encoders: of the model.
        what: the file's name in errors.
        settings: of PEFT's LoraConfig, by part; "": of the layers whose names do not say their part.
        home: the part of those; None: the one that has them.

    Raises:
        ModelError: a layer that the model does not have, or of another shape; one half of a product without the other;
            values that are not finite; weights of another kind than LoRA and DoRA.
    """
    networks = dict(zip(PARTS, (unet, *text_encoders), strict=False))
    names = {name: (part, path) for part, network in networks.items() for name, path in _names(part, network)}
    split = {key: _split(key, what) for key in tensors}
    bare = {key: layer for key, (layer, _) in split.items() if not layer.startswith((*_dotted(PARTS), "lora_"))}
    settings = dict(settings or {})
    if bare:
        home = home or _home(bare, tensors, names, networks, what)
        settings[home] = settings.pop("", {}) or settings.get(home, {})
    for part, config in settings.items():
        _check_settings(config, f"{what}: its settings for the part {part!r}")
    layers: dict[str, dict[str, str]] = {}
    for key, (layer, ending) in split.items():
        name, kind = f"{home}.{layer}" if key in bare else layer, _KINDS[ending]
        if name not in names:
            raise ModelError(f"{what} has weights for {layer!r}, a layer that the model does not have")
        there = layers.setdefault(name, {})
        if kind in there:
            raise ModelError(f"{what} holds {there[kind]!r} twice, the second time as {key!r}")
        there[kind] = key
    parts: dict[str, dict[str, LoraLayer]] = {part: {} for part in networks}
    for name, there in layers.items():
        part, path = names[name]
        if path in parts[part]:
            raise ModelError(f"{what} has weights for {path!r} of the {part} under two names, one of them {name!r}")
        _check_halves(there, what)
        module, place = networks[part].get_submodule(path), f"{path!r} of the {part}"
        values = {kind: _value(kind, key, tensors, there, module, place, what) for kind, key in there.items()}
        if "alpha" in values:
            alpha = float(values.pop("alpha"))
        elif settings.get(part):
            alpha = _alpha(settings[part], (name.removeprefix(f"{part}."), path), len(values["down"]))
        elif PEFT in there["down"]:
            raise ModelError(
                f"{what} is PEFT's, but its strength is nowhere, expected an adapter_config.json beside it"
            )
        else:
            alpha = float(len(values["down"]))
        parts[part][path] = LoraLayer(alpha=alpha, **values)
    for part, found in parts.items():
        scaled = next((path for path, layer in found.items() if layer.magnitude is not None), None)
        biased = next((path for path, layer in found.items() if layer.bias is not None), None)
        if scaled is not None and biased is not None:
            raise ModelError(
                f"{what} has DoRA's norms for {scaled!r} of the {part} and a bias for {biased!r}, which PEFT does not "
                "have in one adapter"
            )
    return parts


def _names(part: str, network: Any) -> Iterator[tuple[str, str]]:
    """Every name of each layer in files, and its path."""
    yield from unet_names(network) if part == "unet" else text_names(network, PARTS.index(part) - 1)
    old = _OLD_UNET if part == "unet" else _OLD_TEXT
    for path in layer_paths(network):
        # CLIP's text tower is inside `text_model` in most files, but not in every transformers class.
        inner = path.removeprefix("text_model.")
        for name in {path} if part == "unet" else {inner, f"text_model.{inner}"}:
            yield f"{part}.{name}", path
            for new, former in old.items():
                if name.endswith(f".{new}"):
                    yield f"{part}.{name.removesuffix(new)}{former}", path


def _split(key: Any, what: str) -> tuple[str, str]:
    """A layer's name in a file, and the ending that says what of the layer it is."""
    if not isinstance(key, str):
        raise ModelError(f"{what} holds {key!r}, expected names of type str")
    if key.startswith("bundle_emb."):
        raise ModelError(
            f"{what} has embeddings of words in it ({key!r}), which are not read: put them into a pipeline by its "
            f"load_textual_inversion for dsd_fast.from_pipeline, and take the keys 'bundle_emb.…' out of the file"
        )
    ending = max((ending for ending in _KINDS if key.endswith(ending)), key=len, default=None)
    if ending is None:
        kind = next((kind for mark, kind in _OTHERS.items() if re.search(rf"[._]{mark}", key)), None)
        known = f"which is of another kind than plain LoRA and DoRA: {kind}" if kind else "which is no part of a LoRA"
        raise ModelError(f"{what} has {key!r}, {known}")
    return key.removesuffix(ending).replace(PEFT, "", 1), ending


def _dotted(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{part}." for part in parts)


def _home(
    bare: Mapping[str, str],
    tensors: Mapping[Any, Any],
    names: Mapping[str, tuple[str, str]],
    networks: Mapping[str, Any],
    what: str,
) -> str:
    """The part whose layers have these names, and of SDXL's two text encoders the one with these widths."""

    def fits(part: str, key: str) -> bool:
        weight = _weight(networks[part].get_submodule(names[f"{part}.{bare[key]}"][1]))
        down = getattr(tensors[key], "shape", ())
        return not key.endswith(tuple(_MATRICES)) or down[1:2] == weight.shape[1:2]

    found = [part for part in networks if all(f"{part}.{layer}" in names for layer in bare.values())]
    if len(found) > 1:
        found = [part for part in found if all(fits(part, key) for key in bare)] or found
    if len(found) > 1:
        raise ModelError(
            f"{what} fits both {' and '.join(found)}, expected names that begin with one of them, or a folder so named"
        )
    return found[0] if found else PARTS[0]


def _check_halves(there: Mapping[str, str], what: str) -> None:
    partners = {**_MATRICES, **{up: down for down, up in _MATRICES.items()}}
    if "down" in there and "up" in there:
        return
    kind, key = next(iter(sorted(there.items(), key=lambda item: item[0] not in ("down", "up"))))
    if kind not in ("down", "up"):
        raise ModelError(f"{what} has {key!r} but no matrices for its layer")
    ending = max((ending for ending in partners if key.endswith(ending)), key=len)
    raise ModelError(f"{what} has {key!r} but no {key.removesuffix(ending) + partners[ending]!r}")


def _value(
    kind: str, key: str, tensors: Mapping[Any, Any], there: Mapping[str, str], module: Any, place: str, what: str
) -> Tensor:
    """A tensor of a file in the shape that it has in a :class:`LoraLayer`."""
    tensor, weight = tensors[key], _weight(module)
    # kohya's scripts write an alpha that was given as an integer as one.
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or kind == "alpha"):
        given = f"of {tensor.dtype}" if isinstance(tensor, Tensor) else f"of type {type(tensor).__name__}"
        raise ModelError(f"{what}: {key!r} is {given}, expected a floating-point tensor")
    down = tensors[there["down"]]
    rank = max(1, len(down)) if isinstance(down, Tensor) and down.ndim else 1
    shape = {
        "down": (rank, *weight.shape[1:]),
        "up": (len(weight), rank, *(1 for _ in weight.shape[2:])),
        "alpha": (),
    }.get(kind, (len(weight),))
    if kind == "magnitude" and not key.endswith(".dora_scale"):
        # PEFT's of a convolution is (1, out, 1, 1).
        tensor = tensor.squeeze(0)
    if _trimmed(tensor.shape) != _trimmed(shape):
        inputs = kind == "magnitude" and _trimmed(tensor.shape) == (1, weight.shape[1])
        raise ModelError(
            f"{what}: {key!r} has shape {tuple(tensor.shape)}, expected {shape} for {place}"
            + (": a norm for each output, as PEFT's DoRA computes with, and not for each input" if inputs else "")
        )
    if not tensor.float().isfinite().all():
        raise ModelError(f"{what}: {key!r} has values that are not finite")
    return tensor.reshape(shape)


def _trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the ones at its end, by which files of linear layers and of 1 × 1 convolutions differ."""
    size = max((number for number, length in enumerate(shape, 1) if length != 1), default=0)
    return tuple(shape[:size])


def _weight(module: Any) -> Tensor:
    weight: Tensor = getattr(module, "base_layer", module).weight
    return weight


def _alpha(config: Mapping[str, Any], names: Sequence[str], rank: int) -> float:
    """The alpha by PEFT's rules of a layer that the settings know by one of the names."""
    patterns = (config.get("alpha_pattern") or {}).items()
    matching = (alpha for key, alpha in patterns if any(re.match(rf"(.*\.)?({key})$", name) for name in names))
    alpha = float(next(matching, config.get("lora_alpha", _ALPHA)))
    # rsLoRA (Kalajdzievski, arXiv 2312.03732) divides by the root.
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


def _check_settings(config: Mapping[str, Any], what: str) -> None:
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type") or "LORA"))
    if kind != "LORA":
        raise ModelError(f"{what} have peft_type = {kind!r}, expected 'LORA'")
    for key in _MORE:
        if config.get(key):
            raise ModelError(f"{what} have {key} = {config[key]!r}, expected none, as plain LoRA and DoRA have")
    for alpha in (config.get("lora_alpha", _ALPHA), *(config.get("alpha_pattern") or {}).values()):
        if not isinstance(alpha, int | float):
            raise ModelError(f"{what} have the alpha {alpha!r}, expected a number")
    if config.get("init_lora_weights") not in _DRAWN:
        raise ModelError(
            f"{what} have init_lora_weights = {config['init_lora_weights']!r}, which changes the layers' own weights; "
            f"expected an adapter that PEFT has converted to plain LoRA"
        )
