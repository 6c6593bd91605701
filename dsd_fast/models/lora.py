"""LoRA files, safetensors only."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsd_fast.jobs import replacing
from dsd_fast.models.attn_procs import to_official
from dsd_fast.models.errors import ModelError, reason
from dsd_fast.models.hub import find_folder
from dsd_fast.models.lora_formats import PARTS, LoraLayer, read_lora
from dsd_fast.models.tuners import adapter_names

_DEFAULT_NAME = "pytorch_lora_weights.safetensors"
# Of a folder that PEFT writes.
_PEFT_NAME, _PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def load_lora(
    unet: Any,
    text_encoders: Sequence[Any],
    label: str,
    source: str | os.PathLike[str],
    name: str,
    weight_name: str | None = None,
    *,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> None:
    """See `Model.load_lora`.

    Args:
        unet, text_encoders: the model's.
        label: the model's name in errors.
    """
    if not name or "." in name:
        raise ModelError(f"adapter name is {name!r}, expected a non-empty name without a dot")
    networks = dict(zip(PARTS, (unet, *text_encoders), strict=False))
    if any(name in adapter_names(network) for network in networks.values()):
        raise ModelError(f"adapter name {name!r} is taken, expected a new one")
    parts: dict[str, dict[str, LoraLayer]] = {}
    files = find_lora(source, weight_name, local_files_only=local_files_only, cache_dir=cache_dir)
    for file in files:
        what = f"LoRA {str(file)!r}"
        tensors, settings, home = _read(file, what)
        for part, layers in read_lora(tensors, unet, text_encoders, f"{what} for {label!r}", settings, home).items():
            if layers and part in parts:
                raise ModelError(f"{what} is for the {part}, for which its folder has another file")
            parts |= {part: layers} if layers else {}
    if len(files) > 1:
        what = f"LoRA {str(source)!r}"
    if not parts:
        raise ModelError(f"{what} has no weights for the UNet or the text encoders of {label!r}")
    _put([(networks[part], layers) for part, layers in parts.items()], name, what)


def put_unet_lora(unet: Any, weights: Mapping[str, Tensor], name: str, what: str) -> None:
    """Makes a LoRA, at scale 1, the active adapter of a UNet, in place of an adapter of that name.

    Args:
        unet: a diffusers UNet2DConditionModel.
        weights: "<module>.lora_A.weight" (rank, in) and "<module>.lora_B.weight" (out, rank), or under another name
            that :func:`dsd_fast.models.lora_formats.read_lora` knows.
        name: of the adapter.
        what: the LoRA's name in errors.

    Raises:
        ModelError: weights that do not fit; the UNet then has the adapters that it had.
    """
    layers = read_lora(weights, unet, (), what)["unet"]
    if not layers:
        raise ModelError(f"{what} cannot be loaded into the UNet: it has no matrices named '<module>{_DOWN}'")
    if name in getattr(unet, "peft_config", {}):
        unet.delete_adapters(name)
    _put([(unet, layers)], name, what)


def _put(parts: Sequence[tuple[Any, Mapping[str, LoraLayer]]], name: str, what: str) -> None:
    """Makes layers that fit the active adapter of their networks."""
    from peft import LoraConfig

    with _adding(name, [network for network, _ in parts], f"{what} cannot be loaded"):
        for network, layers in parts:
            config = LoraConfig(
                **lora_settings({path: (layer.rank, layer.alpha) for path, layer in layers.items()}),
                use_dora=any(layer.magnitude is not None for layer in layers.values()),
                lora_bias=any(layer.bias is not None for layer in layers.values()),
                init_lora_weights=False,
            )
            network.add_adapter(config, name)
            for path, layer in layers.items():
                _fill(network.get_submodule(path), layer, name)


@contextmanager
def _adding(name: str, networks: Sequence[Any], failed: str) -> Iterator[None]:
    """Around the making of an adapter: modes and gradient flags are kept, and of a failed one nothing stays."""
    from diffusers.utils.peft_utils import delete_adapter_layers

    before = {id(parameter): parameter.requires_grad for network in networks for parameter in network.parameters()}
    frozen = not any(before.values())
    modes = [network.training for network in networks]
    try:
        yield
    except Exception as error:
        for network in networks:
            if name in getattr(network, "peft_config", {}):
                delete_adapter_layers(network, name)
        raise ModelError(f"{failed}: {reason(error)}") from error
    for network, training in zip(networks, modes, strict=True):
        if not training:
            network.eval()
        for parameter in network.parameters():
            parameter.requires_grad_(before.get(id(parameter), not frozen))


@torch.no_grad()
def _fill(module: Any, layer: LoraLayer, name: str) -> None:
    """Copies a layer's values into PEFT's module, in its type and on its device."""
    up = module.lora_B[name]
    module.lora_A[name].weight.copy_(layer.down)
    up.weight.copy_(layer.up)
    if up.bias is not None:
        up.bias.copy_(torch.zeros_like(up.bias) if layer.bias is None else layer.bias)
    if layer.magnitude is not None:
        target = module.lora_magnitude_vector[name].weight
        target.copy_(layer.magnitude.view_as(target))
    elif name in module.lora_magnitude_vector:
        # The configuration is for all layers, of which this one is plain LoRA, at every strength.
        module.use_dora[name] = False
        del module.lora_variant[name], module.lora_magnitude_vector[name]


def save_lora(unet: Any, name: str, file: str | os.PathLike[str]) -> None:
    """Writes an adapter of a UNet as a file that diffusers' `pipe.load_lora_weights` and `Model.load_lora` read.

    It holds "unet.<module>.lora_A.weight" (rank, in) and "unet.<module>.lora_B.weight" (out, rank) in the adapter's
    type, and in its header ranks and alphas, as diffusers' `save_lora_weights` writes them. A strength that was set on
    the network (`set_adapters`) is not the adapter's and not in the file. The file appears whole or not at all; its
    folder is made where there is none.

    Args:
        unet: a diffusers UNet2DConditionModel.
        name: of the adapter.
        file: to write, ".safetensors"; diffusers' own name is "pytorch_lora_weights.safetensors".

    Raises:
        ModelError: no such adapter, one of another kind than plain LoRA, or another ending of the file's name.
        OSError: the folder cannot be written, or the disk is full.
    """
    layers = lora_layers(unet, name)
    settings = lora_settings({path: (layer.r[name], layer.lora_alpha[name]) for path, layer in layers.items()})
    # Not the dropout: in what diffusers loads it would be on.
    settings["use_rslora"] = unet.peft_config[name].use_rslora
    tensors = {}
    for path, layer in layers.items():
        tensors[f"unet.{path}{_DOWN}"] = layer.lora_A[name].weight
        tensors[f"unet.{path}{_UP}"] = layer.lora_B[name].weight
    about = json.dumps({f"unet.{key}": value for key, value in settings.items()})
    _write(Path(file), tensors, {"lora_adapter_metadata": about})


def save_official_lora(unet: Any, name: str, file: Path) -> None:
    """Writes an adapter of a UNet as the official code's checkpoint; see `compat.attn_procs.save_attn_procs`.

    Raises:
        ModelError: as :func:`save_lora` and :func:`dsd_fast.models.attn_procs.to_official`.
        OSError: the folder cannot be written, or the disk is full.
    """
    _write(file, to_official(unet, name, lora_layers(unet, name)))


def lora_layers(unet: Any, name: str) -> dict[str, Any]:
    """PEFT's layers of an adapter, by the paths of the modules that they adapt.

    Raises:
        ModelError: no such adapter, or one of another kind than plain LoRA.
    """
    configs = getattr(unet, "peft_config", None) or {}
    if name not in configs:
        raise ModelError(f"the UNet has no adapter {name!r}; it has {', '.join(sorted(configs)) or 'none'}")
    found = {path: layer for path, layer in unet.named_modules() if name in getattr(layer, "lora_A", ())}
    plain = found and configs[name].peft_type == "LORA" and not getattr(configs[name], "modules_to_save", None)
    if not plain or any(name in layer.lora_variant or layer.lora_B[name].bias is not None for layer in found.values()):
        raise ModelError(f"adapter {name!r} is of another kind than plain LoRA, such as DoRA or LoRA with biases")
    return found


def lora_settings(ranks: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """The arguments of PEFT's LoraConfig for a LoRA of such ranks and alphas, by the paths of the adapted modules."""
    (rank, rank_pattern), (alpha, alpha_pattern) = (
        _common({path: values[place] for path, values in ranks.items()}) for place in (0, 1)
    )
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(ranks),
    }


