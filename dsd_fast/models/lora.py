"""LoRA files, safetensors only."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dsd_fast.jobs import replacing
from dsd_fast.models.attn_procs import from_official, is_official, to_official
from dsd_fast.models.errors import ModelError, first_line
from dsd_fast.models.hub import download_file
from dsd_fast.models.kohya import KohyaLora, from_kohya, is_kohya
from dsd_fast.models.private import private
from dsd_fast.models.tuners import adapter_names

_DEFAULT_NAME = "pytorch_lora_weights.safetensors"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def load_lora(
    unet: Any,
    text_encoders: Sequence[Any],
    pipeline: Callable[[], Any],
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
        pipeline: makes a stock pipeline on them.
        label: the model's name in errors.
    """
    from safetensors.torch import load_file

    if not name or "." in name:
        raise ModelError(f"adapter name is {name!r}, expected a non-empty name without a dot")
    networks = (unet, *text_encoders)
    if any(name in adapter_names(network) for network in networks):
        raise ModelError(f"adapter name {name!r} is taken, expected a new one")
    file = find_lora(source, weight_name, local_files_only=local_files_only, cache_dir=cache_dir)
    what = f"LoRA {str(file)!r}"
    kind = _kind(file)
    if kind == "official":
        put_unet_lora(unet, from_official(load_file(file), unet, what), name, what)
        return
    pipe = pipeline()
    kohya = from_kohya(load_file(file), unet, text_encoders, what) if kind == "kohya" else None
    with _adding(name, networks, pipe.delete_adapters, f"{what} cannot be loaded into {label!r}"):
        if kohya is not None:
            _put_kohya(pipe, text_encoders, *kohya, name)
        else:
            pipe.load_lora_weights(
                str(file.parent),
                weight_name=file.name,
                adapter_name=name,
                use_safetensors=True,
                local_files_only=True,
            )
    if not any(name in getattr(network, "peft_config", {}) for network in networks):
        raise ModelError(f"{what} has no weights for the UNet or the text encoders of {label!r}")


def put_unet_lora(unet: Any, weights: Mapping[str, Tensor], name: str, what: str) -> None:
    """Makes a LoRA, at scale 1, the active adapter of a UNet, in place of an adapter of that name.

    Args:
        unet: a diffusers UNet2DConditionModel.
        weights: "<module>.lora_A.weight" (rank, in) and "<module>.lora_B.weight" (out, rank).
        name: of the adapter.
        what: the LoRA's name in errors.

    Raises:
        ModelError: weights that do not fit; the UNet then has the adapters that it had.
    """
    ranks = {key.removesuffix(_DOWN): len(matrix) for key, matrix in weights.items() if key.endswith(_DOWN)}
    if not ranks:
        raise ModelError(f"{what} cannot be loaded into the UNet: it has no matrices named '<module>{_DOWN}'")
    settings = lora_settings({path: (rank, rank) for path, rank in ranks.items()})
    if name in getattr(unet, "peft_config", {}):
        # First on a copy: weights that do not fit must not cost the adapter that is there.
        trial = private(unet)
        trial.delete_adapters(name)
        _put_unet_lora(trial, weights, name, what, settings)
        unet.delete_adapters(name)
    _put_unet_lora(unet, weights, name, what, settings)


def _put_unet_lora(unet: Any, weights: Mapping[str, Tensor], name: str, what: str, settings: Mapping[str, Any]) -> None:
    with _adding(name, (unet,), unet.delete_adapters, f"{what} cannot be loaded into the UNet"):
        unet.load_lora_adapter(dict(weights), prefix=None, adapter_name=name, metadata=dict(settings))


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
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*ranks.values(), strict=True))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}": r for path, (r, _) in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, (_, a) in ranks.items() if a != alpha},
        "target_modules": sorted(ranks),
    }


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


