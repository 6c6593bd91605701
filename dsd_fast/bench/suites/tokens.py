"""Class tokens: updates of many classes side by side, beside the official loop, one class after another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from dsd_fast.bench.case import Case, Context, Group, Side, Suite, Target, Work
from dsd_fast.bench.suites.fit_steps import gradient_difference
from dsd_fast.bench.suites.shared import BFLOAT16_TOLERANCE, mini, on_h200
from dsd_fast.bench.suites.unet_networks import random_pipeline, random_weights
from dsd_fast.class_tokens import TokenConfig
from dsd_fast.class_tokens.gradients import Gradients, ThroughImages, ThroughNoise
from dsd_fast.class_tokens.learning import Learning, Losses
from dsd_fast.class_tokens.prompts import Prompts
from dsd_fast.diffusion import noise, scheduler_timesteps
from dsd_fast.engine import Engine
from dsd_fast.engine.guides import guide_of
from dsd_fast.models import Model, from_pipeline
from dsd_fast.models.mini.scenes import PAIRS
from dsd_fast.models.splice import Splice
from dsd_fast.reference import class_tokens as reference
from dsd_fast.unet.stream import rows_at_once

CLASSES, STEPS, GUIDANCE = 32, 10, 3.0
RATIOS = {"official loop": 3.0, "official loop, a class's images side by side": 1.2}
"""How many times faster than each we are meant to be."""

RATES = {"noise": 220.0, "images": 5.5}
"""Sample steps, and images of an update, a second of SD 1.5 on an H200, if the network ran at 46 % of the matmul peak
and nothing else took time: a forward pass and a backward one to the texts alone, and 31 calls of two rows."""

CHECKED = 2
"""Classes whose gradient is compared with the official loop's in float64."""
GRADIENT_TOLERANCE = 2e-3
"""Of a class's gradient: a float32 prediction is off by some 1e-5, guidance makes that a few times as much, and each of
eleven calls hands its own on to the next; as much again for other batches and memory layouts."""
IMAGE_TOLERANCE = 0.5
"""Of a gradient at the end of 31 calls in bfloat16, whose images differ from float32's by as much as a coarse grain: it
points the same way. How far diffusers' own is off in bfloat16 is told beside it."""

_TOKEN = "<token>"
# Words that the embedded model's tokenizer has; what an update costs does not depend on them.
_TEMPLATES = ("a {}", "a small {}", "a large {}")
_NAMES = [*(" ".join(pair) for pair in PAIRS), "digit three", "digit five"]


@dataclass(repr=False, eq=False)
class Update:
    """The first update of classes, ours and the official one, from the same vectors, texts and noise.

    Attributes:
        pipe: stock StableDiffusionPipeline.
        classes: how many.
        config: of ours.
    """

    pipe: Any
    classes: int
    config: TokenConfig
    model: Model = field(init=False)

    def __post_init__(self) -> None:
        self.model = from_pipeline(self.pipe)
        self.config = replace(self.config, templates=_TEMPLATES, together=self.classes)

    @cached_property
    def names(self) -> list[str]:
        return _NAMES[: self.classes]

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(self.names, self.config)

    @cached_property
    def splice(self) -> Splice:
        return Splice(self.model, dict.fromkeys(self.prompts.tokens, 1))

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.splice.model)

    @cached_property
    def stock(self) -> Any:
        """A pipeline that knows one token, as officially a class has one to itself."""
        return reference.with_token(self.pipe, _TOKEN)

    @cached_property
    def first(self) -> Tensor:
        """(1, E) that each token begins as."""
        return self.splice.initial(self.prompts.tokens[0], self.prompts.initial(0)[0])[0]

    def texts(self, number: int) -> list[str]:
        """A class's, with the official pipeline's token."""
        return [text.replace(self.prompts.tokens[number], _TOKEN) for text in self.prompts.texts(number, 0)]

    def ours(self, gradients: Gradients) -> dict[str, Tensor]:
        """Make the update; the gradients, by class."""
        kept: dict[str, Tensor] = {}

        def watched(*given: Any) -> Losses:
            answer = gradients(*given)
            kept.update(zip(self.names, answer.gradients[0].flatten(0, 1), strict=True))
            return answer

        first = self.first.expand(self.classes, 1, -1)
        learning = Learning(self.names, [first[None]], [1.0], watched, self.config, self.classes, None, None, {})
        learning.step()
        return kept

    def official(self, backward: Callable[[int], object]) -> dict[str, Tensor]:
        """Make the update class by class with the stock pipeline; ``backward`` leaves a class's gradient."""
        table = self.stock.text_encoder.get_input_embeddings().weight
        row, kept = self.stock.tokenizer.convert_tokens_to_ids(_TOKEN), {}
        with torch.no_grad():
            table[row] = self.first[0].to(table)
            blank = table.clone()
        for number, name in enumerate(self.names):
            # Official decay has changed the whole of it, for the class before.
            with torch.no_grad():
                table.copy_(blank)
            optimizer = reference.new_optimizer(self.stock)
            backward(number)
            kept[name] = table.grad[row].cpu()
            optimizer.step()
            optimizer.zero_grad()
        return kept

    def sizes(self, **more: int) -> Mapping[str, int]:
        return {"classes": self.classes, "images": self.config.images, **more}

    def micro_batch(self, rows: int) -> int:
        """Rows of our largest call."""
        height, width = self.engine.latent_size
        return min(rows, rows_at_once(self.engine.noise_plan, height, width, 77))


