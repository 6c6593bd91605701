"""The run itself: the state at the start, and the steps of a plan one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.unet.checkpoint import Call, Checkpoints
from dsd_fast.unet.output import Output
from dsd_fast.unet.step import NOTHING, Size, State, Step, Taken, Want
from dsd_fast.unet.text import LayerText

if TYPE_CHECKING:
    from dsd_fast.unet.plan import Plan
    from dsd_fast.unet.request import Request

Cut = tuple[tuple[Step, Want], ...]


@dataclass(frozen=True)
class Region:
    """Steps in a row that belong together: a residual block, a transformer block, a sampler.

    Attributes:
        cut: the steps, each with what is taken from it.
        layer: score id of the cross-attention whose keys they read.
        kind: equal for regions that compute the same with other weights.
        compiled: whether a runtime may compile it. Whole attention maps and a ControlNet's addition are left as they
            are.
        checkpointed: whether it has activations to drop. A ControlNet's addition has none.
    """

    cut: Cut
    layer: str | None
    kind: tuple[Any, ...]
    compiled: bool
    checkpointed: bool


def regions(steps: Sequence[Step], wants: Sequence[Want]) -> tuple[Region, ...]:
    """The regions of a plan's steps, in order."""
    result = []
    for name, group in groupby(zip(steps, wants, strict=True), key=lambda pair: pair[0].region):
        cut = tuple(group)
        layer = next((step.layer for step, _ in cut if step.layer is not None), None)
        kind = tuple((step.name.removeprefix(name), step.level, want) for step, want in cut)
        checkpointed = name != "mid-residual"
        compiled = checkpointed and not any(step.optional for step, _ in cut)
        result.append(Region(cut, layer, kind, compiled, checkpointed))
    return tuple(result)


def advance(cut: Cut, state: State) -> list[Taken]:
    """Run the steps; a feature that is wanted has one row per requested row."""
    result = []
    for step, want in cut:
        if step.reads_text:
            state.expand()
        taken = step.run(state, want)
        if want.feature:
            assert taken.feature is not None
            taken = Taken(state.rows(taken.feature, state.expanded), taken.score, taken.maps)
        elif taken.feature is not None:
            # Nobody asked for it, and it would stay alive.
            taken = NOTHING
        if step.self_maps and taken.maps is not None:
            taken = Taken(maps=state.rows(taken.maps, state.expanded))
        result.append(taken)
    return result


def advance_by(call: Call, region: Region, state: State) -> list[Taken]:
    """Like :func:`advance`, for a region that ``call`` runs as a function of tensors: ``call(compute, *arguments)``.

    Here is what a region reads and writes of the state.
    """
    pops = sum(step.pops for step, _ in region.cut)
    popped = [state.skips.pop() for _ in range(pops)]
    residuals = [state.residuals[0][number] for number, _, _ in popped] if state.residuals is not None else None
    pushes = sum(1 for step, _ in region.cut if step.pushes)
    taken, changed, names, pushed, state.expanded = call(
        compute,
        region.cut,
        tuple(state.sizes),
        tuple(state.pushed + i in state.keep for i in range(pushes)),
        (state.expanded, state.embedding_expanded),
        state.live,
        [(value, expanded) for _, value, expanded in popped],
        residuals,
        state.embedding,
        state.latent_index,
        state.text_index,
        state.text if region.layer is not None else None,
        state.map_tokens,
    )
    state.live = {name: changed[name] if name in changed else state.live[name] for name in names}
    state.skips += [(state.pushed + number, value, expanded) for number, value, expanded in pushed]
    state.pushed += pushes
    return [Taken(*values) for values in taken]


