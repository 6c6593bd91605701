"""The official feature extractor's class (`feature/diffusion_feature.py` of Darkbblue/generic-diffusion-feature)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dsd_fast.compat.background import Background
from dsd_fast.compat.encoded import Conditioned, EncodedPrompt, encode
from dsd_fast.compat.versions import load_controls, load_version, own_model
from dsd_fast.features import FeatureExtractor as Engine
from dsd_fast.features import Technique
from dsd_fast.features.layers import read_layers, resolve_layers
from dsd_fast.images import ImageSource, load_image, to_tensor
from dsd_fast.models import Model
from dsd_fast.models.controlnet import Control
from dsd_fast.models.prompts import token_limit
from dsd_fast.unet import UNetProgram

# Settings of `extract` whose engines are kept.
_ENGINES = 8


class FeatureExtractor:
    """UNet features by the official names (Meng et al., arXiv 2410.03558 and 2410.06719).

    ``from dsd_fast.compat import FeatureExtractor`` stands for ``from diffusion_feature import FeatureExtractor``. The
    engine is that of :class:`dsd_fast.FeatureExtractor`, with the official timesteps (t = 50 becomes 51, 49 or 50, by
    the scheduler) and float16 features on the model's device. Differences, each from a defect of the official code:

    - Noise comes from a seed (``extract(…, seed=0)``) and is the same for every image; the latent is the mean of the
      VAE's posterior. The official code draws both without a seed.
    - t = 0 is the clean latent at timestep 0; the official mapping gives 1, or fails.
    - DDIM inversion takes any number of images, the VAE's own scale, and is not scaled once more with Euler.
    - ``denoising_from`` works without a ControlNet, and from far above t.
    - ControlNets are in the model's type.
    - Long prompts: see :meth:`encode_prompt`. ``offload_prompt_encoder(persistent=True)`` lets go of the encoders.
    - An unknown layer id is an error.

    Args:
        layer: id → whether it is wanted, or the path of such a JSON file; None or {}: every layer.
        version: "1-5", "2-1", "xl", "pgv2", or "mini", the model shipped with this package.
        device: where the model is loaded to, and for an external model where it must be.
        dtype: "float16", "bfloat16" or "float32", of the networks that are loaded; an external model keeps its own.
        img_size: side in pixels that images are resized to; 512 is usual for "1-5" and "2-1", 64 for "mini".
        offline_lora, offline_lora_filename: folder and file name of a LoRA; the folder alone is a whole model.
        feature_resize: features are made that many times smaller by adaptive average pooling, "attn" is not.
        control: names of ControlNets, "canny" or "canny-xl", or :class:`dsd_fast.models.controlnet.Control` objects.
        attention: of "down_cross", "mid_self", "up_cross" and so on: gives the feature "attn".
        train_unet: not supported.
        external_model: a stock diffusers pipeline, or a model from :func:`dsd_fast.load`, instead of loading one.

    Attributes:
        model: the model.
        layers: the layer ids in the order of execution, "attn" not among them.

    Raises:
        NotImplementedError: a version of another architecture (PixArt, IF, Hunyuan, FLUX), "depth" by name,
            ``train_unet``, or the layer "vae-out".
        ValueError: an argument that is not allowed or does not fit, by name.
    """

    def __init__(
        self,
        layer: str | os.PathLike[str] | Mapping[str, bool] | None,
        version: str,
        device: str | torch.device,
        dtype: str = "float16",
        img_size: int = 1024,
        offline_lora: str | None = None,
        offline_lora_filename: str | None = None,
        feature_resize: int = 1,
        control: Sequence[str | Control] | None = None,
        attention: Sequence[str] | None = None,
        train_unet: bool = False,
        external_model: Any = None,
    ) -> None:
        if train_unet:
            raise NotImplementedError(
                "train_unet: the extractor gives no gradients; dsd_fast.unet.UNetProgram(unet).plan(features=…).run is "
                "differentiable"
            )
        if not isinstance(feature_resize, int) or feature_resize < 1:
            raise ValueError(f"feature_resize: got {feature_resize!r}, expected an integer of at least 1")
        if external_model is None:
            model = load_version(version, device, dtype, offline_lora, offline_lora_filename)
        else:
            model = own_model(external_model, version, device, offline_lora, offline_lora_filename)
        self.version, self.img_size, self.device = version, img_size, model.device
        self.control, self.attention, self.feature_resize = control, attention, feature_resize
        self.model = Conditioned.of(model)
        self._pipe = None if isinstance(external_model, Model) else external_model
        self._controls = load_controls(control, version, model)
        self._program = UNetProgram(model.unet)
        self.layers = official_layers(layer, self._program)
        self._maps = bool(attention) or any(name.endswith("-map") for name in self.layers)
        if feature_resize > 1 and any(name.endswith("-map") for name in self.layers):
            raise ValueError(
                "feature_resize: attention maps by head have no picture's shape, so they cannot be resized"
            )
        self._tokens = token_limit(model.tokenizers, model.text_encoders)
        self._background: Background | None = None
        self._engines: dict[tuple[Any, ...], Engine] = {}
        # Tells what does not fit before there is an image.
        self._engine(0, bool(self._controls), None, False)

    @property
    def pipe(self) -> Any:
        """The external pipeline, or a stock pipeline on the model's networks."""
        if self._pipe is None:
            self._pipe = self.model.to_pipeline()
        return self._pipe

    def encode_prompt(
        self, prompt_str: str | None = None, prompt_file: str | os.PathLike[str] | None = None
    ) -> EncodedPrompt:
        """A prompt, or the content of a text file, encoded once for any number of :meth:`extract` calls.

        A prompt beyond the encoder's limit (77 tokens) is cut between words into pieces, each with its own start and
        end tokens, whose states are laid end to end. The official code does so beyond 70 words, and cuts anywhere, so
        that all but the first piece lack a start and all but the last an end.

        Raises:
            ValueError: not exactly one of the two; the encoders were let go; a word beyond the limit.
            OSError: the file cannot be read.
        """
        if (prompt_str is None) == (prompt_file is None):
            raise ValueError("prompt_str, prompt_file: expected exactly one of them")
        if not all(isinstance(encoder, torch.nn.Module) for encoder in self.model.text_encoders):
            raise ValueError("prompt_str: the text encoders were let go by offload_prompt_encoder(persistent=True)")
        if prompt_file is not None:
            prompt_str = Path(prompt_file).read_text(encoding="utf-8")
        assert prompt_str is not None
        return encode(self.model, prompt_str)

    def offload_prompt_encoder(self, persistent: bool = False) -> None:
        """Moves the text encoders to the CPU, or lets go of them, for who has encoded all prompts.

        Memory is free when nobody else, such as an external model's owner, holds them.
        """
        if persistent:
            self.model.forget_encoders()
            # Both hold on to the encoders that they were made with.
            self._pipe = None
            self._engines.clear()
            return
        for encoder in self.model.text_encoders:
            if isinstance(encoder, torch.nn.Module):
                encoder.to("cpu")

    def preprocess_image(self, x: Any, is_tensor: bool = False) -> Tensor:
        """Images as the VAE takes them.

        Args:
            x: a PIL image; or with ``is_tensor`` a float tensor (B, 3, H, W) in [0, 1].

        Returns:
            (1, 3, img_size, img_size) or (B, 3, H, W) in [−1, 1], float32 for an image.

        Raises:
            ImageError: an image that cannot be used.
            ValueError: a tensor of another shape or range.
        """
        if not is_tensor:
            return to_tensor(load_image(x), (self.img_size, self.img_size))[None]
        _check_pixels("x", x, 0)
        pixels: Tensor = 2 * x - 1
        return pixels

    def extract(
        self,
        prompts: EncodedPrompt | Sequence[Tensor | None],
        batch_size: int,
        image: Sequence[ImageSource] | Tensor,
        image_type: str = "image",
        t: int = 50,
        denoising_from: int | None = None,
        use_control: bool = False,
        use_ddim_inversion: bool = False,
        *,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Features of B images.

        Args:
            prompts: from :meth:`encode_prompt`; or its four parts, whose rows are one for all images or one each.
            batch_size: B.
            image: B PIL images (paths and the package's other sources too), resized by Pillow's bicubic filter.
            image_type: "image"; or "tensors": ``image`` is (B, 3, H, W) in [−1, 1], see :meth:`preprocess_image`,
                resized bilinearly and rounded to 8 bits.
            t: timestep.
            denoising_from: noise to this timestep and denoise down to t by the scheduler's own steps.
            use_control: whether the ControlNets take part; without ``control`` it has no effect, as officially.
            use_ddim_inversion: invert the image to t instead of adding noise.
            seed: of the noise; the official call has none, and other noise at each.

        Returns:
            id → (B, C, h, w) float16 on the model's device, in the order of execution, then "attn".

        Raises:
            ImageError: an image that cannot be used.
            ValueError: an argument that does not fit, by name.
        """
        sources = self._sources(image, image_type)
        if len(sources) != batch_size:
            raise ValueError(f"batch_size: got {batch_size}, but image holds {len(sources)}")
        states, pooled = self._states(prompts, batch_size)
        names = self.model.hold(states, pooled)
        background, controlled = self._background, use_control and bool(self._controls)
        with nullcontext() if background is None else background.suspended():
            engine = self._engine(t, controlled, denoising_from or None, use_ddim_inversion)
            found = engine.extract(sources, names[0] if len(names) == 1 else names, seed)
        return {name: self._changed(name, value[:, 0]) for name, value in found.items()}

    def set_background_extraction(self, idxs: Iterable[int] | None) -> None:
        """From now on features are taken while the model's UNet serves others, such as a stock pipeline's generation.

        At the calls of the UNet numbered in ``idxs``, from 1 and counted from now on, the part of the network that the
        layers need runs once more on the same inputs; what the generation computes stays as it is. It costs a hook on
        the UNet, with which this package's other plans on it refuse to run, until None or nothing is given here.

        Raises:
            ValueError: a number below 1.
        """
        numbers = tuple(idxs or ())
        if any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in numbers):
            raise ValueError(f"idxs: got {numbers}, expected integers of at least 1")
        if self._background is not None:
            self._background.stop()
        self._background = None
        if numbers:
            self._background = Background(self._program, self.layers, self.attention or (), self._changed, numbers)

    def get_background_extraction(self) -> dict[str, dict[int, Tensor]]:
        """id, then "attn" → {call: (B, C, h, w) float16}.

        Rows, sizes and tokens are the generation's; with guidance the unconditional rows come first.
        """
        if self._background is None:
            return {}
        return {name: dict(found) for name, found in self._background.found.items()}

    def _engine(self, t: int, controlled: bool, denoise_from: int | None, inversion: bool) -> Engine:
        key = (t, controlled, denoise_from, inversion)
        if key not in self._engines:
            if len(self._engines) == _ENGINES:
                del self._engines[next(iter(self._engines))]
            self._engines[key] = Engine(
                self.model,
                self.layers,
                (t,),
                attention=self.attention or (),
                official_timesteps=True,
                image_size=(self.img_size, self.img_size),
                dtype="float16" if self.feature_resize == 1 else None,
                technique=Technique(
                    controls=self._controls if controlled else (), denoise_from=denoise_from, inversion=inversion
                ),
            )
        return self._engines[key]

    def _changed(self, name: str, value: Tensor) -> Tensor:
        """A feature as it is handed out."""
        if self.feature_resize > 1 and name != "attn":
            height, width = (max(1, side // self.feature_resize) for side in value.shape[-2:])
            value = F.adaptive_avg_pool2d(value, (height, width))
        return value.to(torch.float16)

    def _sources(self, image: Any, image_type: str) -> list[ImageSource]:
        if image_type == "image":
            if isinstance(image, Tensor | Image.Image) or not isinstance(image, Sequence):
                raise ValueError(f"image: got {type(image).__name__}, expected a sequence of images")
            return list(image)
        if image_type != "tensors":
            raise ValueError(f"image_type: got {image_type!r}, expected 'image' or 'tensors'")
        _check_pixels("image", image, -1)
        size = (self.img_size, self.img_size)
        resized = F.interpolate(image.detach().float(), size, mode="bilinear", align_corners=False)
        return list(resized.add(1).div(2).clamp(0, 1))

    def _states(self, prompts: Any, rows: int) -> tuple[Tensor, Tensor | None]:
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or len(prompts) != 4:
            raise ValueError("prompts: expected what encode_prompt returns")
        states, _, pooled, _ = prompts
        if not isinstance(states, Tensor) or states.ndim != 3 or len(states) not in (1, rows):
            got = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"prompts: got {got}, expected (1, T, E) or ({rows}, T, E) first")
        if self._maps and states.shape[1] != self._tokens:
            raise ValueError(
                f"prompts: attention maps are asked for, which takes a prompt of {self._tokens} tokens, got one of "
                f"{states.shape[1]}"
            )
        return states.detach(), None if pooled is None else pooled.detach()


def official_layers(layer: Any, program: UNetProgram) -> tuple[str, ...]:
    """Layer ids in the order of execution, which is that of the official features.

    Args:
        layer: see :class:`FeatureExtractor`.

    Raises:
        NotImplementedError: "vae-out" is wanted.
        ValueError: no mapping, a file that holds none, or an unknown id.
    """
    if isinstance(layer, str | os.PathLike):
        layer = read_layers(Path(layer))
    if not layer:
        return program.layer_ids
    if not isinstance(layer, Mapping):
        raise ValueError(f"layer: got {type(layer).__name__}, expected id → bool, or the path of such a JSON file")
    if layer.get("vae-out"):
        raise NotImplementedError("layer: 'vae-out', the picture after one more step, is not a feature of the UNet")
    # Of attention that was asked for by its own argument; the official files name it too.
    chosen = {name: wanted for name, wanted in layer.items() if name not in ("attn", "vae-out")}
    place = {name: number for number, name in enumerate(program.layer_ids)}
    return tuple(sorted(resolve_layers(chosen, program), key=lambda name: place.get(name, len(place))))


def _check_pixels(name: str, pixels: Any, least: int) -> None:
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        got = f"{tuple(pixels.shape)} {pixels.dtype}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(f"{name}: got {got}, expected a float tensor (B, 3, H, W)")
    low, high = (float(value) for value in pixels.detach().aminmax())
    # Half precision's rounding of 2·x − 1, and no more.
    if not (low >= least - 1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"{name}: spans {low} to {high}, expected {least} to 1")
