"""What a model is made of and what plans through it cost, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsd_fast.matching import MatchConfig, official_layers
from dsd_fast.matching.layers import parts_without
from dsd_fast.matching.score import PairScorer
from dsd_fast.models import Model
from dsd_fast.models.prompts import token_limit
from dsd_fast.unet import UNetProgram

Job = tuple[int, int, int | list[int]]


def describe(model: Model, job: Job | None = None) -> dict[str, Any]:
    """Tells everything ``dsd-fast info`` shows, ready for JSON; FLOPs are those of the UNet.

    Args:
        model: it is only read.
        job: numbers of images and captions, and timesteps, of a matching job to cost.

    Raises:
        ValueError: timesteps outside the schedule.
        UnsupportedNetworkError: a UNet that cannot be planned.
    """
    program = UNetProgram(model.unet)
    shape = (model.latent_channels, *model.latent_size())
    tokens = token_limit(model.tokenizers, model.text_encoders)
    content = {
        "model": model.name,
        "revision": model.revision,
        "family": model.family,
        "image_size": list(model.image_size),
        "latent_shape": list(shape),
        "tokens": tokens,
        "schedule": {
            "class": model.scheduler_config["_class_name"],
            "timesteps": model.schedule.num_train_timesteps,
            "prediction_type": model.schedule.prediction_type,
        },
        "components": _components(model),
        **_layers(program, shape, tokens),
        "cost": _costs(program, shape, tokens),
    }
    if job is not None:
        content["job"] = _job(model, job, shape, tokens)
    return content


def _components(model: Model) -> dict[str, Any]:
    encoders = {f"text_encoder{'' if i == 0 else f'_{i + 1}'}": e for i, e in enumerate(model.text_encoders)}
    parts = {"unet": model.unet, "vae": model.vae, **encoders, "clip": model.clip}
    return {
        name: {
            "class": type(part).__name__,
            "parameters": sum(parameter.numel() for parameter in part.parameters()),
            "dtype": str(next(part.parameters()).dtype).removeprefix("torch."),
        }
        for name, part in parts.items()
        if part is not None
    }


def _layers(program: UNetProgram, shape: Sequence[int], tokens: int) -> dict[str, Any]:
    """Shapes of all layers for one row, the score ids, and both counted by block."""
    sizes = program.sizes(*shape[1:])
    official = set(official_layers(program))
    layers: dict[str, list[int]] = {}
    scores: dict[str, dict[str, Any]] = {}
    blocks: dict[str, dict[str, Any]] = {}
    for step in program.steps:
        block = blocks.setdefault(_block(step.name), {"layer_ids": 0, "score_ids": 0, "sizes": [], "heads": []})
        if step.shape is not None:
            layers[step.name] = list(step.shape(sizes[step.level], tokens))
            block["layer_ids"] += 1
        if step.score:
            scores[step.name] = {
                "heads": step.heads,
                "size": list(sizes[step.level]),
                "official": step.name in official,
            }
            block["score_ids"] += 1
        for name, value in (("sizes", list(sizes[step.level])), ("heads", step.heads)):
            if value and value not in block[name]:
                block[name].append(value)
    # The step that adds a ControlNet's middle residual is there without a middle block too.
    blocks = {name: block for name, block in blocks.items() if block["layer_ids"]}
    return {"layers": layers, "scores": scores, "blocks": blocks, "without_scores": parts_without(program)}


def _block(name: str) -> str:
    """The part of an id that names its block: mid, down-level0, up-level3; unet-in and the like are on their own."""
    parts = name.split("-")
    return "-".join(parts[:2]) if parts[0] in ("down", "up") else parts[0]


def _costs(program: UNetProgram, shape: Sequence[int], tokens: int) -> dict[str, Any]:
    """FLOPs of one row for the whole network and for plans that stop early, and what of it rows share."""
    size = {"height": shape[1], "width": shape[2], "tokens": tokens}
    whole = program.plan(noise_pred=True)
    row = whole.flops(latents=1, texts=0, rows=1, **size)
    last = {_block(name): name for name in program.layer_ids}
    stops = []
    for block, name in last.items():
        if block.startswith(("mid", "up")):
            flops = program.plan(features=[name]).flops(latents=1, texts=0, rows=1, **size)
            stops.append({"after": block, "layer": name, "row": flops, "share": flops / row})
    stops.append({"after": "noise prediction", "layer": program.output_id, "row": row, "share": 1.0})
    return {
        "row": row,
        "stops": stops,
        "text_free": whole.flops(latents=1, texts=0, rows=0, **size),
        "text": whole.flops(latents=0, texts=1, rows=0, **size),
    }


def _job(model: Model, job: Job, shape: Sequence[int], tokens: int) -> dict[str, Any]:
    """A matching job: by the default score, by its attention term alone, and with both rows of every pair in full."""
    images, captions, timesteps = job
    size = {"height": shape[1], "width": shape[2], "tokens": tokens}
    ways = []
    for score, config in (
        ("attention and noise terms (default)", MatchConfig(timesteps=timesteps)),
        ("attention term alone", MatchConfig(timesteps=timesteps, noise_weight=0)),
    ):
        scorer = PairScorer.of(model, config)
        latents = images * len(scorer.timesteps)
        empty = int(scorer.needs_unconditional)
        rows = latents * (captions + empty)
        flops = scorer.plan.flops(latents=latents, texts=captions + empty, rows=rows, **size)
        ways.append({"score": score, "rows": rows, "flops": flops})
    rows = 2 * latents * captions
    flops = scorer.program.plan(noise_pred=True).flops(latents=rows, texts=rows, rows=rows, **size)
    ways.append({"score": "pair by pair, as the official code runs", "rows": rows, "flops": flops})
    return {"images": images, "captions": captions, "timesteps": scorer.timesteps, "ways": ways}
