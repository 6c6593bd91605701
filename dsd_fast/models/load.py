"""Models from the embedded weights, a diffusers folder, the hub, or an existing pipeline."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dsd_fast.diffusion import fresh_scheduler
from dsd_fast.kernels.common.host import ordinary
from dsd_fast.models.architecture import CLASSES, PIPELINES, check_unet
from dsd_fast.models.bundle import Model
from dsd_fast.models.errors import ModelError, reason
from dsd_fast.models.hub import find_folder
from dsd_fast.models.private import uncompiled
from dsd_fast.models.single_file import check_config, check_tensors, load_component, published_config, read_checkpoint

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

# File stems of weights: diffusers' networks, transformers' networks.
DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
_STEMS = {"unet": DIFFUSERS_STEM, "vae": DIFFUSERS_STEM}


@ordinary()
def load(
    model: str | os.PathLike[str] = "mini",
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    variant: str | None = None,
    config: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    clip: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Model:
    """A Stable Diffusion 1.x, 2.x or XL model, in eval mode and without gradients to its weights.

    Only safetensors, JSON and tokenizer files are read or downloaded; a safety checker is not. With `local_files_only`
    or HF_HUB_OFFLINE set nothing is downloaded.

    Args:
        model: "mini", the model shipped in this package; a folder in diffusers' layout; a hub id; or a checkpoint of
            one .safetensors file in the original code's naming, with all networks.
        device: "cpu", "cuda", "cuda:1", …
        dtype: "float32", "float16", "bfloat16", "float64", or that torch.dtype; of all networks.
        revision: branch, tag or commit of a hub id.
        variant: of the weight files, e.g. "fp16"; networks that have none of it are loaded without.
        config: for a checkpoint of one file: a folder or hub id of a model with its configuration, tokenizers and
            scheduler, whose weights are not read; None: the published SD 1.5 or SDXL that it is shaped like.
        local_files_only: take hub ids from the cache alone.
        clip: a CLIPModel, or a folder or hub id of one; None: the model folder's clip/ if it has one (not `config`'s).
        cache_dir: of the hub's files; None: the usual one.

    Raises:
        ModelError: naming what was given and what was expected: no such folder, repository or revision, a missing
            component, weights only as pickle, another architecture, an unknown dtype or a device that is not there.
    """
    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
    name = os.fspath(model)
    hub = {"local_files_only": local_files_only, "cache_dir": cache_dir}
    checkpoint, commit = None, None
    if name != "mini" and Path(model).is_file():
        for argument, value in (("revision", revision), ("variant", variant)):
            if value is not None:
                raise ModelError(f"{argument} is {value!r}, but model {name!r} is a file; expected None")
        checkpoint = read_checkpoint(Path(model))
        folder = _find_config(config, checkpoint, f"model {name!r}", hub)
    elif config is not None:
        raise ModelError(f"config is {os.fspath(config)!r}, but model {name!r} has its own, expected None")
    else:
        folder, commit = _find_model(model, variant, revision, hub)
    parts = _load_components(folder, name, torch_dtype, variant, checkpoint)
    own_clip = folder / "clip" if checkpoint is None and (folder / "clip").is_dir() else None
    clip_model = load_clip(
        clip if clip is not None else own_clip, torch_dtype, local_files_only=local_files_only, cache_dir=cache_dir
    )
    for network in (parts["unet"], parts["vae"], *parts["text_encoders"], clip_model):
        if network is not None:
            network.to(torch_device)
            network.requires_grad_(False)
            network.eval()
    # The layout that convolutions run fastest in, on CPUs and GPUs; the values are the same.
    parts["unet"].to(memory_format=torch.channels_last)
    return Model(
        **parts, clip=clip_model, name=name, revision=commit, local_files_only=local_files_only, cache_dir=cache_dir
    )


@ordinary()
def from_pipeline(pipe: Any, clip: Any = None) -> Model:
    """A model on the networks of an existing diffusers pipeline, with its adapters; the pipeline is not changed.

    Args:
        pipe: StableDiffusionPipeline, StableDiffusionXLPipeline, or another pipeline with their components.
        clip: a CLIPModel, or a folder or hub id of one, which is then loaded in the UNet's type and on its device.

    Raises:
        ModelError: a component is missing or of another architecture.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise ModelError(f"pipe is of type {type(pipe).__name__}, expected a diffusers pipeline")
    label = type(pipe).__name__
    sdxl = components.get("text_encoder_2") is not None
    names = PIPELINES["StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline"]
    for name in names:
        component = uncompiled(components.get(name))
        if component is None:
            raise ModelError(f"{label} has no component {name!r}, expected {', '.join(names)}")
        kinds = {cls.__name__ for cls in type(component).__mro__}
        if name in CLASSES and kinds.isdisjoint(CLASSES[name]):
            raise ModelError(f"{label}: {name!r} is a {type(component).__name__}, expected {CLASSES[name][0]}")
    unet = components["unet"]
    weight = next(unet.parameters())
    clip_model = load_clip(clip, weight.dtype, local_files_only=False, cache_dir=None)
    if clip_model is not None and clip_model is not clip:
        clip_model.to(weight.device).requires_grad_(False).eval()
    return Model(
        unet=unet,
        vae=components["vae"],
        text_encoders=[components[name] for name in names if name.startswith("text_encoder")],
        tokenizers=[components[name] for name in names if name.startswith("tokenizer")],
        scheduler=components["scheduler"],
        clip=clip_model,
        name=str(getattr(pipe, "name_or_path", None) or label),
        force_zeros_for_empty_prompt=bool(pipe.config.get("force_zeros_for_empty_prompt", True)),
    )


