"""The official script of images as prompts (`inference_sd_ipc.py`), and a class that others wrote around its core."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsd_fast.compat.inputs import write_jpeg
from dsd_fast.engine.clip import own_preprocessing
from dsd_fast.engine.settings import Fields, check_fields, integer, is_bool, is_text, number
from dsd_fast.generation import GenerateConfig, generate
from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter
from dsd_fast.image_prompt.deep_prompts import DeepPrompts, PromptedVision
from dsd_fast.image_prompt.inverse import truncated
from dsd_fast.image_prompt.mapping import float64
from dsd_fast.images import ImageSource, load_image
from dsd_fast.jobs.tensors import read_tensors
from dsd_fast.models import Model, load
from dsd_fast.models.load import TRANSFORMERS_STEM, check_weights, load_clip, load_network, read_json, weight_patterns

if TYPE_CHECKING:
    from transformers import CLIPModel

PINV_ATOL, CONSTANT_NORM = 0.3, 27.5
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class InferenceConfig:
    """The official options by their names and defaults, and behind them a flag for each defect of the official code.

    With all flags off: the seed and the resolution count, files of all formats are taken, a picture's name is its
    image's without the ending, and the output is in its folder. A prompt that is too long is refused, where officially
    it is cut, and no safety checker runs.

    Attributes:
        pretrained_path: of the pipeline, where :func:`infer` is given no model. Where it is a folder that has a
            ``clip`` as SD-IPC's code saves it, CLIP's image encoder with deep prompts, that takes the place of CLIP's.
        clip_path: of the CLIPModel, where it is given none.
        input_image: an image, or a folder of them.
        prompt: of an edit, or of ``onlyprompt``; else it has no effect.
        edit: the prompt's words stay, and from its end on the image's vector is added.
        onlyprompt: the prompt alone, whatever the image.
        alpha: of the prompt's own states in an edit.
        clip_prompt_length: deep prompts of a layer, as many as the checkpoint has; 0 leaves them out.
        num_inference_steps, guidance_scale: of the pictures.
        output_dir, save_prefix: where they are, and what their names begin with.
        resolution: their sides.
        seed: of the noise of each, which a generator on the CPU draws as stock pipelines do.
        replace_first_patches: how deep prompts were trained that SD-IPC's code has saved: those of the first layer take
            the place of its first patches. A checkpoint of a code that does not lose them wants False.
        unused_seed: the noise comes from torch's own generator, another one for each picture.
        unused_resolution: the sides are the model's own.
        jpg_alone: of a folder only files are taken that end in ".jpg".
        name_to_first_dot: a picture's name is its image's up to the first dot, so that one may overwrite another.
        joined_path: the folder's name and the file's are joined without a separator.

    Raises:
        ValueError: a value outside its range, by name.
    """

    pretrained_path: str | os.PathLike[str] = "./stable-diffusion-v1-4/"
    clip_path: str | os.PathLike[str] = "./clip-vit-large-patch14/"
    input_image: str | os.PathLike[str] = "./example_images/"
    prompt: str = ""
    edit: bool = False
    onlyprompt: bool = False
    alpha: float = 0.6
    clip_prompt_length: int = 50
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    output_dir: str | os.PathLike[str] = "./results/"
    save_prefix: str = ""
    resolution: int = 512
    seed: int = 10
    replace_first_patches: bool = True
    unused_seed: bool = False
    unused_resolution: bool = False
    jpg_alone: bool = False
    name_to_first_dot: bool = False
    joined_path: bool = False

    def __post_init__(self) -> None:
        check_fields(self, _FIELDS)

    def inputs(self) -> list[Path]:
        """List the images, by name.

        Raises:
            ValueError: there is none.
        """
        source = Path(self.input_image)
        if not source.is_dir():
            return [source]
        endings = _ENDINGS[:1] if self.jpg_alone else _ENDINGS
        files = sorted(
            file for file in source.iterdir() if (file.suffix if self.jpg_alone else file.suffix.lower()) in endings
        )
        if not files:
            raise ValueError(f"input_image: {str(source)!r} has no {', '.join(endings)}")
        return files

    def outputs(self, images: Sequence[Path]) -> list[Path]:
        """Give the file of each image's picture.

        Raises:
            ValueError: two of one name.
        """
        names = [image.name.split(".")[0] if self.name_to_first_dot else image.stem for image in images]
        if len(set(names)) < len(names) and not self.name_to_first_dot:
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"input_image: {str(self.input_image)!r} has several images of the name {twice!r}")
        folder = os.fspath(self.output_dir)
        if self.joined_path:
            return [Path(f"{folder}{self.save_prefix}{name}.jpg") for name in names]
        return [Path(folder) / f"{self.save_prefix}{name}.jpg" for name in names]


def _is_path(x: object) -> bool:
    return isinstance(x, str | os.PathLike) and bool(os.fspath(x))


_FLAG = (is_bool, "True or False")
_FIELDS: Fields = {
    **dict.fromkeys(("pretrained_path", "clip_path", "input_image", "output_dir"), (_is_path, "a path")),
    **dict.fromkeys(("edit", "onlyprompt", "replace_first_patches"), _FLAG),
    **dict.fromkeys(("unused_seed", "unused_resolution", "jpg_alone", "name_to_first_dot", "joined_path"), _FLAG),
    **dict.fromkeys(("prompt", "save_prefix"), (is_text, "a text")),
    "alpha": (number(-1e6, 1e6), "a number from -1e6 to 1e6"),
    "clip_prompt_length": (integer(0), "an integer of at least 0"),
    "num_inference_steps": (integer(1), "an integer of at least 1"),
    "guidance_scale": (number(0, 1e6), "a finite number of at least 0"),
    "resolution": (integer(1), "an integer of at least 1"),
    "seed": (integer(0, 2**64 - 2), "an integer from 0 to 2**64 - 2"),
}


def infer(config: InferenceConfig, *, model: Model | None = None, clip: CLIPModel | None = None) -> list[Path]:
    """Do what the official script does: make a picture of each image, in float32 where it loads the model.

    Args:
        model: instead of the one that the configuration names, as it is.
        clip: instead of the one that it names; a model that is given may have its own.

    Returns:
        The pictures' files, JPEG.

    Raises:
        ImageError: an image that cannot be used.
        ModelError: a model that cannot be loaded.
        ValueError: no image, two of one name, or a setting that does not fit the model or its deep prompts.
    """
    # A copy, which is checked once more: settings may have been changed.
    config = replace(config)
    images = config.inputs()
    outputs = config.outputs(images)
    if model is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load(config.pretrained_path, device=device, dtype="float32", clip=clip or config.clip_path)
    elif model.clip is None and clip is None:
        clip = load_clip(config.clip_path, model.dtype, local_files_only=False, cache_dir=None).to(model.device)
    settings = ImagePromptConfig(cut=PINV_ATOL, norm=CONSTANT_NORM)
    converter = ImagePromptConverter(model, clip, settings)
    checkpoint = Path(config.pretrained_path) / "clip"
    if (vision := _tuned_vision(checkpoint, config, model)) is not None:
        converter = converter.with_vision(vision)
    size = None if config.unused_resolution else (config.resolution, config.resolution)
    drawing = GenerateConfig(
        steps=config.num_inference_steps, guidance=config.guidance_scale, image_size=size, noise="diffusers"
    )
    if config.onlyprompt:
        prompts: Any = [config.prompt] * len(images)
    elif config.edit:
        prompts = converter.edit(images, config.prompt, config.alpha)
    else:
        prompts = converter.convert(images)
    seeds = [config.seed] * len(images)
    if config.unused_seed:
        seeds = torch.randint(2**32, (len(images),), dtype=torch.int64, device="cpu").tolist()
    for file, picture in zip(outputs, generate(model, prompts, drawing, seeds=seeds), strict=True):
        write_jpeg(file, picture)
    return outputs


def _tuned_vision(folder: Path, config: InferenceConfig, model: Model) -> nn.Module | None:
    """The image encoder that SD-IPC's code has saved in a folder; None where there is none, as with a whole CLIP.

    Raises:
        ModelError: its weights cannot be loaded, or are a pickle.
        ValueError: deep prompts that are not as many as the configuration says.
    """
    from transformers import CLIPVisionModel

    what = f"clip {str(folder)!r}"
    if not folder.is_dir() or read_json(folder / "config.json", what).get("model_type") == "clip":
        return None
    check_weights(folder, TRANSFORMERS_STEM, None, what)
    vision: nn.Module = load_network(CLIPVisionModel, folder, model.dtype, None, what)
    vision = vision.to(model.device).requires_grad_(False)
    if not config.clip_prompt_length:
        return vision
    tensors: dict[str, Tensor] = {}
    for pattern in weight_patterns(TRANSFORMERS_STEM, None)[:2]:
        for file in folder.glob(pattern):
            tensors |= read_tensors(file, "vision_model.encoder.")[0]
    prompts = DeepPrompts.of(tensors, vision, what, replace_first=config.replace_first_patches)
    if prompts.tokens != config.clip_prompt_length:
        raise ValueError(
            f"clip_prompt_length: got {config.clip_prompt_length}, expected {prompts.tokens} as {what} has"
        )
    return PromptedVision(vision, prompts)


class Image2TextEmbedder:
    """The conversion of one image, as others use it beside a text encoder of their own.

    Args:
        clip_path: a CLIPModel, or its folder or hub id.
        device: of it, where it is loaded.
        alpha, onlyprompt, edit: see :class:`InferenceConfig`.

    Attributes:
        clip_model: CLIPModel, float32 where it is loaded.
        alpha, onlyprompt, edit: as given.

    Raises:
        ModelError: a CLIP that cannot be loaded.
        ValueError: an argument that is none of its kind, by name.
    """

    def __init__(
        self,
        clip_path: CLIPModel | str | os.PathLike[str] = "openai/clip-vit-large-patch14",
        device: str | torch.device = "cuda",
        alpha: float = 0.6,
        onlyprompt: bool = False,
        edit: bool = True,
    ) -> None:
        InferenceConfig(alpha=alpha, onlyprompt=onlyprompt, edit=edit)
        network: Any = load_clip(clip_path, torch.float32, local_files_only=False, cache_dir=None)
        loaded = isinstance(clip_path, str | os.PathLike)
        self.clip_model: Any = network.to(device).requires_grad_(False) if loaded else network
        self.alpha, self.onlyprompt, self.edit = alpha, onlyprompt, edit
        self._preprocessing = own_preprocessing(self.clip_model)
        inverse = truncated(float64(self.clip_model.text_projection.weight))(PINV_ATOL)
        self._map = inverse.matrix @ float64(self.clip_model.visual_projection.weight)  # (E, V)

    @torch.no_grad()
    def __call__(self, image: str | ImageSource, text_embeddings: Tensor, text_masks: Tensor) -> Tensor:
        """Put an image into texts' states.

        Args:
            image: a file, or another image.
            text_embeddings: (B, T, E) states of the texts.
            text_masks: (B, T), 1 for their tokens and 0 for padding; officially the first one's count for all.

        Returns:
            (T, E) of one text, else (B, T, E).

        Raises:
            ImageError: an image that cannot be used.
            ValueError: states or masks of other shapes.
        """
        width = len(self._map)
        if text_embeddings.ndim != 3 or text_embeddings.shape[2] != width:
            raise ValueError(f"text_embeddings: got {tuple(text_embeddings.shape)}, expected (B, T, {width})")
        if text_masks.shape != text_embeddings.shape[:2]:
            wanted = tuple(text_embeddings.shape[:2])
            raise ValueError(f"text_masks: got {tuple(text_masks.shape)}, expected {wanted} as of the texts")
        if self.onlyprompt:
            return text_embeddings.squeeze(0)
        source = Path(image) if isinstance(image, str) else image
        pixels = self._preprocessing.of_image(load_image(source))
        weight = self.clip_model.visual_projection.weight
        pooled = self.clip_model.vision_model(pixel_values=pixels.to(weight)).pooler_output
        vector = CONSTANT_NORM * F.normalize(float64(pooled) @ self._map.mT, dim=1).to(text_embeddings)
        ends = text_masks.sum(1, keepdim=True) - 1 if self.edit else torch.ones_like(text_masks[:, :1])
        place = torch.arange(text_embeddings.shape[1], device=ends.device)
        own = self.alpha * text_embeddings if self.edit else 0 * text_embeddings
        from_end = (place >= ends).to(text_embeddings.device)[..., None]
        return torch.where(from_end, vector + own, text_embeddings).squeeze(0)