def _common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and by a pattern of PEFT each other one.

    PEFT tries the patterns one by one for each layer, so that there is one for each value and not for each layer.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    others = sorted(set(values.values()) - {common})
    paths = {other: [re.escape(path) for path, value in values.items() if value == other] for other in others}
    return common, {f"^(?:{'|'.join(paths[other])})": other for other in others}


def _write(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all, and its folder where there is none.

    Raises:
        ModelError: another ending of the file's name.
        OSError: the folder cannot be written, or the disk is full.
    """
    from safetensors.torch import save

    if file.suffix != ".safetensors":
        raise ModelError(f"LoRA file is {str(file)!r}, expected a name that ends in .safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(file) as stream:
        stream.write(save(values, {"format": "pt", **(header or {})}))


def _read(file: Path, what: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], str | None]:
    """A file's tensors, what its header or PEFT's file beside it says of PEFT's settings by part, and its own part.

    Raises:
        ModelError: not a safetensors file, or settings that cannot be read.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(file, framework="pt") as stream:
            header = stream.metadata() or {}
        tensors = load_file(file)
        beside = file.with_name(_PEFT_SETTINGS)
        if file.name == _PEFT_NAME and beside.is_file():
            text, prefix = beside.read_text(encoding="utf-8"), "."
        else:
            text, prefix = header.get("lora_adapter_metadata") or "{}", ""
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"its settings are {text[:80]!r}, expected a JSON object")
    except Exception as error:
        raise ModelError(f"{what} cannot be read: {reason(error)}") from error
    settings: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        part, _, setting = f"{prefix}{key}".rpartition(".")
        settings.setdefault(part, {})[setting] = value
    return tensors, settings, file.parent.name if file.name == _PEFT_NAME and file.parent.name in PARTS else None