def _find_model(
    model: str | os.PathLike[str], variant: str | None, revision: str | None, hub: Mapping[str, Any]
) -> tuple[Path, str | None]:
    """A model's folder, and its commit if it is the hub's."""
    folder, commit = find_folder(model, _patterns(variant), what="model", shipped="", revision=revision, **hub)
    if commit is not None and variant is not None:
        # Which files the hub has is known only now.
        lacking = [network for network in _NETWORKS if not _has_weights(folder / network, _stem(network), variant)]
        if len(lacking) < len(_NETWORKS):
            plain = [pattern for network in lacking for pattern in _weight_patterns(network, None)]
            find_folder(model, plain, what="model", revision=commit, **hub)
    return folder, commit


def _find_config(
    config: str | os.PathLike[str] | None, checkpoint: Mapping[str, torch.Tensor], what: str, hub: Mapping[str, Any]
) -> Path:
    """The folder with the configuration of a checkpoint of one file."""
    source = published_config(checkpoint, what) if config is None else config
    try:
        return find_folder(source, _settings_patterns(), what=f"config of {what},", shipped="", **hub)[0]
    except ModelError as error:
        raise ModelError(f"{error}; give config=, a folder in diffusers' layout or a hub id") from error


def _load_components(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    variant: str | None,
    checkpoint: Mapping[str, torch.Tensor] | None,
) -> dict[str, Any]:
    """Arguments of `Model` from a folder; every check that needs no weights comes first.

    Args:
        checkpoint: of one file, instead of the folder's weights.
    """
    import diffusers
    import transformers

    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(f"model {name!r} has no model_index.json, expected a folder in diffusers' layout")
    index = read_json(index_file, name)
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ModelError(f"model {name!r} is a {pipeline}, expected {' or '.join(PIPELINES)}")
    names = PIPELINES[pipeline]
    variants = {part: variant if _has_weights(folder / part, _stem(part), variant) else None for part in names}
    if variant is not None and not any(variants.values()):
        variants = dict.fromkeys(names, variant)
    for component in names:
        _check_component(folder, name, index, component, variants[component], weights=checkpoint is None)
    unet_config = read_json(folder / "unet" / "config.json", name)
    vae_config = read_json(folder / "vae" / "config.json", name)
    check_unet(unet_config, vae_config.get("latent_channels", 4), f"model {name!r}")

    def network(component: str) -> Any:
        cls = getattr(diffusers if component in _STEMS else transformers, CLASSES[component][0])
        what = f"component {component!r} of model {name!r}"
        if checkpoint is None:
            return load_network(cls, folder / component, dtype, variants[component], what)
        with reported(what), _no_progress_bars():
            return load_component(cls, component, folder / component, checkpoint, dtype)

    def tokenizer(component: str) -> Any:
        with reported(f"component {component!r} of model {name!r}"):
            return transformers.CLIPTokenizer.from_pretrained(folder / component, local_files_only=True)

    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json", name)
    if checkpoint is not None:
        check_config(checkpoint, "text_encoder_2" in names, scheduler_config, f"model {name!r}")
    with reported(f"component 'scheduler' of model {name!r}"):
        scheduler = fresh_scheduler({"_class_name": index["scheduler"][1], **scheduler_config})
    return {
        "unet": network("unet"),
        "vae": network("vae"),
        "text_encoders": [network(part) for part in names if part.startswith("text_encoder")],
        "tokenizers": [tokenizer(part) for part in names if part.startswith("tokenizer")],
        "scheduler": scheduler,
        "force_zeros_for_empty_prompt": bool(index.get("force_zeros_for_empty_prompt", True)),
    }


