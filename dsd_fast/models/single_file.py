"""Checkpoints of one file in the original code's naming (CompVis/latent-diffusion, Stability-AI/generative-models).

Such a file holds the weights of all networks and no configuration. diffusers' functions behind `from_single_file` give
the weights diffusers' names; that every weight has its layer and every layer its weights is checked here, since
diffusers only warns of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dsd_fast.models.architecture import check_unet
from dsd_fast.models.errors import ModelError, reason

_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
# Of CosXL and of Playground 2.5, whose networks are SDXL's.
_OTHER_PROCESS = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
_SECOND_ENCODER = "conditioner.embedders.1.model."
_TEXT = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": _SECOND_ENCODER}


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """A file's tensors.

    Raises:
        ModelError: another kind of file, as a pickle, or a checkpoint of something else than a Stable Diffusion model.
    """
    from safetensors.torch import load_file

    what = f"model {str(file)!r}"
    if file.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ModelError(f"{what} is a pickle, which can run code when loaded; expected .safetensors")
    try:
        checkpoint = load_file(file)
    except Exception as error:
        raise ModelError(f"{what} cannot be read as a .safetensors file: {reason(error)}") from error
    if _FIRST not in checkpoint:
        raise ModelError(
            f"{what} has no {_FIRST!r}, expected all networks of a Stable Diffusion in the original code's "
            f"naming; a LoRA is for Model.load_lora"
        )
    check_unet({"in_channels": checkpoint[_FIRST].shape[1], "out_channels": 4}, 4, what)
    return checkpoint


def published_config(checkpoint: Mapping[str, Tensor], what: str) -> str:
    """The hub id of the published model that a checkpoint is shaped like.

    Raises:
        ModelError: an SD 2.x, of which the weights do not tell what they predict.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    hub_id: str = fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]
    if infer_diffusers_model_type(checkpoint) == "v2":
        raise ModelError(
            f"{what} is an SD 2.x, whose weights do not tell whether they predict noise or velocity; give "
            f"config='{hub_id}-base' for noise, config='{hub_id}' for velocity, or a folder"
        )
    return hub_id


def check_config(checkpoint: Mapping[str, Tensor], sdxl: bool, scheduler: Mapping[str, Any], what: str) -> None:
    """Refuses a configuration of another family, or with another prediction than the checkpoint says it was made for.

    Args:
        sdxl: whether the configuration is of an SDXL.
        scheduler: the configuration's.

    Raises:
        ModelError: naming both sides.
    """
    if sdxl != any(key.startswith(_SECOND_ENCODER) for key in checkpoint):
        kinds = ("one text encoder, as SD 1.x and 2.x have", "two text encoders, as SDXL has")
        raise ModelError(f"{what} has {kinds[not sdxl]}, but config is of a model with {kinds[sdxl]}")
    other = next((key for key in _OTHER_PROCESS if key in checkpoint), None)
    if other is not None:
        raise ModelError(
            f"{what} holds the mark {other!r} of a continuous diffusion process (EDM), which is not supported"
        )
    prediction = scheduler.get("prediction_type", "epsilon")
    for key, given, expected in (
        ("v_pred", prediction == "v_prediction", "prediction_type = 'v_prediction'"),
        ("ztsnr", scheduler.get("rescale_betas_zero_snr", False), "rescale_betas_zero_snr = true"),
    ):
        if key in checkpoint and not given:
            raise ModelError(f"{what} holds the mark {key!r}, expected a config whose scheduler has {expected}")


def load_component(cls: Any, component: str, where: Path, checkpoint: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A network in eval mode, by its configuration, with its part of a checkpoint.

    Args:
        cls: UNet2DConditionModel, AutoencoderKL, CLIPTextModel or CLIPTextModelWithProjection.
        where: the folder of its config.json.

    Raises:
        ModelError: weights that are missing, have no layer, or have another shape; the first is named.
    """
    if component in _TEXT:
        config = cls.config_class.from_pretrained(where, local_files_only=True)
        weights = _text_weights(component, config, checkpoint)
        options = {"config": config, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        network, info = cls.from_pretrained(None, state_dict=weights, **options)
        check_tensors(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        return network.eval()

    from diffusers.loaders import single_file_utils

    config = cls.load_config(where)
    convert = getattr(single_file_utils, f"convert_ldm_{component}_checkpoint")
    weights = convert(dict(checkpoint), config=config)
    with torch.device("meta"):
        network = cls.from_config(config)
    layers = network.state_dict()
    shapes = [(key, weights[key].shape, layers[key].shape) for key in layers.keys() & weights.keys()]
    wrong = [entry for entry in shapes if entry[1] != entry[2]]
    check_tensors(layers.keys() - weights.keys(), weights.keys() - layers.keys(), wrong)
    network.load_state_dict({key: value.to(dtype).contiguous() for key, value in weights.items()}, assign=True)
    return network.eval()


def _text_weights(component: str, config: Any, checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's weights under transformers' names, be they OpenAI's (SD 1.x, SDXL's first) or OpenCLIP's."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    prefix = _TEXT[component]
    if any(key.startswith(prefix) for key in checkpoint):
        weights = convert_open_clip_checkpoint(SimpleNamespace(config=config), checkpoint, prefix=prefix)
        # As diffusers' own script writes it, the other way round than OpenCLIP.
        if f"{prefix}text_projection.weight" in checkpoint:
            weights["text_projection.weight"] = checkpoint[f"{prefix}text_projection.weight"]
    else:
        weights = convert_ldm_clip_checkpoint(checkpoint)
    # Older versions of transformers kept the numbers from 0 on among the weights, newer ones leave out "text_model.".
    return {
        key if key.startswith("text_") else f"text_model.{key}": value
        for key, value in weights.items()
        if not key.endswith("position_ids")
    }


def check_tensors(missing: Iterable[str], more: Iterable[str], wrong: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuses weights that are not those of a network.

    Args:
        missing: names of the network's tensors that have no weights.
        more: names of weights that are no tensors of the network's.
        wrong: names, shapes of the weights and of the network's tensors.

    Raises:
        ModelError: naming the first.
    """
    missing, more, wrong = sorted(missing), sorted(more), sorted(wrong)
    if missing:
        raise ModelError(f"its weights lack {len(missing)} tensors, the first {missing[0]!r}")
    if more:
        raise ModelError(f"its config has no layers for {len(more)} of its tensors, the first {more[0]!r}")
    if wrong:
        name, there, expected = wrong[0]
        raise ModelError(
            f"{len(wrong)} of its tensors have other shapes than its config says, the first, {name!r}, {tuple(there)}, "
            f"expected {tuple(expected)}"
        )
