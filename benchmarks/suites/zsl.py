"""What tokens bring to zero-shot learning where the generator misreads the classes' names.

The classes are the scenes' colours and shapes. The generator is the mini model with a text encoder that reads "a" for
every colour, so that "a red ring" is to it any ring; CLIP, whose texts are the prototypes, knows the colours. Half of
the unseen classes are pairs that neither the generator nor CLIP has ever seen.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

import dsd_fast as dsd
from benchmarks.suites.class_tokens import CONFIG, GUIDANCE, RUNS, SAMPLER, STEPS, shows
from benchmarks.suites.intervals import over_runs
from benchmarks.suites.mini_card.judge import judge, look
from dsd_fast.bench.case import Context, Figure, Group, Quality, Suite
from dsd_fast.bench.suites.shared import mini
from dsd_fast.class_tokens.cdm import CategoryDiscriminator, CdmConfig
from dsd_fast.class_tokens.zsl import ZslConfig, run_zsl
from dsd_fast.generation import GenerateConfig
from dsd_fast.models import Model
from dsd_fast.models.mini.scenes import COLOURS, EVAL_SEED, PAIRS, scene

__all__ = ["CONFIGURATION", "TEST", "TRAIN", "UNSEEN", "VALIDATION", "measured", "suite"]

UNSEEN = tuple(f"{colour} {shape}" for colour in ("red", "green") for shape in ("ring", "triangle"))
UNSEEN += tuple(f"{colour} {shape}" for colour in ("blue", "yellow") for shape in ("cross", "square"))
VALIDATION = tuple(f"{colour} {shape}" for colour in ("purple", "cyan") for shape in ("circle", "square"))
TRAIN, TEST = 30, 42
"""Real pictures of each class. Three runs test a thousand of unseen classes."""
CONFIGURATION: Mapping[str, Any] = {
    "validation": VALIDATION,
    "cdm": CdmConfig(templates=("a {}",), widths=(256,), steps=600),
    "tokens": replace(CONFIG, templates=("a {}",), class_name=True, temperature=1.0, stopping="gamma"),
    "generate": GenerateConfig(steps=STEPS, guidance=GUIDANCE, scheduler=SAMPLER),
    "per_class": 30,
    "ensemble": ("a {}", "a large {}", "a small {}"),
    "counts": (30,),
}

_FIGURES = ("t1", "u", "s", "h")
_METHODS = {"token": "tokens", "plain": "plain prompt", "ensemble": "three templates", "clip": "CLIP", "real": "real"}


def measured(
    context: Context, *, runs: int = RUNS, train: int = TRAIN, test: int = TEST, **settings: Any
) -> list[Figure]:
    """T1, U, S and H of tokens and of what stands beside them; and what the generated pictures show."""
    model = _misreading(mini(context))
    results, pictures = [], []
    for run in track(range(runs), "zero-shot runs", transient=True):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            # The settings were chosen by a run of seed 0.
            seed = 1 + run
            _draw(folder / "images", EVAL_SEED + seed * len(PAIRS) * 1000, train, test)
            config = ZslConfig(out=folder / "out", images=folder / "images", seed=seed, **{**CONFIGURATION, **settings})
            config = replace(config, tokens=replace(config.tokens, seed=seed), cdm=replace(config.cdm, seed=seed))
            results.append(run_zsl(config, model=model))
            pictures.append(_judged(results[-1], config.out, model, context))
    counts = {"t1": len(UNSEEN), "u": len(UNSEEN), "s": len(PAIRS) - len(UNSEEN), "h": len(PAIRS)}
    figures = []
    for rows in zip(*(each["table"] for each in results), strict=True):
        name = f"{_METHODS[rows[0]['method']]}, {rows[0]['classifier']}"
        for key in _FIGURES:
            value = over_runs([row[key] for row in rows], [row["intervals"][key] for row in rows])
            figures.append(Figure(f"{name}: {key.upper()}", *value, runs * test * counts[key], sizes={"runs": runs}))
    for key in pictures[0]:
        right = np.concatenate([each[key] for each in pictures])
        figures.append(Figure.share(key, int(right.sum()), len(right), sizes={"runs": runs}, group="pictures"))
    return figures


def _draw(folder: Path, first_seed: int, train: int, test: int) -> None:
    """Pictures of single objects as a folder for each class, below "train" and "test"."""
    wanted = {f"{colour} {shape}": train + test for colour, shape in PAIRS}
    seed = first_seed
    while any(wanted.values()):
        drawn = scene(seed, objects=1, held_out=None)
        name = f"{drawn.objects[0].colour} {drawn.objects[0].shape}"
        if wanted[name]:
            wanted[name] -= 1
            part = "train" if wanted[name] >= test else "test"
            if part == "test" or name not in UNSEEN:
                (folder / part / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(drawn.image).save(folder / part / name / f"{seed}.png")
        seed += 1


def _misreading(model: Model) -> Model:
    """The model with a text encoder that reads "a" for the name of every colour; its CLIP as it is."""
    pipe = model.to_pipeline()
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    table, tokenizer = pipe.text_encoder.get_input_embeddings().weight, pipe.tokenizer
    article, *colours = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("a", *COLOURS))
    table.data[colours] = table.data[article].clone()
    return dsd.from_pipeline(pipe, clip=model.clip)


def _judged(results: Mapping[str, Any], out: Path, model: Model, context: Context) -> dict[str, NDArray[np.bool_]]:
    """Of the pictures with and without tokens, which ones the judge, and which the guide, takes for their class."""
    seeing = context.shared("judge", lambda: judge(model.vae).to(model.device))
    guide = CategoryDiscriminator.load(out / "test" / "cdm", model).guide(UNSEEN)
    found = {}
    for key, folder in results["images"].items():
        files = sorted((out / folder).rglob("*.png"))
        names = [file.parent.name for file in files]
        images = [np.array(Image.open(file)) for file in files]
        asked = [dict(zip(("colour", "shape"), name.split(), strict=True)) for name in names]
        seen = look(seeing, np.stack(images))
        found[f"{_METHODS[key]}: judge"] = np.array([shows(*pair) for pair in zip(seen, asked, strict=True)])
        answers = guide.of_images(images).argmax(-1)
        found[f"{_METHODS[key]}: guide"] = np.array([UNSEEN[a] == n for a, n in zip(answers, names, strict=True)])
    return found


suite = Suite(
    "zsl",
    groups=(
        Group(
            "figures",
            f"{len(UNSEEN)} unseen of {len(PAIRS)} classes of one object, by colour and shape; the generator reads "
            f'"a" for every colour. {CONFIGURATION["per_class"]} generated pictures of each unseen class, {SAMPLER}, '
            f"{STEPS} steps, guidance {GUIDANCE:g}; λ from the validation classes; the mini model",
            columns=": ",
        ),
        Group("pictures", "Generated pictures of the unseen classes that show their class", columns=": "),
    ),
    cases=(Quality("scenes", "figures", measured),),
)
