"""What each head of the attention term says by itself, before any adaptation."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.suites.fit_quality import CONFIG, N, Scenes, evaluation_scenes
from benchmarks.suites.intervals import interval
from dsd_fast.bench.case import Context, Figure
from dsd_fast.bench.suites.shared import mini
from dsd_fast.diffusion import noise
from dsd_fast.engine import Texts
from dsd_fast.matching.score import PairScorer

GROUP = "single-heads"
_SCENES_AT_ONCE = 20


def single_heads(context: Context, *, n: int = N) -> list[Figure]:
    """How often the caption scores above a negative of new scenes: the highest and the lowest head of each layer.

    Each is the share of the (scene, negative) comparisons, over all kinds of negatives; a tie is wrong. Chance is a
    half: what a head says then depends on the texts alone, or on nothing.
    """
    scenes = evaluation_scenes(context, n, False)
    found = head_scores(PairScorer.of(mini(context), CONFIG), scenes)
    figures = [_figure("mean of all heads", np.concatenate(list(found.values()), 2).mean(2))]
    for layer, scores in found.items():
        above = (scores[:, :1] > scores[:, 1:]).mean((0, 1))
        for which, head in (("highest", int(above.argmax())), ("lowest", int(above.argmin()))):
            figures.append(_figure(f"{layer}, {which} of its {len(above)} heads, {head}", scores[:, :, head]))
    return figures


def head_scores(scorer: PairScorer, scenes: Scenes) -> dict[str, NDArray[np.float64]]:
    """(n, 1 + negatives, H) mean log-sum-exp over positions by the id of each cross-attention, at the first timestep.

    Args:
        scorer: whose network, timestep and noise are taken.
        scenes: whose texts are scored.
    """
    plan, each = scorer.program.plan(scores=scorer.program.score_ids), 1 + len(scenes.kinds)
    epsilon = noise(scorer.config.seed, 0, scenes.latents.shape[1:]).to(scenes.latents.device)
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in scorer.program.score_ids}
    for start in range(0, len(scenes.latents), _SCENES_AT_ONCE):
        latents = scenes.latents[start : start + _SCENES_AT_ONCE]
        times = torch.full((len(latents),), scorer.timesteps[0])
        texts = torch.arange(len(latents) * each)
        with torch.no_grad():
            out = plan.run(
                scorer.model.schedule.add_noise(latents, epsilon.expand_as(latents), times),
                times,
                Texts(scenes.states[each * start + texts]).keys(plan),
                latent_index=texts // each,
                text_index=texts,
                time_ids=scorer.model.time_ids(*scorer.engine.size),
            )
        for name, parts in found.items():
            parts.append(out.scores[name].double().view(len(latents), each, -1).cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _figure(name: str, scores: NDArray[np.float64]) -> Figure:
    """From (n, 1 + negatives) scores."""
    above = (scores[:, :1] > scores[:, 1:]).mean(1)
    return Figure(name, *interval(above[None]), len(above), chance=0.5)