def find_lora(
    source: str | os.PathLike[str],
    weight_name: str | None = None,
    *,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """The .safetensors files that "mini", a file, folder or hub id and an optional file name stand for.

    They are one, or those of PEFT's folders "unet", "text_encoder" and "text_encoder_2" inside.

    Raises:
        ModelError: none, several to choose from, or only pickles.
    """
    if weight_name is not None:
        _refuse_pickle(weight_name)
    if source == "mini":
        from dsd_fast.models import mini

        source = mini.path() / "lora"
    path = Path(source)
    if path.is_file():
        _refuse_pickle(path.name)
        return [path]
    text = os.fspath(source)
    if not path.is_dir():
        if not isinstance(source, str) or text.count("/") != 1 or text.startswith((".", "~", "/")):
            raise ModelError(f"LoRA {text!r} does not exist")
        _refuse_pickle(text)
        places = ("", *(f"{part}/" for part in PARTS)) if weight_name is None else (f"{Path(weight_name).parent}/",)
        names = [f"{place}{file}" for place in places for file in (_PEFT_NAME, _PEFT_SETTINGS)]
        path, _ = find_folder(
            text,
            [weight_name or _DEFAULT_NAME, *(name.removeprefix("./") for name in names)],
            what="LoRA",
            local_files_only=local_files_only,
            cache_dir=cache_dir,
        )
    return _find_in_folder(path, weight_name, f"LoRA {text!r}")


def _find_in_folder(folder: Path, weight_name: str | None, what: str) -> list[Path]:
    if weight_name is not None:
        if not (folder / weight_name).is_file():
            raise ModelError(f"{what} has no file {weight_name!r}")
        return [folder / weight_name]
    for name in (_DEFAULT_NAME, _PEFT_NAME):
        if (folder / name).is_file():
            return [folder / name]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{what} has several files ({names}); choose one with weight_name")
    files = files or [folder / part / _PEFT_NAME for part in PARTS if (folder / part / _PEFT_NAME).is_file()]
    if files:
        return files
    for file in sorted(
        (*folder.iterdir(), *(file for part in PARTS for file in folder.glob(f"{part}/adapter_model.*")))
    ):
        _refuse_pickle(file.name)
    raise ModelError(f"{what} has no .safetensors file")


def _refuse_pickle(name: str) -> None:
    if name.endswith(_PICKLES):
        raise ModelError(f"LoRA file {name!r} is a pickle, which can run code when loaded; expected .safetensors")
