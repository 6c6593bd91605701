"""Which networks are Stable Diffusion 1.x, 2.x or SDXL, told from their configs before any weight is read."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dsd_fast.models.errors import ModelError

log = logging.getLogger("dsd_fast")

Family = Literal["sd1", "sd2", "sdxl"]

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_XL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
PIPELINES: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": _PARTS,
    "StableDiffusionImg2ImgPipeline": _PARTS,
    "LatentConsistencyModelPipeline": _PARTS,
    "LatentConsistencyModelImg2ImgPipeline": _PARTS,
    "StableDiffusionXLPipeline": _XL_PARTS,
    "StableDiffusionXLImg2ImgPipeline": _XL_PARTS,
}

CLASSES: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}

# Numbers of input channels that tell what else a UNet was made for.
_OTHER_INPUTS = {9: "an inpainting UNet", 8: "an image-editing UNet", 7: "an upscaling UNet"}

# Width, height, crop top, crop left, target height, target width.
TIME_IDS = 6


def family_of(unet_config: Mapping[str, Any]) -> Family:
    """SDXL by its extra time embedding, SD 2.x by its linear projections, else SD 1.x; sizes do not matter."""
    if unet_config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if unet_config.get("use_linear_projection") else "sd1"


def check_unet(config: Mapping[str, Any], latent_channels: int, model: str) -> None:
    """Refuses a UNet that asks for more than a latent, a timestep and text.

    Raises:
        ModelError: naming the setting.
    """
    channels = config.get("in_channels")
    if channels != latent_channels:
        kind = _OTHER_INPUTS.get(channels, "another kind of UNet") if isinstance(channels, int) else "unknown"
        raise ModelError(
            f"{model}: the UNet has in_channels = {channels} ({kind}), expected the VAE's {latent_channels}"
        )
    if config.get("out_channels") != latent_channels:
        raise ModelError(
            f"{model}: the UNet has out_channels = {config.get('out_channels')}, expected {latent_channels}"
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim"):
        if config.get(key) is not None:
            raise ModelError(f"{model}: the UNet has {key} = {config[key]!r}, expected none as in SD 1.x, 2.x and SDXL")
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise ModelError(
            f"{model}: the UNet has addition_embed_type = {config['addition_embed_type']!r}, "
            "expected none (SD 1.x, 2.x) or 'text_time' (SDXL)"
        )


def latent_sides(config: Mapping[str, Any], prediction_type: str, model: str) -> tuple[int, int]:
    """Height and width of the latents that a UNet was made for, from its config's sample_size.

    Where the config names none: 128 for SDXL, 96 for SD 2.x that predicts v, else 64, as diffusers' conversion of
    checkpoints has it.

    Raises:
        ModelError: a size that is neither an integer nor two.
    """
    size = config.get("sample_size")
    if size is None:
        family = family_of(config)
        size = 128 if family == "sdxl" else 96 if family == "sd2" and prediction_type == "v_prediction" else 64
        log.warning("%s: the UNet's config has no sample_size; latents are taken as %d x %d", model, size, size)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(f"{model}: the UNet has sample_size = {size!r}, expected an integer, or height and width")
    return sides[0], sides[1]


def check_text(unet_config: Mapping[str, Any], widths: Sequence[int], pooled: int | None, model: str) -> None:
    """Refuses text encoders whose states or pooled states do not fit the UNet.

    Args:
        widths: hidden sizes of the text encoders.
        pooled: width of the pooled state, None without a projection.

    Raises:
        ModelError: naming both sides.
    """
    sdxl = family_of(unet_config) == "sdxl"
    if len(widths) != (2 if sdxl else 1):
        raise ModelError(f"{model}: {len(widths)} text encoders, expected {2 if sdxl else 1} for this UNet")
    cross = unet_config.get("cross_attention_dim")
    expected = cross if isinstance(cross, int) else None if cross is None else set(cross)
    if expected not in (sum(widths), {sum(widths)}):
        raise ModelError(
            f"{model}: the UNet has cross_attention_dim = {cross}, expected {sum(widths)}, the width of the text states"
        )
    if sdxl:
        given = unet_config.get("projection_class_embeddings_input_dim")
        needed = TIME_IDS * int(unet_config.get("addition_time_embed_dim") or 0) + (pooled or 0)
        if given != needed:
            raise ModelError(
                f"{model}: the UNet has projection_class_embeddings_input_dim = {given}, expected {needed} for "
                f"{TIME_IDS} time ids and a pooled text state of width {pooled}"
            )
