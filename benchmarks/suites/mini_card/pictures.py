"""Whether generated pictures show what their prompts say, by the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.progress import track
from torch import nn

from benchmarks.mini.networks import preprocess
from benchmarks.suites.mini_card.judge import Seen, look, to_bytes
from dsd_fast.bench.case import Figure
from dsd_fast.diffusion import noise
from dsd_fast.models import Model
from dsd_fast.models.mini.digits import DIGIT_NAMES, EVALUATION, caption, digit
from dsd_fast.models.mini.scenes import EVAL_SEED, RELATIONS, Scene, scene

__all__ = ["GUIDANCE", "STEPS", "digit_pictures", "draw", "judge_itself", "one_object", "two_objects"]

GUIDANCE, STEPS = 3.0, 20
_AT_ONCE = 32
_SIZES = {"steps": STEPS}


def draw(model: Model, prompts: Sequence[str], first_seed: int = 0) -> np.ndarray:
    """Pictures of the prompts by the stock pipeline with DDIM, uint8 (N, 64, 64, 3).

    Picture k starts from the noise of seed `first_seed` + k.
    """
    from diffusers import DDIMScheduler

    pipe = model.to_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    side = model.image_size[0] // model.vae_scale_factor
    made = []
    for start in track(range(0, len(prompts), _AT_ONCE), "pictures", transient=True):
        some = list(prompts[start : start + _AT_ONCE])
        latents = torch.stack([noise(first_seed + start + k, 0, (4, side, side)) for k in range(len(some))])
        given = pipe(
            some,
            latents=latents.to(model.device, model.dtype),
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            output_type="np",
        )
        made.append((given.images * 255).round().astype(np.uint8))
    return np.concatenate(made)


def one_object(
    model: Model, judge: nn.Module, n: int, group: str, held_out: bool, floor: float | None = None
) -> list[Figure]:
    """ "a large red circle": is that one object there, in that colour, shape and size?"""
    asked = [scene(EVAL_SEED + i, objects=1, held_out=held_out).objects[0] for i in range(n)]
    images = draw(model, [f"a {item.size} {item.colour} {item.shape}" for item in asked])
    found = [each.objects for each in look(judge, images)]
    tests: dict[str, Callable[[int], bool]] = {
        "colour": lambda i: list(found[i]) == [asked[i].colour],
        "shape": lambda i: [shape for shape, _ in found[i].values()] == [asked[i].shape],
        "size": lambda i: [size for _, size in found[i].values()] == [asked[i].size],
        "all": lambda i: found[i] == {asked[i].colour: (asked[i].shape, asked[i].size)},
    }
    return [
        Figure.share(
            f"{group}, {name}",
            sum(right(i) for i in range(n)),
            n,
            floor=floor if name == "all" else None,
            sizes=_SIZES,
        )
        for name, right in tests.items()
    ]


def two_objects(model: Model, judge: nn.Module, n: int) -> list[Figure]:
    """ "a red circle left of a blue square": are both there, and where the prompt puts them?"""
    asked = [scene(EVAL_SEED + i, objects=2) for i in range(n)]
    images = draw(model, [each.caption for each in asked])
    found = look(judge, images)
    both = [_both(each, seen) for each, seen in zip(asked, found, strict=True)]
    placed = [ok and _placed(each, seen) for ok, each, seen in zip(both, asked, found, strict=True)]
    return [
        Figure.share("two objects, both", sum(both), n, sizes=_SIZES),
        Figure.share("two objects, both where the prompt says", sum(placed), n, sizes=_SIZES),
    ]


def digit_pictures(model: Model, judge: nn.Module, n: int = 360) -> list[Figure]:
    """ "a photo of the digit three": is it a three?"""
    labels = [i % len(DIGIT_NAMES) for i in range(n)]
    images = draw(model, [caption(label) for label in labels])
    right = sum(seen.digit == label for seen, label in zip(look(judge, images), labels, strict=True))
    return [Figure.share("digits", right, n, chance=1 / len(DIGIT_NAMES), sizes=_SIZES)]


@torch.inference_mode()
def judge_itself(model: Model, judge: nn.Module, n: int) -> list[Figure]:
    """How often the judge is right about evaluation pictures, as drawn and once through the VAE."""
    drawn = [scene(EVAL_SEED + i, held_out=None) for i in range(n)]
    written = [digit(index, EVAL_SEED) for index in EVALUATION]
    pictures = np.stack([*(each.image for each in drawn), *(each.image for each in written)])
    figures = []
    for name, images in (("as drawn", pictures), ("through the VAE", _through(model, pictures))):
        found = look(judge, images)
        right = sum(_as_drawn(each, seen) for each, seen in zip(drawn, found[:n], strict=True))
        same = sum(seen.digit == each.label for each, seen in zip(written, found[n:], strict=True))
        figures += [
            Figure.share(f"judge, scenes {name}, all right", right, n),
            Figure.share(f"judge, digits {name}", same, len(written), chance=1 / len(DIGIT_NAMES)),
        ]
    return figures


def _both(asked: Scene, seen: Seen) -> bool:
    return {colour: shape for colour, (shape, _) in seen.objects.items()} == {
        item.colour: item.shape for item in asked.objects
    }


def _placed(asked: Scene, seen: Seen) -> bool:
    first, second = asked.objects
    assert asked.relation is not None
    return seen.sides == {first.colour: asked.relation, second.colour: RELATIONS[asked.relation]}


def _as_drawn(asked: Scene, seen: Seen) -> bool:
    objects = {item.colour: (item.shape, item.size) for item in asked.objects}
    return seen.objects == objects and (asked.relation is None or _placed(asked, seen))


def _through(model: Model, images: np.ndarray) -> np.ndarray:
    made = []
    for start in range(0, len(images), _AT_ONCE):
        pixels = preprocess(torch.from_numpy(images[start : start + _AT_ONCE])).to(model.device)
        made.append(to_bytes(model.decode_latents(model.encode_images(pixels))).numpy())
    return np.concatenate(made)
