"""A Stable Diffusion model as one object: UNet, VAE, text encoders, tokenizers, schedule, and perhaps a CLIP."""

import copy
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dsd_fast.diffusion import NoiseSchedule, fresh_scheduler
from dsd_fast.jobs import storable
from dsd_fast.kernels.common.host import ordinary, own_types
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.architecture import TIME_IDS, Family, check_text, check_unet, family_of, latent_sides
from dsd_fast.models.errors import ModelError
from dsd_fast.models.lora import load_lora
from dsd_fast.models.private import check_ordinary, private, uncompiled
from dsd_fast.models.prompts import PromptStates, encode_prompts
from dsd_fast.models.tokens import POOLED, TokenSource, with_tokens
from dsd_fast.models.tuners import standing


class Model:
    """The parts of a diffusers pipeline, by reference: nothing is copied, patched or moved.

    Of a part that `torch.compile` wrapped, the module inside is taken.

    Made by `load` and `from_pipeline`. No method disables gradients: wrap calls in `torch.no_grad()` where none are
    wanted and the weights require them.

    Attributes:
        unet: diffusers UNet2DConditionModel.
        vae: diffusers AutoencoderKL.
        text_encoders, tokenizers: one each for SD 1.x and 2.x, two for SDXL.
        schedule: the noise schedule, with the prediction type: the scheduler's own numbers when the model was made.
        scheduler_config: config of the scheduler the model came with, "_class_name" included.
        clip: transformers CLIPModel, or None.
        family: "sd1", "sd2" or "sdxl".
        name: "mini", a hub id, a folder or a file; for a pipeline where it says it was loaded from.
        revision: commit of a model from the hub, else None.
        image_size: (height, width) in pixels the UNet was made for; what is usual for its family where its config has
            no sample_size (`latent_sides`).
        vae_scale_factor: pixels per latent position along one side.
        latent_channels: C of the latents.
        text_width: E, the width of the text states.
    """

    def __init__(
        self,
        *,
        unet: Any,
        vae: Any,
        text_encoders: Sequence[Any],
        tokenizers: Sequence[Any],
        scheduler: Any,
        clip: Any = None,
        name: str = "",
        revision: str | None = None,
        force_zeros_for_empty_prompt: bool = True,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Checks that the parts fit each other.

        Raises:
            ModelError: they do not, or they are no SD 1.x, 2.x or SDXL.
        """
        unet, vae = uncompiled(unet), uncompiled(vae)
        self.unet = unet
        self.vae = vae
        # A float32 copy of a VAE that overflows in float16; this model and its copies have one.
        self._float32_vae: dict[str, Any] = {}
        self.text_encoders = tuple(uncompiled(encoder) for encoder in text_encoders)
        self.tokenizers = tuple(tokenizers)
        self.clip = uncompiled(clip)
        # It is written into files and tables, and may be that of a folder whose bytes are no text.
        self.name = storable(name)
        self.revision = revision
        label = name or "model"
        self.latent_channels: int = vae.config.latent_channels
        check_unet(unet.config, self.latent_channels, label)
        self.family: Family = family_of(unet.config)
        widths = [encoder.config.hidden_size for encoder in self.text_encoders]
        check_text(unet.config, widths, self.text_encoders[-1].config.projection_dim, label)
        self.text_width: int = sum(widths)
        self._set_scheduler(scheduler)
        self.vae_scale_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        height, width = latent_sides(unet.config, self.schedule.prediction_type, label)
        self.image_size: tuple[int, int] = (height * self.vae_scale_factor, width * self.vae_scale_factor)
        self._force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self._local_files_only = local_files_only
        self._cache_dir = cache_dir

    def __repr__(self) -> str:
        return f"Model({self.name!r}, family={self.family!r}, device={str(self.device)!r}, dtype={self.dtype})"

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        parameter: nn.Parameter = next(self.unet.parameters())
        return parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's floating-point type."""
        parameter: nn.Parameter = next(self.unet.parameters())
        return parameter.dtype

    @property
    def absent_prompt_is_zeros(self) -> bool:
        """Whether an absent prompt's states are zeros, as SDXL may have it, and not those of the empty prompt."""
        return self.family == "sdxl" and self._force_zeros_for_empty_prompt

    def latent_size(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Give the (height, width) of the latents of an image of (height, width) pixels; None: of `image_size`.

        Raises:
            ValueError: sides that are no positive multiples of `vae_scale_factor`.
        """
        size, factor = image_size or self.image_size, self.vae_scale_factor
        if any(side < factor or side % factor for side in size):
            raise ValueError(f"image_size: got {size}, expected multiples of {factor} pixels")
        return size[0] // factor, size[1] // factor

    def encode_images(
        self, pixels: Tensor, sample: bool = False, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        """Images to the scaled latents z₀ that the UNet is given.

        (m − shift) · scale with m the mean of the VAE's posterior (Rombach et al. 2022, "High-Resolution Image
        Synthesis with Latent Diffusion Models", section 3.1 and appendix D.1), so that equal images give equal latents.
        SDXL's VAE overflows in float16; it is then computed in float32, as the stock pipeline does.

        Args:
            pixels: (N, 3, H, W) in [−1, 1], any floating-point type and device; H and W multiples of
                `vae_scale_factor`.
            sample: draw from the posterior instead.
            generator: of the draw; or one for each image.

        Returns:
            (N, C, H / f, W / f) in the UNet's type and on the VAE's device, f = vae_scale_factor.

        Raises:
            ValueError: `pixels` of another shape or type.
        """
        factor = self.vae_scale_factor
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % factor or pixels.shape[3] % factor:
            raise ValueError(
                f"pixels has shape {tuple(pixels.shape)}, expected (N, 3, H, W) with H and W multiples of {factor}"
            )
        if not pixels.is_floating_point():
            raise ValueError(f"pixels has dtype {pixels.dtype}, expected floating point in [-1, 1]")
        vae = self._precise_vae()
        weight = next(vae.parameters())
        with own_types(weight.device):
            posterior = vae.encode(upload(pixels, weight.device, weight.dtype)).latent_dist
        if sample and self.family == "sdxl" and vae.config.force_upcast:
            # Where stock pipelines compute in float32, they draw in it, and other types have other numbers.
            posterior = type(posterior)(posterior.parameters.float())
        latents: Tensor = posterior.sample(generator) if sample else posterior.mean
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        shift, scale = self._latent_affine(latents)
        return ((latents - shift) * scale).to(self.dtype)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents back to images; the inverse scaling of `encode_images`, then the VAE's decoder.

        Args:
            latents: (N, C, h, w).

        Returns:
            (N, 3, h · f, w · f), clamped to [−1, 1], in the UNet's type and on the VAE's device.

        Raises:
            ValueError: `latents` of another shape.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents has shape {tuple(latents.shape)}, expected (N, {self.latent_channels}, h, w)")
        vae = self._precise_vae()
        weight = next(vae.parameters())
        latents = upload(latents, weight.device, torch.promote_types(weight.dtype, torch.float32))
        shift, scale = self._latent_affine(latents)
        with own_types(weight.device):
            pixels: Tensor = vae.decode((latents / scale + shift).to(weight.dtype)).sample
        return pixels.clamp(-1, 1).to(self.dtype)

    def encode_prompts(self, prompts: Sequence[str], clip_skip: int | None = None) -> PromptStates:
        """Prompts to text states, equal to what the stock pipeline's `encode_prompt` gives for the prompt itself.

        Each prompt is padded to the tokenizer's limit (77 tokens for the published models). An empty prompt is encoded
        like any other; see :meth:`encode_unconditional` for SDXL's rule that an absent prompt becomes zeros.

        Args:
            clip_skip: layers left out at the encoders' end, as diffusers counts them: 1 takes the state before the one
                that is taken else. None takes what the pipeline takes.

        Raises:
            ValueError: `prompts` is a str or holds something else than str, a prompt is longer than the limit, or
                `clip_skip` leaves no layer.
        """
        with ExitStack() as entered:
            entered.enter_context(own_types(self.device))
            for encoder in self.text_encoders:
                entered.enter_context(standing(encoder))
            return encode_prompts(self.tokenizers, self.text_encoders, prompts, clip_skip)

    def encode_unconditional(self) -> PromptStates:
        """The one absent prompt of the family's sampler, M = 1: the empty prompt, or zeros where SDXL asks for them."""
        empty = self.encode_prompts([""])
        if self.absent_prompt_is_zeros:
            assert empty.pooled is not None
            return replace(empty, states=torch.zeros_like(empty.states), pooled=torch.zeros_like(empty.pooled))
        return empty

    def time_ids(self, height: int, width: int) -> Tensor | None:
        """SDXL's micro-conditioning for an image of that size in pixels, neither rescaled nor cropped.

        (height, width, 0, 0, height, width): original size, crop corner, target size (Podell et al. 2023, "SDXL",
        section 2.2).

        Returns:
            (6,) float32 on the CPU, from where plans take it, or None for other families.
        """
        if self.family != "sdxl":
            return None
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device="cpu")
        assert ids.numel() == TIME_IDS
        return ids

    @ordinary()
    def load_lora(self, source: str | os.PathLike[str], name: str, weight_name: str | None = None) -> None:
        """Adds a LoRA to the UNet and the text encoders by PEFT, and makes it the active adapter.

        A model made from a pipeline shares its networks, so that pipeline gets the adapter too.

        Args:
            source: "mini", the LoRA of the shipped model; a .safetensors file, a folder, or a hub id. LoRA, or DoRA
                with a norm for each output, of diffusers (files of 2023 too), of PEFT (with its adapter_config.json;
                its folders may be "unet", "text_encoder" and "text_encoder_2" inside), of kohya's scripts and LyCORIS
                (LoCon included), or of the official DSD code.
            name: of the adapter.
            weight_name: file inside the folder or repository; needed when there are several.

        Raises:
            ModelError: no such file, a pickle (.bin, .pt, .ckpt), a name already taken, weights that do not fit or are
                of another kind (as LoHa, LoKr, DoRA with a norm for each input), or embeddings of words among them.
        """
        load_lora(
            self.unet,
            self.text_encoders,
            self.name,
            source,
            name,
            weight_name,
            local_files_only=self._local_files_only,
            cache_dir=self._cache_dir,
        )

    def frozen(self) -> "Model":
        """This model for gradients to what its networks are given: none of their weights wants one.

        A network with weights that do is there as modules of its own, on the same memory.

        Raises:
            ValueError: a weight that was made under torch.inference_mode.
        """
        parts = {"unet": self.unet, "vae": self.vae}
        parts |= {f"text_encoder_{number}": encoder for number, encoder in enumerate(self.text_encoders)}
        check_ordinary("model", parts)
        own = [private(part) if any(p.requires_grad for p in part.parameters()) else part for part in parts.values()]
        other = copy.copy(self)
        other.unet, other.vae, *encoders = own
        other.text_encoders = tuple(encoders)
        return other

    def with_unet(self, unet: Any) -> "Model":
        """This model with another UNet of the same configuration; all other parts are shared."""
        other = copy.copy(self)
        other.unet = uncompiled(unet)
        return other

    def with_clip(self, clip: Any) -> "Model":
        """This model with another CLIPModel of transformers; all other parts are shared."""
        other = copy.copy(self)
        other.clip = uncompiled(clip)
        return other

    @ordinary()
    def with_tokens(self, source: TokenSource, pooled: str | None = None) -> "Model":
        """This model with learned tokens of textual inversion, in tokenizers and text encoders of its own.

        Their other weights, and all other parts, are shared. A token of v vectors counts as v tokens of a prompt.

        Args:
            source: a .safetensors file, a folder of them, or several of these; of diffusers (one tensor (E,) or (v, E)
                under the token's name) or of A1111 ("emb_params", the file's name being the token; SDXL's "clip_l" and
                "clip_g"). A folder of :class:`~dsd_fast.engine.tokens.LearnedTokens`. Or the vectors themselves:
                token → (E,) or (v, E), or {"clip_l": …, "clip_g": …}.
            pooled: where SDXL's second encoder takes its pooled state of a text with learned tokens: "stock", as stock
                pipelines do, which is at a learned token where the encoder's config has the old end token; "end", at
                the end token. None: as the tokens were learned, where they say so, else "stock".

        Raises:
            ModelError: no such file, a pickle, vectors that do not fit, a name that the tokenizers know already or
                that could be mixed up with another.
            ValueError: another ``pooled``.
        """
        if pooled is not None and pooled not in POOLED:
            raise ValueError(f"pooled: got {pooled!r}, expected one of {', '.join(POOLED)}")
        other = copy.copy(self)
        other.tokenizers, other.text_encoders = with_tokens(self.tokenizers, self.text_encoders, source, pooled)
        return other

    def with_scheduler(self, scheduler: Any) -> "Model":
        """This model, the same networks, under another noise schedule.

        Args:
            scheduler: a diffusers scheduler of a discrete diffusion process; it is not changed.

        Raises:
            ModelError: a scheduler of another kind.
        """
        other = copy.copy(self)
        other._set_scheduler(scheduler)
        return other

    @ordinary()
    def new_scheduler(self) -> Any:
        """A fresh diffusers scheduler like the one the model came with, what was changed on that in place included."""
        return fresh_scheduler(self._scheduler)

    @ordinary()
    def to_pipeline(self) -> Any:
        """A stock StableDiffusionPipeline or StableDiffusionXLPipeline on the same weights, with a fresh scheduler."""
        import diffusers

        parts = {"vae": self.vae, "unet": self.unet, "scheduler": self.new_scheduler()}
        parts |= zip(("text_encoder", "text_encoder_2"), self.text_encoders, strict=False)
        parts |= zip(("tokenizer", "tokenizer_2"), self.tokenizers, strict=False)
        if self.family == "sdxl":
            forced = self._force_zeros_for_empty_prompt
            return diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=forced)
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )

    def _set_scheduler(self, scheduler: Any) -> None:
        try:
            self.schedule = NoiseSchedule.from_scheduler(scheduler)
        except ValueError as error:
            raise ModelError(f"{self.name or 'model'}: {error}") from error
        self._scheduler = fresh_scheduler(scheduler)
        self.scheduler_config = {**copy.deepcopy(dict(scheduler.config)), "_class_name": type(scheduler).__name__}

    def _precise_vae(self) -> Any:
        """The VAE, or a float32 copy, made once, of one that overflows in float16."""
        if not (self.family == "sdxl" and self.vae.dtype == torch.float16 and self.vae.config.force_upcast):
            return self.vae
        copied = self._float32_vae.get("vae")
        if copied is None or copied.device != self.vae.device:
            copied = self._float32_vae["vae"] = copy.deepcopy(self.vae).float().requires_grad_(False)
        return copied

    def _latent_affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Shift and scale of latents; VAEs with statistics per channel have them in their config."""
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            shift, spread = (
                upload(torch.tensor(values, dtype=like.dtype, device="cpu"), like.device).view(1, -1, 1, 1)
                for values in (mean, std)
            )
            return shift, config.scaling_factor / spread
        return config.get("shift_factor") or 0.0, config.scaling_factor
