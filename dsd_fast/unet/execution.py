"""The run itself: the state at the start, and the regions of a cut one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.unet.checkpoint import Call, Checkpoints
from dsd_fast.unet.cut import Cut, Region
from dsd_fast.unet.inductor import settings
from dsd_fast.unet.output import Output
from dsd_fast.unet.pieces import CALLED, Layers, layers_of
from dsd_fast.unet.request import Request
from dsd_fast.unet.step import NOTHING, RowIndex, Size, State, Taken, Tapped
from dsd_fast.unet.text import LayerText


def advance(steps: Tapped, state: State) -> list[Taken]:
    """Run the steps; a feature that is wanted has one row per requested row."""
    result = []
    for step, want in steps:
        if step.reads_text and not state.expanded:
            state.expand()
        taken = step.run(state, want)
        if want.feature:
            assert taken.feature is not None
            taken = Taken(state.rows(taken.feature, state.expanded), taken.score, taken.maps)
        elif taken.feature is not None:
            # Nobody asked for it, and it would stay alive.
            taken = NOTHING
        if taken.maps is not None and step.self_maps:
            taken = Taken(maps=state.rows(taken.maps, state.expanded))
        result.append(taken)
    return result


def advance_by(call: Call, region: Region, state: State) -> list[Taken]:
    """Like :func:`advance`, for a region that ``call`` runs as a function of tensors: ``call(compute, *arguments)``.

    Here is what a region reads and writes of the state.
    """
    pops = sum(step.pops for step, _ in region.steps)
    popped = [state.skips.pop() for _ in range(pops)]
    residuals = [state.residuals[0][number] for number, _, _ in popped] if state.residuals is not None else None
    pushes = sum(1 for step, _ in region.steps if step.pushes)
    taken, changed, names, pushed, state.expanded = call(
        compute,
        region.steps,
        tuple(state.sizes),
        tuple(state.pushed + i in state.keep for i in range(pushes)),
        (state.expanded, state.embedding_expanded, state.activated),
        state.live,
        [(value, expanded) for _, value, expanded in popped],
        residuals,
        state.embedding,
        state.index,
        state.text if region.layer is not None else None,
    )
    state.live = {name: changed[name] if name in changed else state.live[name] for name in names}
    state.skips += [(state.pushed + number, value, expanded) for number, value, expanded in pushed]
    state.pushed += pushes
    return [Taken(*values) for values in taken]


def compute(
    steps: Tapped,
    sizes: tuple[Size, ...],
    kept: tuple[bool, ...],
    stages: tuple[bool, bool, bool],
    live: dict[str, Tensor],
    skips: list[tuple[Tensor, bool]],
    residuals: list[Tensor] | None,
    embedding: Tensor,
    index: RowIndex,
    text: LayerText | None,
) -> tuple[Any, ...]:
    """A region as a function of tensors: what is taken, the live values that changed, the names of all, the skips."""
    state = State(
        embedding=embedding,
        index=index,
        sizes=sizes,
        keep=frozenset(number for number, keep in enumerate(kept) if keep),
        layers=CALLED,
        text=text,
        # The middle's residual belongs to a step that is neither compiled nor checkpointed.
        residuals=None if residuals is None else (residuals, embedding),
        embedding_expanded=stages[1],
        activated=stages[2],
        expanded=stages[0],
        live=dict(live),
        skips=[(number, value, done) for number, (value, done) in enumerate(skips)],
    )
    taken = advance(steps, state)
    changed = {name: value for name, value in state.live.items() if value is not live.get(name)}
    return (
        [(each.feature, each.score, each.maps) for each in taken],
        changed,
        tuple(state.live),
        state.skips,
        state.expanded,
    )


def collect(cut: Cut, output: Output, steps: Tapped, taken: Iterable[Taken]) -> None:
    """Put what was taken where it belongs."""
    for (step, want), value in zip(steps, taken, strict=True):
        if value is NOTHING:
            continue
        if want.feature:
            assert value.feature is not None
            if step.name in cut.features:
                output.features[step.name] = value.feature
            if cut.noise_pred and step.name == cut.network.output_id:
                output.noise_pred = value.feature
        if value.score is not None:
            output.scores[step.name] = value.score
        if value.maps is not None:
            output.maps[step.name] = value.maps


def start(cut: Cut, request: Request, embedding: Tensor | None, layers: Layers) -> State:
    """The state before the first step, from the time embedding that :meth:`Network.embed` made."""
    activated = embedding is not None and cut.network.plainly_activated
    if embedding is not None and activated:
        embedding = F.silu(embedding)
    return State(
        embedding=request.latents if embedding is None else embedding,
        index=request.index,
        sizes=request.sizes,
        keep=cut.kept_skips,
        layers=layers,
        activated=activated,
        residuals=request.residuals,
        kept=request.kept,
        embedding_expanded=request.time_ids is not None,
        live={"x": request.latents},
    )


def run_eager(cut: Cut, request: Request) -> Output:
    """The answer to ``request``, a kernel at a time."""
    network = cut.network
    embedding = network.embed(network.module, *request.embedded()) if cut.reads_time else None
    layers = layers_of(network.weights, network.device)
    return run_regions(cut, request, embedding, lambda region: None, layers)


def run_compiled(cut: Cut, request: Request) -> Output:
    """The answer to a request of a bucket's size, by code that is compiled once for each kind of region."""
    network, call = cut.network, cut.network.inductor.call
    key = (request.key, settings(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    embedding = call(key, network.embed, network.module, *request.embedded()) if cut.reads_time else None
    return run_regions(
        cut, request, embedding, lambda region: partial(call, (*key, region.kind)) if region.compiled else None
    )


def run_padded(cut: Cut, request: Request, out: Output | None) -> Output:
    """The answer to a request of any size, compiled; in ``out`` or in fresh tensors."""
    return run_compiled(cut, request.padded()).cut(request.rows).into(out)


def run_regions(
    cut: Cut,
    request: Request,
    embedding: Tensor | None,
    caller: Callable[[Region], Call | None],
    layers: Layers = CALLED,
) -> Output:
    """The regions one after another; ``caller`` says what calls one (:func:`advance_by`), None: its steps are run."""
    state, output = start(cut, request, embedding, layers), Output()
    checkpoints = Checkpoints(cut.network) if request.checkpoint and torch.is_grad_enabled() else None
    for region in cut.regions:
        if region.layer is not None:
            assert request.text is not None
            state.text = request.text.layer(region.layer)
        call = caller(region)
        if checkpoints is not None and region.checkpointed:
            call = checkpoints.around(call)
        if call is None and region.silent:
            for step, want in region.steps:
                if step.reads_text and not state.expanded:
                    state.expand()
                step.run(state, want)
            continue
        taken = advance(region.steps, state) if call is None else advance_by(call, region, state)
        collect(cut, output, region.steps, taken)
    return output