def compute(
    cut: Cut,
    sizes: tuple[Size, ...],
    kept: tuple[bool, ...],
    expanded: tuple[bool, bool],
    live: dict[str, Tensor],
    skips: list[tuple[Tensor, bool]],
    residuals: list[Tensor] | None,
    embedding: Tensor,
    latent_index: Tensor | None,
    text_index: Tensor | None,
    text: LayerText | None,
    map_tokens: Tensor | None,
) -> tuple[Any, ...]:
    """A region as a function of tensors: what is taken, the live values that changed, the names of all, the skips."""
    state = State(
        embedding=embedding,
        latent_index=latent_index,
        text_index=text_index,
        sizes=sizes,
        keep=frozenset(number for number, keep in enumerate(kept) if keep),
        text=text,
        # The middle's residual belongs to a step that is neither compiled nor checkpointed.
        residuals=None if residuals is None else (residuals, embedding),
        map_tokens=map_tokens,
        embedding_expanded=expanded[1],
        expanded=expanded[0],
        live=dict(live),
        skips=[(number, value, done) for number, (value, done) in enumerate(skips)],
    )
    taken = advance(cut, state)
    changed = {name: value for name, value in state.live.items() if value is not live.get(name)}
    return (
        [(each.feature, each.score, each.maps) for each in taken],
        changed,
        tuple(state.live),
        state.skips,
        state.expanded,
    )


def collect(plan: Plan, output: Output, cut: Cut, taken: Iterable[Taken]) -> None:
    """Put what was taken where it belongs."""
    for (step, want), value in zip(cut, taken, strict=True):
        if want.feature:
            assert value.feature is not None
            if step.name in plan.features:
                output.features[step.name] = value.feature
            if step.name == "unet-out" and plan.noise_pred:
                output.noise_pred = value.feature
        if value.score is not None:
            output.scores[step.name] = value.score
        if value.maps is not None:
            output.maps[step.name] = value.maps


def start(plan: Plan, request: Request, embedding: Tensor | None) -> State:
    """The state before the first step, from the activated time embedding that :func:`embed` made."""
    return State(
        embedding=request.latents if embedding is None else embedding,
        latent_index=request.latent_index,
        text_index=request.text_index,
        sizes=plan.program.sizes(*request.latents.shape[-2:]),
        keep=plan.kept_skips,
        residuals=request.residuals,
        map_tokens=request.map_tokens,
        embedding_expanded=request.time_ids is not None,
        live={"x": request.latents},
    )


def embed(
    unet: Any,
    times: Tensor,
    dtype: torch.dtype,
    time_ids: Tensor | None,
    pooled: Tensor | None,
    latent_index: Tensor | None,
    text_index: Tensor | None,
) -> Tensor:
    """The activated time embedding: (P, E), or (B, E) where it reads the pooled text."""
    embedding = unet.time_embedding(unet.time_proj(times).to(dtype))
    if time_ids is not None:
        assert pooled is not None
        ids = unet.add_time_proj(time_ids.flatten()).view(len(time_ids), -1).to(pooled.dtype)
        pooled = pooled if text_index is None else pooled.index_select(0, text_index)
        if latent_index is not None:
            embedding, ids = embedding.index_select(0, latent_index), ids.index_select(0, latent_index)
        embedding = embedding + unet.add_embedding(torch.cat([pooled, ids], dim=-1).to(embedding.dtype))
    return F.silu(embedding)


def run_eager(plan: Plan, request: Request) -> Output:
    """The plan's answer, a kernel at a time."""
    embedding = embed(plan.program.unet, *request.embedded()) if plan.reads_time else None
    return run_regions(plan, request, embedding, lambda region: None)


def run_regions(
    plan: Plan, request: Request, embedding: Tensor | None, caller: Callable[[Region], Call | None]
) -> Output:
    """The regions one after another; ``caller`` says what calls one (:func:`advance_by`), None: its steps are run."""
    state, output = start(plan, request, embedding), Output()
    checkpoints = Checkpoints(plan.program) if request.checkpoint and torch.is_grad_enabled() else None
    for region in plan.regions:
        if region.layer is not None:
            assert request.text is not None
            state.text = request.text.layer(region.layer)
        call = caller(region)
        if checkpoints is not None and region.checkpointed:
            call = checkpoints.around(call)
        taken = advance(region.cut, state) if call is None else advance_by(call, region, state)
        collect(plan, output, region.cut, taken)
    return output
