"""Images as prompts: converting them beside the official script, and a guided step with few keys and with all."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dsd_fast.bench.case import Case, Context, Figure, Group, Quality, Side, Suite, Target, Work
from dsd_fast.bench.suites.judging import MEASURE, TOLERANCE, Judge
from dsd_fast.bench.suites.shared import PREDICTION_TOLERANCE, mini, relative
from dsd_fast.bench.suites.unet_networks import ARCHITECTURES, TIMESTEP, TOKENS, random_pipeline, random_weights
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models import Model, from_pipeline
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from dsd_fast.models.prompts import PromptStates
from dsd_fast.reference import image_prompt as reference
from dsd_fast.unet import UNetProgram

FASTER = 3.0
"""Times faster than the official script."""

VECTOR_TOLERANCE = 1e-5
"""Of a float32 vector, relative to its largest number: what CLIP's batches of another size may change."""

FILES, SIDE = 128, 512
"""JPEG files to convert, and their sides."""

FEWER = {"cpu": 8, "cuda": 64}
"""Files for CLIP ViT-L/14."""

GUIDED = 8
"""Images of a guided step, twice as many rows."""

# The official constants.
_CUT, _NORM = 0.3, 27.5
# openai/clip-vit-large-patch14, as its config.json has it.
_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}
_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Conversion:
    """Image files to convert with a model.

    Attributes:
        model: with a CLIP.
        files: of the images.
    """

    model: Model
    files: list[Path]
    pipe: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pipe", self.model.to_pipeline())

    @cached_property
    def inverted(self) -> Tensor:
        """As the script keeps it."""
        return upload(reference.inverse(self.model.clip, _CUT), self.model.device, torch.float32)

    @cached_property
    def converter(self) -> ImagePromptConverter:
        return ImagePromptConverter(self.model, config=ImagePromptConfig(cut=_CUT, norm=_NORM))

    def official(self) -> Tensor:
        """(N, E) of the script."""
        images = (Image.open(file) for file in self.files)
        states = [
            reference.convert(self.pipe, self.model.clip, [image], norm=_NORM, inverted=self.inverted)
            for image in images
        ]
        return torch.cat(states)[:, -1]

    def ours(self) -> Tensor:
        """(N, E) of the converter."""
        return self.converter.convert(self.files).vectors

    def sides(self) -> list[Side]:
        official, sizes = "official script", {"images": len(self.files), "side": SIDE}
        batch = min(self.converter.config.batch, len(self.files))
        against = {official: [Target("ratio", FASTER)]}
        return [
            Side(official, self.official, 1, sizes, against={}),
            Side("ImagePromptConverter", self.ours, batch, sizes, against=against),
        ]


def files(context: Context, count: int) -> list[Path]:
    """JPEG files of the first evaluation scenes, in a folder that is there as long as the run's context."""
    folder = context.shared("files of prompts", tempfile.TemporaryDirectory)
    made = []
    for number in range(count):
        file = Path(folder.name) / f"{number:05d}.jpg"
        if not file.exists():
            Image.fromarray(scene(EVAL_SEED + number).image).resize((SIDE, SIDE)).save(file)
        made.append(file)
    return made


def conversion(context: Context) -> Work:
    """The embedded model."""
    job = Conversion(mini(context), files(context, FILES))
    return Work(
        sides=job.sides(),
        difference=relative,
        tolerance=VECTOR_TOLERANCE,
        accuracy="largest relative difference of a vector",
        oracle_name="the official script",
        item="image",
        items=FILES,
    )


def large(context: Context) -> Work:
    """CLIP ViT-L/14 with random weights, float32 on a CPU, bfloat16 on a GPU."""
    dtype = torch.bfloat16 if torch.device(context.device).type == "cuda" else torch.float32
    chosen = files(context, FEWER[torch.device(context.device).type])
    exact = Conversion(_vit_l(context), chosen[:1])
    truth = exact.official()
    job = exact if dtype == torch.float32 else Conversion(_as(exact.model, dtype), chosen[:1])
    judge = Judge([truth], [job.official()], [dtype])
    job = Conversion(job.model, chosen)
    return Work(
        sides=job.sides(),
        difference=lambda result, right: judge([result[:1]], right),
        tolerance=TOLERANCE,
        accuracy=MEASURE.replace("plain torch", "the script"),
        oracle=lambda: judge.truth,
        oracle_name="the official script in float32, 1 image",
        item="image",
        items=len(chosen),
        dtype=str(dtype).removeprefix("torch."),
    )


