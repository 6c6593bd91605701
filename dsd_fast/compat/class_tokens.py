"""The official script of class tokens (`run.py` and `config.py` of idansc/discriminative_class_tokens)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dsd_fast.class_tokens import TokenConfig
from dsd_fast.class_tokens.config import FIELDS as _LEARNING
from dsd_fast.class_tokens.config import TEMPLATES
from dsd_fast.compat.class_token_defects import Defects, OfficialLearner, decayed, mean_pooled, unfiltered
from dsd_fast.compat.inputs import write_jpeg
from dsd_fast.diffusion import scheduler_timesteps
from dsd_fast.engine.guides import Guide, guide_of
from dsd_fast.engine.settings import Fields, above, check_fields, integer, is_bool, is_text, number, one_of
from dsd_fast.engine.tokens import LIST, LearnedTokens
from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler
from dsd_fast.generation.sampler import to_uint8
from dsd_fast.models import Model, load
from dsd_fast.models.tokens import BANK

CLASSIFIERS = {
    "inet": "google/vit-large-patch16-224",
    "inat": "vesteinn/vit-mae-inat21",
    "cub": "vesteinn/vit-mae-cub",
}
_SOURCES = {True: "stabilityai/stable-diffusion-2-1-base", False: "CompVis/stable-diffusion-v1-4"}
_TYPES = {"fp16": "float16", "bf16": "bfloat16", "no": "float32"}
_SHOWN = "A photo of {} {}"
# A stock pipeline's own, by which images are made that are evaluated.
_SHOWING: dict[str, Any] = {"steps": 50, "guidance": 7.5, "noise": "diffusers"}


@dataclass
class RunConfig:
    """The official settings by their names and defaults, and behind them a flag for each defect of the official code.

    With all flags off: the vocabulary stays as it is, texts are padded as pipelines do, gradients are clipped, the
    token is kept whose loss was the lowest, the noise stays the same, and the classifier sees images as its own
    processor prepares them. The official default of patience until the first better loss, whatever ``early_stopping``,
    has no flag: the first update is always better.

    Attributes:
        class_index: of the classifier's labels, from 1.
        train, evaluate: what :func:`run` does.
        exp_id: first part of the files' names.
        sd_2_1: Stable Diffusion 2.1-base, or 1.4, where :func:`run` is given no model; and a part of the files' names.
        classifier: a key of :data:`CLASSIFIERS`, where it is given none.
        early_stopping: patience; learning ends once more updates than that were not better.
        num_train_epochs: most updates.
        epoch_size: images of an update; ``gradient_accumulation_steps`` has to be the same.
        number_of_prompts: of the templates, which the images take in turn.
        batch_size: 1, as officially nothing else works; how many images go together is the engine's to know.
        skip_exists: leaves a token and a baseline alone that are there.
        lr, betas, weight_decay, eps: of AdamW.
        max_grad_norm: a number in a text.
        seed: of the noise, which torch's generator draws on the model's device.
        guidance_scale, height, width, num_of_SD_inference_steps: of the images.
        placeholder_token, initializer_token: the token, and the one that it begins as.
        output_path: the folder of `token`, `pipeline_token` and `img`; "." is where they officially are.
        device, mixed_precision: of the networks, where :func:`run` loads them; "fp16", "bf16" or "no".
        save_as_full_pipeline: whether a whole pipeline is written, too, once at the end.
        gradient_checkpointing: activations are computed again.
        test_size: images of the evaluation, of the seeds from 0.
        decay_vocabulary, unpadded_prompts, collapse_changes_seed, clip_before_backward, save_after_step,
            unfiltered_resize, baseline_label_off_by_one: see :class:`Defects`; the last one calls an image of the
            baseline correct that is taken for the class behind.

    Raises:
        ValueError: a value outside its range, by name.
    """

    class_index: int
    train: bool
    evaluate: bool
    exp_id: str = "demo"
    sd_2_1: bool = True
    classifier: str = "inet"
    early_stopping: int = 15
    num_train_epochs: int = 50
    epoch_size: int = 5
    number_of_prompts: int = 3
    batch_size: int = 1
    gradient_accumulation_steps: int = 5
    skip_exists: bool = False
    lr: float = 0.00025 * 5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    eps: float = 1e-08
    max_grad_norm: str = "1"
    seed: int = 35
    guidance_scale: float = 7
    height: int = 512
    width: int = 512
    num_of_SD_inference_steps: int = 30  # noqa: N815
    placeholder_token: str = "newclas"
    initializer_token: str = "a"
    output_path: Path = Path("results")
    save_as_full_pipeline: bool = True
    device: str = "cuda"
    mixed_precision: str = "fp16"
    gradient_checkpointing: bool = True
    test_size: int = 10
    decay_vocabulary: bool = False
    unpadded_prompts: bool = False
    collapse_changes_seed: bool = False
    clip_before_backward: bool = False
    save_after_step: bool = False
    unfiltered_resize: bool = False
    baseline_label_off_by_one: bool = False

    def __post_init__(self) -> None:
        check_fields(self, _FIELDS)
        self.output_path = Path(self.output_path)
        if self.gradient_accumulation_steps != self.epoch_size:
            raise ValueError(
                f"gradient_accumulation_steps: got {self.gradient_accumulation_steps} with an epoch_size of "
                f"{self.epoch_size}, expected the same: an update has all images of an epoch"
            )

    def identifier(self, name: str) -> str:
        """Give the name of a class's files."""
        version = "2.1" if self.sd_2_1 else "1.4"
        parts = (self.exp_id, version, self.epoch_size, self.lr, self.seed, self.number_of_prompts, self.early_stopping)
        return f"{'_'.join(map(str, parts))}_{name}"

    def defects(self) -> Defects:
        """Give the flags that change learning."""
        return Defects(**{each.name: getattr(self, each.name) for each in fields(Defects)})


