"""One step of few-shot adaptation on one group: the same network, group, timesteps, noise and first weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsd_fast.bench.case import Context, Side, Target, Work
from dsd_fast.bench.suites.shared import BFLOAT16_TOLERANCE, mini, of_types
from dsd_fast.bench.suites.unet_networks import random_pipeline
from dsd_fast.diffusion import NoiseSchedule
from dsd_fast.matching import FitConfig, Group, MatchConfig
from dsd_fast.matching.fitting.examples import Examples
from dsd_fast.matching.fitting.objective import draw, losses, scores
from dsd_fast.matching.score import PairScorer
from dsd_fast.models import from_pipeline
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from dsd_fast.reference import fitting

RATIO = 2.5
"""How many times faster than the official step ours is meant to be."""
GRADIENT_TOLERANCE = 5e-4
"""A float32 prediction is off by some 1e-5 of its norm. The loss is a difference of nearly equal scores, whose
gradients cancel but for a tenth: 1e-4 of what is left, on either side, which is how far both are from float64. That
makes 2e-4, and as much again for other batches and memory layouts."""
BFLOAT16_GRADIENT_TOLERANCE = 20 * BFLOAT16_TOLERANCE
"""The same tenfold loss, beside float32's gradient, and as much again for what each batch rounds its own way."""
RANK = 4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS: Mapping[str, Sequence[str]] = {"all": ("attn1", "attn2"), "cross": ("attn2",)}
"""By name, which attention layers are adapted: "all" is official."""

# Of the standard deviation of a linear layer's weights; an adapter that is new has factors of zero, whose gradients
# and those of the factors beside them show little.
_SCALE = 0.1


@dataclass(repr=False, eq=False)
class Step:
    """A step on one image and its candidate texts, all at one timestep with one noise unless each has its own.

    Attributes:
        pipe: stock StableDiffusionPipeline; its UNet is copied and adapted, the rest shared.
        image: uint8 (height, width, 3).
        texts: K candidates; the first is right.
        layers: a key of :data:`LAYERS`.
        shared_noise: whether the candidates share timestep and noise; each has its own in the official recipe.
        margin: so large that every group has a gradient.
        seed: of adapter, timesteps and noise.
        timesteps, noise: of the candidates, K and (K, C, h, w).
        unet: the adapted copy.
        first: the adapter's first weights, by the names of :func:`plain_name`.
    """

    pipe: Any
    image: NDArray[np.uint8]
    texts: Sequence[str]
    layers: str = "all"
    shared_noise: bool = True
    margin: float = 10.0
    seed: int = 0
    timesteps: list[int] = field(init=False)
    noise: Tensor = field(init=False)
    unet: Any = field(init=False)
    first: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        from peft import LoraConfig

        self.unet = copy.deepcopy(self.pipe.unet)
        targets = [f"{layer}.{target}" for layer in LAYERS[self.layers] for target in TARGETS]
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for parameter in self.parameters().values():
                drawn = torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
                parameter.copy_(_SCALE * drawn)
        self.first = {name: parameter.detach().clone() for name, parameter in self.parameters().items()}
        # diffusers multiplies ᾱ up in float32, the package in float64. They differ by up to a millionth, which a
        # gradient of the difference of nearly equal scores shows.
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.alphas_cumprod = NoiseSchedule.from_scheduler(scheduler).alphas_cumprod
        components = {**self.pipe.components, "unet": self.unet, "scheduler": scheduler}
        self.pipe = type(self.pipe)(**components, requires_safety_checker=False)
        shape = (self.unet.config.in_channels, *[self.unet.config.sample_size] * 2)
        self.timesteps, self.noise = fitting.draws(self.seed, 0, len(self.texts), shape, shared_noise=self.shared_noise)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names of :func:`plain_name`."""
        return {plain_name(name): each for name, each in self.unet.named_parameters() if each.requires_grad}

    @torch.no_grad()
    def reset(self) -> None:
        """Gives the adapter its first weights again."""
        for name, parameter in self.parameters().items():
            parameter.copy_(self.first[name])
            parameter.grad = None

    def official(self) -> dict[str, Tensor]:
        """A whole official step from the first weights; the gradient, clipped to norm 1, by name."""
        self.reset()
        optimizer = fitting.new_optimizer(self.pipe)
        gradient: dict[str, Tensor] = {}

        def keep(*_: Any) -> None:
            gradient.update(
                {name: each.grad.clone() for name, each in self.parameters().items() if each.grad is not None}
            )

        optimizer.register_step_pre_hook(keep)
        fitting.step(
            self.pipe,
            optimizer,
            [self.image],
            self.texts,
            timesteps=self.timesteps,
            noise=self.noise,
            margin=self.margin,
        )
        return gradient

    def sizes(self, rows: int) -> dict[str, int]:
        """Of a side whose forward pass has ``rows`` rows of the network in all."""
        parameters = sum(each.numel() for each in self.first.values())
        return {"candidates": len(self.texts), "rows": rows, "parameters": parameters}


def plain_name(name: str) -> str:
    """A parameter's name without that of its adapter: "….attn2.to_q.lora_A.fitted.weight" → "….attn2.to_q.lora_A"."""
    parts = name.split(".")
    return ".".join(parts[:-2]) if parts[-1] == "weight" and parts[-3] in ("lora_A", "lora_B") else name