def _vit_l(context: Context) -> Model:
    """The embedded model's other parts around CLIP ViT-L/14 and the UNet that reads its states, float32."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel

    pipe = copy.copy(mini(context).to_pipeline())
    ends = {f"{name}_token_id": getattr(pipe.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = CLIPConfig(text_config={**_TEXT, **ends}, vision_config=_VISION, projection_dim=768)
    unet = {**mini(context).unet.config, "cross_attention_dim": _TEXT["hidden_size"]}
    with torch.device(context.device):
        clip = CLIPModel(sizes)
        text_encoder = CLIPTextModel(sizes.text_config)
        network = UNet2DConditionModel.from_config(unet)
    for each in (clip, network):
        random_weights(each)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    for each in (clip, network, text_encoder):
        each.requires_grad_(False).eval()
    pipe.register_modules(unet=network, text_encoder=text_encoder)
    return from_pipeline(pipe, clip)


def _as(model: Model, dtype: torch.dtype) -> Model:
    return from_pipeline(copy.deepcopy(model.to_pipeline()).to(dtype), copy.deepcopy(model.clip).to(dtype))


@dataclass(frozen=True)
class Step:
    """One step of the network for images as prompts and the absent prompt.

    Attributes:
        unet: diffusers' UNet2DConditionModel.
        side: of the latents.
        count: of images.
    """

    unet: Any
    side: int
    count: int

    @cached_property
    def latents(self) -> Tensor:
        return self._drawn(self.count, 4, self.side, self.side)

    @cached_property
    def prompt(self) -> ImagePrompt:
        width = int(self.unet.config.cross_attention_dim)
        return ImagePrompt(
            vectors=self._drawn(self.count, width, seed=1),
            texts=self._drawn(1, 1, width, seed=2),
            ends=torch.ones(1, dtype=torch.int64, device="cpu"),
            text_of=torch.zeros(self.count, dtype=torch.int64, device="cpu"),
            tokens=TOKENS,
        )

    @cached_property
    def absent(self) -> PromptStates:
        states = self._drawn(1, TOKENS, int(self.unet.config.cross_attention_dim), seed=3)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="cpu")
        return PromptStates(states, None, torch.tensor([2], dtype=torch.int64, device="cpu"), ids)

    @cached_property
    def plan(self) -> Any:
        return UNetProgram(self.unet).plan(noise_pred=True)

    def stock(self, unet: Any = None) -> Tensor:
        """(2 · count, C, h, w) of diffusers: with the images, then without."""
        network = unet or self.unet
        states = torch.cat([self.prompt.embeds, self.absent.states.expand(self.count, -1, -1)])
        dtype = next(network.parameters()).dtype
        latents = self.latents.repeat(2, 1, 1, 1).to(dtype)
        with torch.no_grad():
            result: Tensor = network(latents, TIMESTEP, states.to(dtype), return_dict=False)[0]
        return result

    def together(self, prompts: PromptStates) -> Callable[[], Tensor]:
        """One run of all rows, with the images' keys padded to as many as the absent prompt has, if they are fewer."""
        rows = torch.arange(self.count, device="cpu")
        text_of = torch.cat([rows, torch.full((self.count,), self.count, dtype=torch.int64, device="cpu")])
        return self._run(prompts.followed_by(self.absent), rows.repeat(2), text_of)

    def apart(self, prompts: PromptStates) -> Callable[[], Tensor]:
        """A run of the images' rows, and one of the others."""
        rows = torch.arange(self.count, device="cpu")
        runs = [self._run(prompts, rows, rows), self._run(self.absent, rows, torch.zeros_like(rows))]
        return lambda: torch.cat([run() for run in runs])

    def sides(self, *first: Side) -> list[Side]:
        """After the first ones, which have all keys: all keys in one run, few padded, and few in a run of their own."""
        short, long = self.prompt.states(), self.prompt.states().expanded()
        sizes, batch = {"images": self.count}, 2 * self.count
        names = f"{TOKENS} keys", "2 keys, padded", "2 keys, two runs"
        runs = self.together(long), self.together(short), self.apart(short)
        sides = list(first)
        for name, run in zip(names, runs, strict=True):
            against = {names[0]: ()} if name != names[0] else {each.name: () for each in first}
            rows = batch // 2 if name == names[2] else batch
            sides.append(Side(name, run, rows, sizes, against=against))
        return sides

    def _run(self, states: PromptStates, latent_of: Tensor, text_of: Tensor) -> Callable[[], Tensor]:
        with torch.no_grad():
            text = self.plan.encode_text(states.states, key_bias=states.key_bias, lengths=states.key_lengths)
        index = {"latent_index": latent_of, "text_index": text_of}
        return torch.no_grad()(lambda: self.plan.run(self.latents, TIMESTEP, text, **index).noise_pred)

    def _drawn(self, *shape: int, seed: int = 0) -> Tensor:
        weight = next(self.unet.parameters())
        values = torch.randn(
            shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu"
        )
        return values.to(weight.device, weight.dtype)


