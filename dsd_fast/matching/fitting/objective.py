"""The loss of a step: groups to rows of the network, the rows' scores, and the loss of their candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.engine import Noised
from dsd_fast.engine.noise_loss import draw_row
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.examples import Examples, Query
from dsd_fast.matching.score import PairScorer, Terms
from dsd_fast.training import seed_of


@dataclass(frozen=True)
class Batch:
    """The rows of some groups, before any is computed.

    Attributes:
        image_of: (P,) the image of each noised latent.
        times, noise: (P,) and (P, C, h, w), float32, of each noised latent.
        latent_of, text_of: (R,) the noised latent and the text, a position in the examples, of each pair.
        free: (P,) bool, noised latents whose unconditional row counts.
        sizes, labels: candidates of each group, in the pairs' order, and the right one's place.
    """

    image_of: Tensor
    times: Tensor
    noise: Tensor
    latent_of: Tensor
    text_of: Tensor
    free: Tensor
    sizes: list[int]
    labels: list[int]


def draw(
    queries: Sequence[Query],
    keys: Sequence[tuple[int, ...]],
    shape: Sequence[int],
    fit: FitConfig,
    timesteps: int,
    compares_free: bool,
) -> Batch:
    """The timesteps and the noise of groups; each group's depend on its key alone.

    Args:
        queries: the groups.
        keys: of each group, what its draws are seeded with.
        shape: (C, h, w) of a latent.
        fit: the settings.
        timesteps: of the schedule.
        compares_free: whether the score has a part of the unconditional row. Where the candidates are texts and share
            image, timestep and noise, that part is the same for all, and neither loss sees it.
    """
    span = fit.timestep_range or (0, timesteps)
    image_of: list[int] = []
    times: list[int] = []
    noise: list[Tensor] = []
    latent_of: list[int] = []
    text_of: list[int] = []
    free: list[bool] = []
    for query, key in zip(queries, keys, strict=True):
        random = torch.Generator().manual_seed(seed_of(*key))
        candidates = max(len(query.images), len(query.texts))
        one_latent = fit.shared_noise and len(query.images) == 1
        for place in range(candidates):
            if not (place and one_latent):
                fresh = not (place and fit.shared_noise)
                time, own = draw_row(random, span, shape) if fresh else (times[-1], noise[-1])
                image_of.append(query.images[place % len(query.images)])
                times.append(time)
                noise.append(own)
                free.append(compares_free and not one_latent)
            latent_of.append(len(image_of) - 1)
            text_of.append(query.texts[place % len(query.texts)])
    return Batch(
        torch.tensor(image_of, device="cpu"),
        torch.tensor(times, device="cpu"),
        torch.stack(noise),
        torch.tensor(latent_of, device="cpu"),
        torch.tensor(text_of, device="cpu"),
        torch.tensor(free, device="cpu"),
        [max(len(query.images), len(query.texts)) for query in queries],
        [query.label for query in queries],
    )


def scores(
    scorer: PairScorer,
    weights: Mapping[str, Tensor],
    examples: Examples,
    batch: Batch,
    *,
    through_network: bool = True,
    checkpoint: bool = False,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """(R,) scores of a batch's pairs at their one timestep; differentiable.

    They lack the unconditional part where :class:`Batch` says that it does not count.

    Args:
        scorer: the network, its learned vectors and the configuration.
        weights: score id → (H,) weights of its heads.
        examples: whose positions the batch has.
        batch: from :func:`draw`.
        through_network: whether a gradient is wanted to more than the weights.
        checkpoint: whether the network's activations are computed again for it.
        autocast: type that the network computes in; None: its own. What is made of its answers is float32 either way.
    """
    model, plan = scorer.model, scorer.plan
    device, pairs = model.device, len(batch.latent_of)
    used, text_index = torch.unique(batch.text_of, return_inverse=True)
    free_latents = torch.nonzero(batch.free).flatten()
    texts = scorer.texts(examples.states(used.tolist()), examples.unconditional if len(free_latents) else None)
    rows = torch.cat([batch.latent_of, free_latents])  # (R + free,)
    text_index = torch.cat([text_index, torch.full_like(free_latents, len(used))])
    clean = upload(examples.latents[batch.image_of], device, model.dtype)
    noised = Noised.rows(model.schedule, clean, batch.noise, batch.times)
    mixed = torch.autocast(device.type, autocast, enabled=autocast is not None)
    with torch.set_grad_enabled(through_network), mixed:
        out = plan.run(
            noised.latents,
            noised.timesteps,
            texts.keys(plan),
            latent_index=rows,
            text_index=text_index,
            time_ids=model.time_ids(*scorer.engine.size),
            checkpoint=checkpoint,
        )
    terms = scorer.row_terms(out, noised, rows, weights)
    free: list[Tensor] = []
    if len(free_latents):
        place = torch.full((len(batch.free),), -1, dtype=torch.int64, device="cpu")
        place[free_latents] = torch.arange(len(free_latents), device="cpu")
        own = upload(place[batch.latent_of], device)
        free = [torch.where(own >= 0, value[pairs:][own.clamp(min=0)], 0) for value in terms]
    attention, noise = Terms(*(value[:pairs] for value in terms), *free).parts(scorer.config)
    return attention + noise


def losses(values: Tensor, batch: Batch, fit: FitConfig) -> Tensor:
    """(Q,) losses of the groups whose candidates have these scores; float32 or more."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    parts = zip(torch.split(values, batch.sizes), batch.labels, strict=True)
    return torch.stack([group_loss(own, label, fit) for own, label in parts])


def group_loss(values: Tensor, label: int, fit: FitConfig) -> Tensor:
    """The loss of one group whose K candidates have these scores."""
    values = values.flatten()
    if fit.loss == "margin":
        wrong = torch.cat([values[:label], values[label + 1 :]])
        return F.relu(fit.margin + wrong.amax() - values[label])
    wanted = torch.tensor(label, dtype=torch.int64, device="cpu")
    return F.cross_entropy(values / fit.temperature, upload(wanted, values.device))