class ByImages(Update):
    """Through images and a classifier, as the official code."""

    @cached_property
    def classifier(self) -> nn.Module:
        """A small one: what a guide costs is not what is compared."""
        layers = [nn.Conv2d(3, 16, 5, 4), nn.SiLU(), nn.Conv2d(16, 32, 5, 4), nn.SiLU(), nn.AdaptiveAvgPool2d(1)]
        network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, len(_NAMES))).eval().requires_grad_(False)
        random_weights(network.to(self.model.device))
        return network.to(self.precise)

    @property
    def precise(self) -> torch.dtype:
        """The type of what follows the decoder."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @cached_property
    def latents(self) -> Tensor:
        shape = (self.model.latent_channels, *self.engine.latent_size)
        return torch.stack([noise(self.config.seed, image, shape) for image in range(self.config.images)])

    @cached_property
    def gradients(self) -> Gradients:
        half = (0.5, 0.5, 0.5)
        guide = guide_of(self.classifier, mean=half, std=half, labels=_NAMES)
        targets = list(range(self.classes))
        return ThroughImages(self.engine, self.splice, self.prompts, self.config, guide, targets, None)

    def walk(self, side_by_side: bool, number: int) -> None:
        """The official gradient of a class."""
        reference.backward(
            self.stock,
            _TOKEN,
            lambda pixels: self.classifier(2 * pixels.to(self.precise) - 1),
            self.texts(number),
            number,
            self.latents,
            batch_size=self.config.images if side_by_side else 1,
            checkpointing=not side_by_side,
            steps=self.config.steps,
            guidance=self.config.guidance,
            gradient_steps=self.config.gradient_steps,
        )

    def sides(self, targets: Sequence[Target], ratios: Mapping[str, float]) -> list[Side]:
        """The official ones that have a ratio, and ours against them."""
        calls = len(scheduler_timesteps(self.model.new_scheduler(), self.config.steps))
        sizes, images = self.sizes(calls=calls), self.config.images
        sides, against = [], {}
        for name, least in ratios.items():
            together = name != "official loop"
            run = partial(self.official, partial(self.walk, together))
            sides.append(Side(name, run, 2 * images if together else 2, sizes, against={}))
            against[name] = [*([Target("ratio", least)] if least else []), *targets]
        batch = self.micro_batch(2 * images * self.classes)
        return [*sides, Side("ClassTokenLearner", lambda: self.ours(self.gradients), batch, sizes, against=against)]


class ByNoise(Update):
    """By the plain noise loss of images, as textual inversion."""

    @cached_property
    def gradients(self) -> ThroughNoise:
        shape = (self.model.latent_channels, *self.engine.latent_size)
        latents = [torch.stack([noise(1 + number, 0, shape)]) for number in range(self.classes)]
        return ThroughNoise(self.engine, self.splice, self.prompts, self.config, latents)

    def walk(self, number: int) -> None:
        """The gradient of a class by diffusers' script."""
        seeds = [self.prompts.image_seed(number, 0, image) for image in range(self.config.images)]
        drawn = [self.gradients.draw(number, seed) for seed in seeds]
        device, dtype = self.model.device, self.model.dtype
        clean, times, epsilon = (torch.stack(each).to(device) for each in zip(*drawn, strict=True))
        loss = reference.noise_loss(self.stock, self.texts(number), clean.to(dtype), times, epsilon.to(dtype)).mean()
        table = self.stock.text_encoder.get_input_embeddings().weight
        (slope,) = torch.autograd.grad(loss, [table])
        row = self.stock.tokenizer.convert_tokens_to_ids(_TOKEN)
        table.grad = torch.zeros_like(slope)
        table.grad[row] = slope[row]