def step(context: Context) -> Work:
    """The embedded model's network, with as many keys as CLIP's texts have."""
    model = mini(context)
    job = Step(model.unet, model.latent_size()[0], GUIDED)
    return Work(
        sides=job.sides(Side("diffusers", job.stock, 2 * GUIDED, {"images": GUIDED}, against={})),
        difference=relative,
        tolerance=PREDICTION_TOLERANCE,
        accuracy="largest relative difference of a prediction",
        oracle_name="diffusers",
        item="image",
        items=GUIDED,
    )


def large_step(context: Context) -> Work:
    """SD 1.5's network with random weights in bfloat16."""
    unet = random_pipeline("sd15", context, torch.bfloat16).unet
    job = Step(unet, ARCHITECTURES["sd15"].side, GUIDED)
    judge = Judge([job.stock(copy.deepcopy(unet).float())], [job.stock()])
    return Work(
        sides=job.sides(Side("diffusers", job.stock, 2 * GUIDED, {"images": GUIDED}, against={})),
        difference=lambda result, right: judge([result], right),
        tolerance=TOLERANCE,
        accuracy=MEASURE.replace("plain torch", "diffusers"),
        oracle=lambda: judge.truth,
        oracle_name="diffusers in float32",
        item="image",
        items=GUIDED,
        dtype="bfloat16",
    )


def costs(context: Context) -> list[Figure]:
    """FLOPs and bytes of text keys at SD 1.5's size, counted, nothing is run."""
    from diffusers import UNet2DConditionModel

    architecture = ARCHITECTURES["sd15"]
    with torch.device("meta"):
        program = UNetProgram(UNet2DConditionModel(**architecture.config))
    plan = program.plan(noise_pred=True)
    sizes = {"height": architecture.side, "width": architecture.side}
    figures = []
    for name, tokens in (("all keys", TOKENS), ("2 keys", 2)):
        network = plan.flops(latents=1, texts=0, rows=1, tokens=tokens, **sizes)
        keys = plan.flops(latents=1, texts=1, rows=1, tokens=tokens, **sizes) - network
        width = sum(program.attention(layer).inner_dim for layer in (*plan.key_layers, *plan.value_layers))
        for what, value, unit in (
            ("a row of the network", network / 1e12, "TFLOP"),
            ("the keys and values of a text", keys / 1e9, "GFLOP"),
            ("the keys and values of a text, held", 2 * width * tokens / 1e6, "MB"),
        ):
            figures.append(Figure(f"{what}: {name}", value, value, value, 1, unit=unit))
    return figures


_SD15 = "SD 1.5's network with random weights"
suite = Suite(
    name="prompts",
    groups=[
        Group("conversion", f"Images of {SIDE} × {SIDE} pixels to prompts, from JPEG files: the mini model's CLIP"),
        Group("vit-l", f"Images of {SIDE} × {SIDE} pixels to prompts, from JPEG files: CLIP ViT-L/14, random weights"),
        Group("step", f"A guided step of {GUIDED} images, {TOKENS} keys of the absent prompt: the mini model"),
        Group("sd15", f"A guided step of {GUIDED} images of 512 × 512 pixels: {_SD15}, bfloat16"),
        Group("costs", f"What an image as a prompt costs with all keys and with 2: {_SD15}, 16 bits, 512 × 512 pixels"),
    ],
    cases=[
        Case("conversion/mini", "conversion", conversion, repeats=6, devices=("cpu",)),
        Case("conversion/vit-l", "vit-l", large, repeats=6, devices=("cpu",), long=True),
        Case("step/mini", "step", step, repeats=9, devices=("cpu",)),
        Quality("costs/sd15", "costs", costs),
        Case("sd15/conversion", "vit-l", large, repeats=6, devices=("cuda",)),
        Case("sd15/step", "sd15", large_step, repeats=6, devices=("cuda",)),
    ],
)