def _check_component(
    folder: Path, name: str, index: Mapping[str, Any], component: str, variant: str | None, *, weights: bool
) -> None:
    entry = index.get(component)
    where = folder / component
    if not entry or entry[-1] is None:
        raise ModelError(f"model {name!r} has no component {component!r} in its model_index.json")
    if component in CLASSES and entry[-1] not in CLASSES[component]:
        raise ModelError(f"model {name!r}: component {component!r} is a {entry[-1]}, expected {CLASSES[component][0]}")
    if not where.is_dir():
        raise ModelError(f"model {name!r} lacks component {component!r}: {where} does not exist")
    if component.startswith("tokenizer"):
        # Without its vocabulary transformers would build an empty tokenizer.
        files = {file.name for file in where.iterdir()}
        if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
            raise ModelError(
                f"model {name!r}: component {component!r} has neither tokenizer.json nor vocab.json and merges.txt"
            )
    elif component == "scheduler":
        if not (where / "scheduler_config.json").is_file():
            raise ModelError(f"model {name!r}: component 'scheduler' has no scheduler_config.json")
    elif weights:
        check_weights(where, _stem(component), variant, f"model {name!r}: component {component!r}")
    else:
        _check_config(where, f"model {name!r}: component {component!r}")


def check_weights(where: Path, stem: str, variant: str | None, what: str) -> None:
    _check_config(where, what)
    if _has_weights(where, stem, variant):
        return
    others = sorted(file.name for file in where.glob("*.safetensors"))
    if others:
        wanted = f"of variant {variant!r}" if variant else "without a variant"
        raise ModelError(f"{what} has no weights {wanted}, but {', '.join(others)}; choose with variant=")
    pickles = sorted(file.name for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth") for file in where.glob(pattern))
    if pickles:
        raise ModelError(
            f"{what} has its weights only as pickle ({', '.join(pickles)}), which can run code when loaded; "
            "expected .safetensors"
        )
    raise ModelError(f"{what} has no .safetensors weights")


def _check_config(where: Path, what: str) -> None:
    if not (where / "config.json").is_file():
        raise ModelError(f"{what} has no config.json")


def _has_weights(where: Path, stem: str, variant: str | None) -> bool:
    return any(any(where.glob(pattern)) for pattern in weight_patterns(stem, variant))


def load_network(
    cls: Any, where: Path, dtype: torch.dtype, variant: str | None, what: str, optional: str | None = None
) -> Any:
    """A network in eval mode; weights that are missing from the file are an error, not random numbers.

    Without weights of its module ``optional`` it is loaded without that module, which is None then.
    """
    from diffusers.utils import is_accelerate_available

    options: dict[str, Any] = {"variant": variant, "use_safetensors": True, "local_files_only": True}
    if cls.__module__.startswith("diffusers."):
        # Its default warns where accelerate is not installed.
        options |= {"torch_dtype": dtype, "low_cpu_mem_usage": is_accelerate_available()}
    else:
        # Otherwise it says which tensors do not fit in its log alone.
        options |= {"dtype": dtype, "ignore_mismatched_sizes": True}
    with reported(what), _no_progress_bars():
        network, info = cls.from_pretrained(where, output_loading_info=True, **options)
        missing = set(info["missing_keys"])
        if optional is not None and (own := {name for name in missing if name.startswith(f"{optional}.")}):
            setattr(network, optional, None)
            missing -= own
        check_tensors(missing, (), info["mismatched_keys"])
    return network.eval()


def load_clip(
    clip: Any, dtype: torch.dtype, *, local_files_only: bool, cache_dir: str | os.PathLike[str] | None
) -> Any:
    """A CLIPModel from itself, a folder or a hub id; None of None.

    Raises:
        ModelError: something else, no such folder or repository, or a model of another kind there.
    """
    if clip is None:
        return None
    from transformers import CLIPModel

    if isinstance(uncompiled(clip), CLIPModel):
        return clip
    if not isinstance(clip, str | os.PathLike):
        raise ModelError(f"clip is of type {type(clip).__name__}, expected a CLIPModel, a folder or a hub id")
    patterns = ["config.json", "processor_config.json", "preprocessor_config.json"]
    patterns += weight_patterns(TRANSFORMERS_STEM, None)
    folder, _ = find_folder(clip, patterns, what="clip", local_files_only=local_files_only, cache_dir=cache_dir)
    what = f"clip {os.fspath(clip)!r}"
    check_weights(folder, TRANSFORMERS_STEM, None, what)
    kind = read_json(folder / "config.json", what).get("model_type")
    if kind != "clip":
        raise ModelError(f"{what} is a model of type {kind!r}, expected 'clip'")
    return load_network(CLIPModel, folder, dtype, None, what)


def _patterns(variant: str | None) -> list[str]:
    """Files of a hub repository that a model needs, and no other precision or format of the same weights."""
    patterns = [*_settings_patterns(), "clip/*.json", "clip/merges.txt", *_weight_patterns("clip", None)]
    return patterns + [pattern for network in _NETWORKS for pattern in _weight_patterns(network, variant)]


def _settings_patterns() -> list[str]:
    """Files of a hub repository that a model needs beside its weights."""
    patterns = ["model_index.json", "scheduler/*.json"]
    patterns += [f"{network}/config.json" for network in _NETWORKS]
    patterns += [f"{part}/{file}" for part in ("tokenizer", "tokenizer_2") for file in ("*.json", "merges.txt")]
    return patterns


def _weight_patterns(network: str, variant: str | None) -> list[str]:
    return [f"{network}/{pattern}" for pattern in weight_patterns(_stem(network), variant)]


def _stem(network: str) -> str:
    return _STEMS.get(network, TRANSFORMERS_STEM)


def weight_patterns(stem: str, variant: str | None) -> list[str]:
    """Whole, sharded, and the index of shards."""
    if variant is None:
        return [f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", f"{stem}.safetensors.index.json"]
    return [
        f"{stem}.{variant}.safetensors",
        f"{stem}.{variant}-?????-of-?????.safetensors",
        f"{stem}.safetensors.index.{variant}.json",
    ]


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in _DTYPES.values():
        raise ModelError(f"dtype is {dtype!r}, expected float32, float16, bfloat16 or float64")
    assert isinstance(resolved, torch.dtype)
    return resolved


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name, which is there and holds weights.

    Raises:
        ModelError: it is not, or the name is none.
    """
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"device is {device!r}, expected cpu, cuda or cuda:N") from error
    if resolved.type == "cpu":
        return resolved
    if resolved.type == "meta":
        raise ModelError("device is 'meta', expected one that holds weights")
    module = getattr(torch, resolved.type, None)
    count = module.device_count() if module is not None and module.is_available() else 0
    if (resolved.index or 0) >= count:
        raise ModelError(f"device is {str(device)!r}, but torch sees {count} devices of type {resolved.type!r}")
    return resolved


def read_json(file: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name!r}: {file.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"model {name!r}: {file.name} holds no JSON object")
    return content


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Turns what diffusers and transformers raise into one error that names the thing."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{what} cannot be loaded: {reason(error)}") from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silences transformers' bars over weights, a line each for loads of milliseconds."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