def together(context: Context) -> Work:
    """Classes of the embedded model, all at once."""
    config = TokenConfig(steps=STEPS, guidance=GUIDANCE)
    update = ByImages(mini(context).to_pipeline(), CLASSES, config)
    exact = ByImages(copy.deepcopy(update.pipe).to(torch.float64), CHECKED, config)
    return Work(
        sides=update.sides([], RATIOS),
        difference=largest_difference,
        tolerance=GRADIENT_TOLERANCE,
        accuracy="largest relative difference of a class's gradient",
        oracle=lambda: exact.official(partial(exact.walk, True)),
        oracle_name="the official loop in float64",
        item="class update",
        items=CLASSES,
    )


def largest_difference(result: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Of any class's gradient, see :func:`gradient_difference`; those that the right one lacks are left out."""
    return max(gradient_difference({name: result[name]}, {name: right[name]}) for name in right)


def images(context: Context) -> Work:
    """Official updates of two classes of SD 1.5's size, bfloat16."""
    config = TokenConfig()
    update = ByImages(random_pipeline("sd15", context, torch.bfloat16), 2, config)
    exact = ByImages(copy.deepcopy(update.pipe).to(torch.float32), 1, config)
    targets = [Target("rate", RATES["images"])] if on_h200(context.device) else []
    return Work(
        sides=update.sides(targets, {"official loop, a class's images side by side": 0.0}),
        difference=largest_difference,
        tolerance=IMAGE_TOLERANCE,
        accuracy="relative difference of the first class's gradient",
        oracle=lambda: exact.official(partial(exact.walk, True)),
        oracle_name="the official loop in float32",
        item="image",
        items=update.classes * config.images,
        dtype="bfloat16",
    )


def noises(context: Context) -> Work:
    """Sample steps of textual inversion, two classes of SD 1.5's size, bfloat16."""
    config = TokenConfig(loss="noise", images=16)
    update = ByNoise(random_pipeline("sd15", context, torch.bfloat16), 2, config)
    exact = ByNoise(copy.deepcopy(update.pipe).to(torch.float32), 1, config)
    stock, sizes = "diffusers' script, class by class", update.sizes()
    targets = [Target("rate", RATES["noise"])] if on_h200(context.device) else []
    batch = update.micro_batch(config.images * update.classes)
    sides = [
        Side(stock, lambda: update.official(update.walk), config.images, sizes, against={}),
        Side("ClassTokenLearner", lambda: update.ours(update.gradients), batch, sizes, against={stock: targets}),
    ]
    return Work(
        sides=sides,
        difference=largest_difference,
        tolerance=2 * BFLOAT16_TOLERANCE,
        accuracy="relative difference of the first class's gradient",
        oracle=lambda: exact.official(exact.walk),
        oracle_name="diffusers' script in float32",
        item="sample step",
        items=update.classes * config.images,
        dtype="bfloat16",
    )


_SD15 = "SD 1.5's networks with random weights, bfloat16"
suite = Suite(
    name="tokens",
    groups=[
        Group(
            "together",
            f"An update of {CLASSES} classes: the mini model, five images each, {STEPS} steps, guidance {GUIDANCE:g}",
        ),
        Group("images", f"An official update of two classes, 512 × 512 pixels, {_SD15}"),
        Group("noise", f"An update of two classes by the noise loss, {_SD15}"),
    ],
    cases=[
        Case("together/mini", "together", together, repeats=6, devices=("cpu",)),
        Case("sd15/noise", "noise", noises, repeats=6, devices=("cuda",)),
        Case("sd15/images", "images", images, repeats=6, devices=("cuda",)),
    ],
)
