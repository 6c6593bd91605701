"""The official pipeline's class (`diffusers/src/diffusers/pipelines/stable_diffusion/pipeline_dsd.py`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsd_fast.compat.attn_procs import load_attn_procs
from dsd_fast.compat.inputs import read_images, read_negative, read_prompt
from dsd_fast.compat.schedulers import comparing_with_v, under_scheduler
from dsd_fast.compat.scores import combined, terms
from dsd_fast.compat.selection import Index, LayerMask, select_layers, timestep_grid
from dsd_fast.matching import MatchConfig
from dsd_fast.matching.score import PairScorer
from dsd_fast.models import Model, load
from dsd_fast.unet import UNetProgram

# Arguments of the image-to-image pipeline that the official class was copied from. None of them reaches its score.
_WITHOUT_EFFECT: dict[str, Any] = {
    "num_images_per_prompt": 1,
    "eta": 0.0,
    "output_type": "pil",
    "return_dict": True,
    "callback": None,
    "callback_steps": 1,
    "cross_attention_kwargs": None,
}


class DSDPipeline:
    """Image–text matching by the official names (DSD, He et al., arXiv 2305.10722; eric-ai-lab/DSD).

    ``from dsd_fast.compat import DSDPipeline`` stands for the official ``from diffusers import DSDPipeline``. The score
    is the official one; where the official code has a defect the right thing is done, and an argument that the official
    call does not have, named after the defect, brings it back. The engine is that of :class:`dsd_fast.Matcher`: each
    image is encoded once, each text once, the unconditional row is computed once per image and timestep, and what does
    not fit the device at once is split.

    Args:
        model: from :func:`dsd_fast.load` or :func:`dsd_fast.from_pipeline`; see :meth:`from_pretrained`.
        scheduler: a diffusers scheduler instead of the model's.

    Attributes:
        model: the model, under the pipeline's scheduler.
        noise_samples: (n, C, h, w) noise, n at least the number of timesteps, of which the k-th timestep of a call uses
            the k-th; None draws it from the call's seed. The official pipeline keeps such a bank, (1000, 4, 64, 64) and
            drawn without a seed, in `~/diffusers/noise_samples.pkl`; set to it, scores are those of that bank.
    """

    def __init__(self, model: Model, *, scheduler: Any = None) -> None:
        if not isinstance(model, Model):
            raise ValueError(
                f"model: got {type(model).__name__}, expected one from dsd_fast.load or dsd_fast.from_pipeline"
            )
        self.model = model
        self.noise_samples: Tensor | None = None
        self.scheduler = model.new_scheduler() if scheduler is None else scheduler

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        scheduler: Any = None,
        torch_dtype: str | torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> DSDPipeline:
        """A pipeline on the CPU, of weights in safetensors.

        Args:
            pretrained_model_name_or_path: a hub id or a folder in diffusers' layout, SD 1.x, 2.x or XL, or "mini", the
                model shipped with this package.
            scheduler: a diffusers scheduler instead of the model's; its betas and prediction type count, as in the
                official code.
            torch_dtype: of all networks.
            revision: branch, tag or commit of a hub id.
            variant: of the weight files, e.g. "fp16".
            local_files_only: take hub ids from the cache alone.
            cache_dir: of the hub's files.

        Raises:
            ValueError: as :func:`dsd_fast.load`, and a scheduler that does not fit.
        """
        model = load(
            pretrained_model_name_or_path,
            dtype=torch_dtype,
            revision=revision,
            variant=variant,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
        )
        from dsd_fast.compat.network import UNet2DConditionModel

        # The network was made for this pipeline, so nobody else sees it change its class.
        model.unet.__class__ = UNet2DConditionModel
        return cls(model, scheduler=scheduler)

    @property
    def unet(self) -> Any:
        """The UNet; of a pipeline from :meth:`from_pretrained` its `load_attn_procs` is this pipeline's."""
        return self.model.unet

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.model.vae

    @property
    def text_encoder(self) -> Any:
        """The text encoder, the first of SDXL's two."""
        return self.model.text_encoders[0]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, the first of SDXL's two."""
        return self.model.tokenizers[0]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position along one side."""
        return self.model.vae_scale_factor

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's floating-point type."""
        return self.model.dtype

    @property
    def scheduler(self) -> Any:
        """The scheduler, whose ᾱ and prediction type at a call the score depends on. Setting it checks it.

        The official code reads its list of timesteps too, as it is before any `set_timesteps`. So a scheduler of a
        higher order, which has more entries, or one that has been given a shorter list is a ValueError, and so is one
        of another process (flow matching).
        """
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.model, self._scheduler = under_scheduler(self.model, scheduler), scheduler

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> DSDPipeline:
        """Moves the networks, and returns the pipeline.

        Args:
            device: as in torch; a torch.dtype is taken too.
            dtype: of the networks' weights.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for network in (self.model.unet, self.model.vae, *self.model.text_encoders, self.model.clip):
            if network is not None:
                network.to(device=device, dtype=dtype)
        return self

    def load_attn_procs(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        *,
        weight_name: str | None = None,
    ) -> None:
        """An official LoRA checkpoint; see :func:`dsd_fast.compat.attn_procs.load_attn_procs`."""
        load_attn_procs(self.model.unet, pretrained_model_name_or_path_or_dict, weight_name=weight_name)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Any = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        sampling_steps: int = 1000,
        use_bias: bool = True,
        layer_mask: LayerMask = None,
        unconditional: bool = True,
        ublock: str | None = None,
        sampled_timestep: int | Sequence[int] | None = None,
        level: Index = None,
        block: Index = None,
        attn: Index = None,
        tfblock: Index = None,
        ensembling: bool = True,
        *,
        seed: int = 0,
        unconditional_attention: bool = True,
        batch_mean: bool = False,
        sample_posterior: bool = False,
        renormalize_nonnegative: bool = False,
        half_precision_sums: bool = False,
        compare_noise_with_v: bool = False,
    ) -> Tensor:
        """Scores of the pairs (prompt[b], image[b]), higher is a better match.

        At a timestep, a + b: a is the mean over layers, heads, positions, and the text's and the unconditional row of
        logsumexp(Q·Kᵀ / √D) over the text's keys; b is ‖ε − ε_∅‖ − ‖ε − ε_text‖. The score is the mean over timesteps.
        Names, order and defaults are the official ones up to `ensembling`.

        Args:
            prompt: B texts, or one. A text longer than the encoder's limit is an error; the official code cuts it.
            image: a float tensor (B, 3, height, width) or (3, height, width) in [−1, 1], its size kept, or a list of
                such; or one or a list of Pillow images, paths or uint8 arrays, resized to the model's size. With
                fewer images than prompts, pair b has image b modulo their number, as in the official code.
            strength, num_inference_steps: how many timesteps are left out at either end of the schedule:
                num_inference_steps − ⌊num_inference_steps · strength⌋.
            guidance_scale: above 1 there is an unconditional row even with ``unconditional=False``. Otherwise it plays
                no part in the score, as in the official code.
            negative_prompt, negative_prompt_embeds: text of the unconditional row instead of the empty one, one for
                all, or B.
            generator: of the samples of `sample_posterior`, one for all images, or one for each.
            prompt_embeds: (B, T, E) text states instead of `prompt` (not for SDXL). The unconditional row's text has as
                many tokens, so that a T other than the encoder's needs `negative_prompt_embeds` too.
            num_images_per_prompt, eta, output_type, return_dict, callback, callback_steps, cross_attention_kwargs: have
                no effect on an official score; anything but the default is an error.
            sampling_steps: how many timesteps are asked for on the official grid, which 50 turns into 49 and 1000, the
                official default, into 980.
            use_bias: whether b counts.
            layer_mask: the layers that count: score ids (`pipe.layer_ids`), or a bool for each of them. The official
                code takes this argument and never reads it.
            unconditional: whether there is an unconditional row. Without it a is the text's row alone, and b cannot
                count. The official code fails without it.
            ublock, level, block, attn, tfblock: part ("down", "mid", "up"), block ("block_1"), transformer ("attn_0")
                and transformer block ("tfblock_0") that count, or their numbers; see
                :func:`dsd_fast.compat.selection.select_layers`. `level` and `block` are two names of one thing. The
                official code drops `ublock` on its way, so that the default layers count whatever is asked.
            sampled_timestep: timesteps to use instead of the grid, one or several. The official code takes a place in
                its list of scores, and fails on what it finds there.
            ensembling: mean over timesteps; False returns them apart. The official code then wants the last one, and
                fails.
            seed: of the noise, the same for all images; the k-th timestep uses the k-th draw.
            unconditional_attention: whether the unconditional row counts in a, as it officially does. It adds the same
                to all texts of an image, but not to all images of a text: to rank images, False is better.
            batch_mean: the official a is one for the whole batch, the mean over its pairs, so that a score depends on
                the batch. With ``use_bias=False`` the result has then one entry for the batch.
            sample_posterior: images are sampled from the VAE's posterior, anew at each timestep and from torch's global
                generator unless one is given, instead of taking its mean.
            renormalize_nonnegative: a tensor `image` that nowhere is below 0 is taken to be in [0, 1], so that a bright
                image in [−1, 1] is mapped twice.
            half_precision_sums: norms, their differences and all means are rounded to float16, as by an official
                pipeline in torch.float16, which makes different texts tie. The result is float16.
            compare_noise_with_v: of a v-prediction model the norms compare the noise with v instead of ε.

        Returns:
            (B,), (B, timesteps) with ``ensembling=False``, float32 on the pipeline's device.

        Raises:
            ValueError: an argument that does not fit, by name.
            ImageError: an image that cannot be read.
        """
        arguments = locals()
        for name, default in _WITHOUT_EFFECT.items():
            if arguments[name] != default:
                raise ValueError(f"{name}: got {arguments[name]!r}, which has no effect on a score; leave it out")
        has_free = unconditional or guidance_scale > 1
        if not has_free:
            self._refuse_without_free(use_bias, unconditional_attention, negative_prompt, negative_prompt_embeds)
        if generator is not None and not sample_posterior:
            raise ValueError("generator: samples the posterior, so it needs sample_posterior=True; noise has seed=")
        if image is None:
            raise ValueError("image: got none, expected one image or more")
        # What the scheduler holds at the call counts, as in the official code.
        self.scheduler = self._scheduler
        model = comparing_with_v(self.model) if compare_noise_with_v else self.model
        total = model.schedule.num_train_timesteps
        grid = timestep_grid(total, sampling_steps, strength, num_inference_steps, sampled_timestep)
        layers = select_layers(
            lambda: self.layer_ids,
            ublock=ublock,
            level=level,
            block=block,
            attn=attn,
            tfblock=tfblock,
            layer_mask=layer_mask,
        )
        pictures = read_images(image, model, renormalize_nonnegative)
        texts = read_prompt(model, prompt, prompt_embeds)
        pairs = len(texts.of)
        if pairs % len(pictures.of):
            raise ValueError(f"image: got {len(pictures.of)} for {pairs} prompts, expected one each, or a divisor")
        config = MatchConfig(
            timesteps=grid, layers=layers, noise_weight=float(use_bias), seed=seed, image_size=pictures.size
        )
        scorer = PairScorer.of(model, config)
        found = terms(
            scorer,
            pictures.each() if sample_posterior else pictures,
            texts,
            read_negative(model, negative_prompt, negative_prompt_embeds, texts) if has_free else None,
            epsilon=self._bank(scorer),
            sample=sample_posterior,
            generator=generator,
        )
        scores = combined(
            found,
            use_bias=use_bias,
            free_attention=unconditional_attention,
            batch_mean=batch_mean,
            dtype=torch.float16 if half_precision_sums else torch.float64,
        )
        result = scores.mean(1) if ensembling else scores
        return result.to(self.device, torch.float16 if half_precision_sums else torch.float32)

    @property
    def layer_ids(self) -> tuple[str, ...]:
        """The ids of the model's cross-attentions, in execution order."""
        return UNetProgram(self.model.unet).score_ids

    @staticmethod
    def _refuse_without_free(use_bias: bool, attention: bool, negative: Any, negative_embeds: Any) -> None:
        if use_bias:
            raise ValueError(
                "use_bias: compares with the unconditional row, so unconditional=False needs use_bias=False"
            )
        if not attention:
            raise ValueError("unconditional_attention: there is no unconditional row with unconditional=False")
        for name, value in (("negative_prompt", negative), ("negative_prompt_embeds", negative_embeds)):
            if value is not None:
                raise ValueError(f"{name}: is the unconditional row's text, which unconditional=False leaves out")

    def _bank(self, scorer: PairScorer) -> Tensor | None:
        bank, steps = self.noise_samples, len(scorer.timesteps)
        if bank is None:
            return None
        shape = (self.model.latent_channels, *scorer.engine.latent_size)
        if bank.ndim != 4 or tuple(bank.shape[1:]) != shape or len(bank) < steps or not bank.is_floating_point():
            raise ValueError(
                f"noise_samples: has shape {tuple(bank.shape)}, expected ({steps} or more, {str(shape)[1:]}"
            )
        return bank[:steps].float()