def _is_number(x: object) -> bool:
    try:
        return above(0)(float(x)) if isinstance(x, str) else above(0)(x)
    except ValueError:
        return False


_COUNT, _FLAG = (integer(1), "an integer of at least 1"), (is_bool, "True or False")
_FIELDS: Fields = {
    **dict.fromkeys(("class_index", "num_train_epochs", "epoch_size", "number_of_prompts"), _COUNT),
    **dict.fromkeys(("height", "width", "num_of_SD_inference_steps", "test_size"), _COUNT),
    **dict.fromkeys(("train", "evaluate", "sd_2_1", "skip_exists", "save_as_full_pipeline"), _FLAG),
    **dict.fromkeys(("gradient_checkpointing", "baseline_label_off_by_one"), _FLAG),
    **{each.name: _FLAG for each in fields(Defects)},
    "exp_id": (is_text, "a text"),
    "classifier": (one_of(*CLASSIFIERS), f"one of {', '.join(CLASSIFIERS)}"),
    "early_stopping": (integer(0), "an integer of at least 0"),
    "batch_size": (one_of(1), "1, as no other works officially: how many images go together is the engine's to know"),
    "lr": (above(0), "a number above 0"),
    **{name: _LEARNING[name] for name in ("betas", "eps", "weight_decay")},
    "output_path": (lambda x: isinstance(x, str | Path), "a path"),
    "max_grad_norm": (_is_number, "a number above 0, or its text"),
    "seed": (integer(0, 2**64 - 2), "an integer from 0 to 2**64 - 2"),
    "guidance_scale": (number(0, 1e6), "a finite number of at least 0"),
    "placeholder_token": (lambda x: is_text(x) and "{" not in x, "a text without braces"),
    "initializer_token": (lambda x: is_text(x) and "{" not in x, "a text without braces"),
    "mixed_precision": (one_of(*_TYPES), f"one of {', '.join(_TYPES)}"),
}


def run(
    config: RunConfig, *, model: Model | None = None, classifier: Any = None, templates: Sequence[str] = TEMPLATES
) -> dict[str, float]:
    """Do what the official script does: learn a class's token, and look what comes of it.

    Files of a class whose label begins with "cardinal", below the configuration's ``output_path``: the token, in
    `token/cardinal/<experiment>_cardinal/`, as :meth:`dsd_fast.LearnedTokens.save` writes it, where learning goes on
    after a kill; the pipeline, in `pipeline_token/…`; in `img/cardinal/train` and `img/cardinal/eval` images, which say
    what they were taken for.

    Args:
        model: instead of the one that the configuration names, as it is.
        classifier: instead of the one that it names: what :func:`dsd_fast.engine.guides.guide_of` takes, with labels.
        templates: official ones are the first three; ``number_of_prompts`` of these are used.

    Returns:
        What was evaluated, token and initial word → the share of the images that were right.

    Raises:
        ValueError: an index that is no label's, a setting that does not fit the model, or another learning's folder.
        FileNotFoundError: a token to evaluate that has not been learned.
    """
    # A copy, which is checked once more: settings may have been changed.
    experiment = _Experiment(replace(config), model, classifier, templates)
    if config.train:
        experiment.train()
    return experiment.evaluate() if config.evaluate else {}