def our_side(step: Step, name: str, prepared: bool) -> Side:
    """One step of :mod:`dsd_fast.matching.fitting` from the same first weights.

    Args:
        step: the group.
        name: of the side.
        prepared: whether the example's latent and text states are there, as in every step of a fit but the first.
    """
    model = from_pipeline(step.pipe)
    scorer = PairScorer.of(model, MatchConfig(official=True))
    fit = FitConfig(loss="margin", margin=step.margin, shared_noise=step.shared_noise)
    groups = [Group((step.image,), tuple(step.texts))]
    ready = Examples(scorer, groups) if prepared else None

    def run() -> dict[str, Tensor]:
        step.reset()
        parameters = step.parameters()
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, weight_decay=1e-2)
        examples = ready or Examples(scorer, groups)
        batch = draw(examples.queries, [(0,)], step.noise.shape[1:], fit, len(step.timesteps), compares_free=True)
        own = 1 if step.shared_noise else len(step.texts)
        batch = replace(batch, times=torch.tensor(step.timesteps[:own]), noise=step.noise[:own])
        values = scores(scorer, scorer.weights, examples, batch)
        losses(values, batch, fit).mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        return {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}

    rows = len(step.texts) * (1 if step.shared_noise else 2)
    return Side(name, run, rows, step.sizes(rows))


def work(make: Callable[[Context], Step], context: Context) -> Work:
    """The official step, candidate by candidate, ours, and ours with the example's latent and texts there already."""
    step = make(context)
    target = {"official step": [Target("ratio", RATIO)]}
    return Work(
        sides=[
            Side("official step", step.official, 2, step.sizes(2 * len(step.texts))),
            replace(our_side(step, "our step, its example encoded anew", False), against={"official step": []}),
            replace(our_side(step, "our step", True), against=target),
        ],
        difference=gradient_difference,
        tolerance=GRADIENT_TOLERANCE,
        accuracy="relative difference of the gradient",
        oracle_name="the official step",
        item="step",
        items=1,
    )


def types(context: Context) -> Work:
    """Our step in bfloat16, a float32 LoRA on all attention layers of such a network, beside float32's."""
    return of_types(
        lambda dtype: our_side(mini_step(context, dtype), "our step", True),
        difference=gradient_difference,
        tolerance=BFLOAT16_GRADIENT_TOLERANCE,
        accuracy="relative difference of the gradient",
        item="step",
        items=1,
    )


def gradient_difference(result: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two gradients relative to that of the right one; infinite if their names differ."""
    if result.keys() != right.keys():
        return float("inf")
    wrong = sum(float((result[name].double() - right[name].double()).square().sum()) for name in right)
    norm: float = (wrong / sum(float(each.double().square().sum()) for each in right.values())) ** 0.5
    return norm


def mini_step(context: Context, dtype: str = "float32", **settings: Any) -> Step:
    """The embedded model on an evaluation scene of two objects, its caption and its four hard negatives."""
    drawn = scene(EVAL_SEED, objects=2)
    texts = [drawn.caption, *drawn.negatives().values()]
    return Step(mini(context, dtype).to_pipeline(), drawn.image, texts, **settings)


def sd21_step(context: Context, dtype: torch.dtype = torch.float32, **settings: Any) -> Step:
    """SD 2.1-base's architectures with random weights, at 512 × 512 pixels.

    The texts are the embedded model's, through its tokenizer: what a step costs does not depend on the words.
    """
    pipe = context.shared(f"sd21-base, {dtype}", lambda: random_pipeline("sd21-base", context, dtype))
    drawn = scene(EVAL_SEED, objects=2)
    return Step(pipe, drawn.image, [drawn.caption, *drawn.negatives().values()], **settings)