def _put_kohya(pipe: Any, text_encoders: Sequence[Any], unet: KohyaLora, texts: Sequence[KohyaLora], name: str) -> None:
    if unet.ranks:
        settings = lora_settings(unet.ranks)
        pipe.unet.load_lora_adapter(dict(unet.weights), prefix=None, adapter_name=name, metadata=settings)
    for encoder, part in zip(text_encoders, texts, strict=True):
        if part.ranks:
            pipe.load_lora_into_text_encoder(
                {f"text_encoder.{key}": value for key, value in part.weights.items()},
                None,
                encoder,
                prefix="text_encoder",
                adapter_name=name,
                metadata={f"text_encoder.{key}": value for key, value in lora_settings(part.ranks).items()},
            )
            # Early transformers 5 leave the layers of a text encoder with a projection as they were made.
            for path, layer in lora_layers(encoder, name).items():
                layer.lora_A[name].weight.data.copy_(part.weights[f"{path}{_DOWN}"])
                layer.lora_B[name].weight.data.copy_(part.weights[f"{path}{_UP}"])


def _kind(file: Path) -> Literal["official", "kohya", "diffusers"]:
    """Whose file it is: the official DSD code's, kohya's, or what diffusers reads."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stream:
            keys = list(stream.keys())
    except SafetensorError:
        # diffusers says what is wrong with it.
        return "diffusers"
    return "official" if is_official(keys) else "kohya" if is_kohya(keys) else "diffusers"


@contextmanager
def _adding(name: str, networks: Sequence[Any], delete: Callable[[str], None], failed: str) -> Iterator[None]:
    """Around the loading of an adapter: modes and gradient flags are kept, and of a failed one nothing stays."""
    before = {id(parameter): parameter.requires_grad for network in networks for parameter in network.parameters()}
    frozen = not any(before.values())
    modes = [network.training for network in networks]
    try:
        yield
    except Exception as error:
        if any(name in getattr(network, "peft_config", {}) for network in networks):
            delete(name)
        raise ModelError(f"{failed}: {first_line(error)}") from error
    for network, training in zip(networks, modes, strict=True):
        if not training:
            network.eval()
        for parameter in network.parameters():
            parameter.requires_grad_(before.get(id(parameter), not frozen))


def find_lora(
    source: str | os.PathLike[str],
    weight_name: str | None = None,
    *,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The .safetensors file that "mini", a file, folder or hub id and an optional file name stand for.

    Raises:
        ModelError: none, several, or only pickles.
    """
    if weight_name is not None:
        _refuse_pickle(weight_name)
    if source == "mini":
        from dsd_fast.models import mini

        source = mini.path() / "lora"
    path = Path(source)
    if path.is_file():
        _refuse_pickle(path.name)
        return path
    if path.is_dir():
        return _find_in_folder(path, weight_name)
    text = os.fspath(source)
    if isinstance(source, str) and text.count("/") == 1 and not text.startswith((".", "~", "/")):
        _refuse_pickle(text)
        return download_file(
            text,
            weight_name or _DEFAULT_NAME,
            what="LoRA",
            local_files_only=local_files_only,
            cache_dir=cache_dir,
        )
    raise ModelError(f"LoRA {text!r} does not exist")


def _find_in_folder(folder: Path, weight_name: str | None) -> Path:
    if weight_name is not None:
        if not (folder / weight_name).is_file():
            raise ModelError(f"LoRA folder {str(folder)!r} has no file {weight_name!r}")
        return folder / weight_name
    found = sorted(folder.glob("*.safetensors"))
    if folder / _DEFAULT_NAME in found:
        return folder / _DEFAULT_NAME
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"LoRA folder {str(folder)!r} has several files ({names}); choose one with weight_name")
    for file in sorted(folder.iterdir()):
        _refuse_pickle(file.name)
    raise ModelError(f"LoRA folder {str(folder)!r} has no .safetensors file")


def _refuse_pickle(name: str) -> None:
    if name.endswith(_PICKLES):
        raise ModelError(f"LoRA file {name!r} is a pickle, which can run code when loaded; expected .safetensors")