class _Experiment:
    """One class, the model and what judges its images."""

    def __init__(self, config: RunConfig, model: Model | None, classifier: Any, templates: Sequence[str]) -> None:
        if config.number_of_prompts > len(templates):
            raise ValueError(
                f"number_of_prompts: got {config.number_of_prompts}, expected at most {len(templates)}, the templates"
            )
        self.config, self.templates = config, tuple(templates[: config.number_of_prompts])
        dtype = _TYPES[config.mixed_precision]
        self.model = model or load(_SOURCES[config.sd_2_1], device=config.device, dtype=dtype)
        self.guide = _guide(config, classifier, self.model)
        labels = self.guide.labels
        if labels is None or config.class_index > len(labels):
            known = "a classifier with labels" if labels is None else f"1 to {len(labels)}, one of the labels"
            raise ValueError(f"class_index: got {config.class_index}, expected {known}")
        self.labels, self.target = [each.replace("/", "-") for each in labels], config.class_index - 1
        self.name = self.labels[self.target].split(",")[0]
        self.spelt = " ".join(self.name.lower().split("_"))
        self.identifier = config.identifier(self.name)
        self.folder = config.output_path / "token" / self.name / self.identifier

    def train(self) -> None:
        config = self.config
        if config.skip_exists and (self.folder / LIST).exists():
            return
        folder = config.output_path / "img" / self.name / "train"
        learner = OfficialLearner(self.model, self.guide, self._settings(), self.target, config.defects())
        fresh = not learner.begun(self.folder)

        def picture(epoch: int, pixels: Tensor, output: int, loss: float) -> None:
            nonlocal fresh
            if fresh:
                shutil.rmtree(folder, ignore_errors=True)
                fresh = False
            _write(folder / f"{epoch}_{self.labels[output]}_{loss}.jpg", pixels)

        learner.picture = picture
        tokens = learner.learn([self.spelt], out=self.folder)
        if config.save_as_full_pipeline:
            _save_pipeline(self._with(tokens), config.output_path / "pipeline_token" / self.name / self.identifier)

    def evaluate(self) -> dict[str, float]:
        config = self.config
        if not (self.folder / BANK).exists():
            raise FileNotFoundError(f"{self.folder} has no token; learn it first, with train=True")
        folder, words = config.output_path / "img" / self.name / "eval", [config.placeholder_token]
        if not (folder.exists() and config.skip_exists):
            shutil.rmtree(folder, ignore_errors=True)
            words.append(config.initializer_token)
        model = self._with(LearnedTokens.load(self.folder))
        sampler = Sampler(model, GenerateConfig(**_SHOWING, image_size=(config.height, config.width)))
        shares = {}
        for word in words:
            outputs = []
            for seed in range(config.test_size):
                row = sampler.resolve(GenerateRow(_SHOWN.format(word, self.spelt), seed))
                pixels = sampler.pixels([row])
                with torch.no_grad():
                    outputs.append(int(self.guide.logits(pixels).argmax()))
                _write(folder / f"{seed}_{self._told(word, outputs[-1])}.jpg", pixels[0])
            shares[word] = outputs.count(self.target) / config.test_size
        return shares

    def _told(self, word: str, output: int) -> str:
        config = self.config
        if word == config.placeholder_token:
            return f"{self.identifier.removesuffix(f'_{self.name}')}_{self.labels[output]}"
        right = self.target + config.baseline_label_off_by_one
        return f"{word}_{self.spelt}_{'correct' if output == right else 'wrong'}"

    def _settings(self) -> TokenConfig:
        config = self.config
        steps = config.num_of_SD_inference_steps
        calls = len(scheduler_timesteps(self.model.new_scheduler(), steps))
        return TokenConfig(
            # Officially image i has template i, which is not drawn.
            templates=self.templates[: config.epoch_size],
            token=config.placeholder_token,
            initial=config.initializer_token,
            images=config.epoch_size,
            steps=steps,
            guidance=config.guidance_scale,
            image_size=(config.height, config.width),
            # Official gradients begin at the step before the last of those asked for, of which PNDM makes one more.
            gradient_steps=calls - (steps - 1),
            learning_rate=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            norm_clamp=None,
            clip_norm=float(config.max_grad_norm),
            patience=config.early_stopping,
            updates=config.num_train_epochs,
            keep="after-best" if config.save_after_step else "best",
            checkpointing=config.gradient_checkpointing,
            seed=config.seed,
        )

    def _with(self, tokens: LearnedTokens) -> Model:
        """The model that knows the token, its vocabulary as the official optimiser leaves it where that is asked."""
        config, model = self.config, self.model
        if config.decay_vocabulary:
            (about,) = tokens.about.values()
            times = about["best_update"] - (not config.save_after_step)
            model = decayed(model, (1 - config.lr * config.weight_decay) ** times)
        return model.with_tokens(tokens)


def _guide(config: RunConfig, classifier: Any, model: Model) -> Guide:
    source = CLASSIFIERS[config.classifier] if classifier is None else classifier
    guide = guide_of(source, model=model)
    if classifier is None and config.classifier != "inet":
        mean_pooled(guide)
    return unfiltered(guide, config.classifier) if config.unfiltered_resize else guide


def _write(file: Path, pixels: Tensor) -> None:
    """Write pixels (3, H, W) in [−1, 1] as a JPEG."""
    write_jpeg(file, Image.fromarray(to_uint8(pixels[None].detach())[0].cpu().numpy()))


def _save_pipeline(model: Model, folder: Path) -> None:
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.to_pipeline().save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
