"""One forward pass of the network: diffusers, diffusers compiled, and a plan by each runtime.

The plan's text keys and values are made before the clock starts: an engine that asks about many latents makes them once
a text. diffusers projects them at every call, 0.4 % of the arithmetic of SD 1.5.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsd_fast.bench.case import Case, Context, Group, Side, Suite, Target, Work
from dsd_fast.bench.measure import count_flops
from dsd_fast.bench.suites.judging import MEASURE, TOLERANCE, Judge
from dsd_fast.bench.suites.shared import PREDICTION_TOLERANCE, mini, on_h200, relative
from dsd_fast.bench.suites.unet_networks import ARCHITECTURES, CHECKED, TIMESTEP, TOKENS, Network
from dsd_fast.unet import UNetProgram

MINI_ROWS = (1, 4, 16, 64)
ROWS = (1, 2, 4, 16, 32, 64)
FEW, MANY = 4, 16

RATES = {"sd15": 450.0, "sd21-base": 520.0}
"""Rows a second on an H200 in bfloat16, from MANY rows on: 46 % and 53 % of its matmul peak."""

FASTER = {FEW: 1.25, MANY: 1.05}
"""Times faster than compiled diffusers, up to FEW rows and from MANY on."""

# Modes of torch.compile: the short run has no time for the search that the long one waits for.
SHORT_MODE, FEW_MODE, MANY_MODE = "default", "reduce-overhead", "max-autotune-no-cudagraphs"

STOCK, LAST = "diffusers", "diffusers, channels-last"
RUNTIMES = ("inductor", "cudagraph")

Run = Callable[[], Tensor]


def _mini(rows: int, context: Context) -> Work:
    """The embedded model beside stock diffusers, in both memory layouts."""
    model = mini(context)
    unet, side = model.unet, model.image_size[0] // model.vae_scale_factor
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, 4, side, side, generator=generator).to(model.device)
    states = torch.randn(rows, TOKENS, unet.config.cross_attention_dim, generator=generator).to(model.device)
    last = context.shared("mini in channels-last", lambda: copy.deepcopy(unet).to(memory_format=torch.channels_last))

    def stock(network: Any, layout: torch.memory_format) -> Run:
        # The layout of the latents is that of every activation after them.
        sample = latents.contiguous(memory_format=layout)
        return torch.no_grad()(lambda: network(sample, TIMESTEP, states, return_dict=False)[0])

    plans = {"plan": _plan(unet), "plan, inductor": _plan(unet, "inductor")}
    runs, flops = _runs(plans, latents, states, None, None), _flops(plans["plan"], rows, side)
    sizes = {"rows": rows}
    sides = [
        Side(STOCK, stock(unet, torch.contiguous_format), rows, sizes, against={}),
        Side(LAST, stock(last, torch.channels_last), rows, sizes, against={}),
        Side("plan", runs["plan"], rows, sizes, flops=flops, against={STOCK: (), LAST: ()}),
        Side("plan, inductor", runs["plan, inductor"], rows, sizes, flops=flops, against={STOCK: (), "plan": ()}),
    ]
    return Work(
        sides=sides,
        difference=relative,
        tolerance=PREDICTION_TOLERANCE,
        accuracy="largest relative difference of a prediction",
        oracle_name=STOCK,
        item="row",
        items=rows,
    )


def _eager(name: str, rows: int, context: Context) -> Work:
    """A real architecture: diffusers, and the plan by each runtime."""
    network = _network(name, context)
    baseline = torch.no_grad()(_stock(network, network.unet, rows))
    sides = [Side(STOCK, baseline, rows, {"rows": rows}, against={})]
    sides += _ours(network, rows, STOCK, {"rate": _rate(name, rows, network.device)})
    return _judged(network, sides, baseline, rows)


def _compiled(name: str, rows: int, mode: str, context: Context) -> Work:
    """A real architecture: diffusers compiled, in channels-last, and the plan by each compiled runtime."""
    network = _network(name, context)
    last = copy.deepcopy(network.unet).to(memory_format=torch.channels_last)
    plain = torch.no_grad()(_stock(network, network.unet, rows))
    _, flops = count_flops(plain)
    compiled = torch.compile(last, mode=mode, dynamic=False)
    title = f"diffusers, channels-last, torch.compile ({mode})"
    baseline = torch.no_grad()(_stock(network, compiled, rows))
    sides = [Side(title, baseline, rows, {"rows": rows}, flops=flops, against={})]
    least = FASTER[FEW] if rows <= FEW else FASTER[MANY] if rows >= MANY else None
    sides += _ours(network, rows, title, {"ratio": least}, eager=False)
    return _judged(network, sides, plain, rows)


def _network(name: str, context: Context) -> Network:
    """An architecture in bfloat16, made once a run. What was compiled for other rows is forgotten."""
    torch._dynamo.reset()
    return context.shared(f"network {name}", lambda: Network(ARCHITECTURES[name], context.device, torch.bfloat16))


def _stock(network: Network, unet: Any, rows: int) -> Run:
    arguments, options = network.call(rows)
    latents, *others = arguments
    latents = latents.contiguous(memory_format=torch.channels_last) if unet is not network.unet else latents
    return lambda: unet(latents, *others, **options)[0]


def _ours(
    network: Network, rows: int, baseline: str, least: Mapping[Any, float | None], *, eager: bool = True
) -> list[Side]:
    """The plan by each runtime, as sides that are meant to reach ``least`` where they are compiled."""
    latents, states, pooled, ids = network.inputs(rows)
    plans = {"plan": _plan(network.unet)} if eager else {}
    plans |= {f"plan, {runtime}": _plan(network.unet, runtime) for runtime in RUNTIMES}
    runs = _runs(plans, latents, states, pooled, ids if pooled is not None else None)
    flops = _flops(next(iter(plans.values())), rows, network.architecture.side)
    targets = [Target(measure, value) for measure, value in least.items() if value is not None]
    return [
        Side(name, run, rows, {"rows": rows}, flops=flops, against={baseline: targets if name != "plan" else ()})
        for name, run in runs.items()
    ]


def _runs(
    plans: Mapping[str, Any], latents: Tensor, states: Tensor, pooled: Tensor | None, ids: Tensor | None
) -> dict[str, Run]:
    with torch.no_grad():
        text = next(iter(plans.values())).encode_text(states, pooled=pooled)

    def run(plan: Any) -> Run:
        return torch.no_grad()(lambda: plan.run(latents, TIMESTEP, text, time_ids=ids).noise_pred)

    return {name: run(plan) for name, plan in plans.items()}


def _plan(unet: Any, runtime: str | None = None) -> Any:
    plan = UNetProgram(unet).plan(noise_pred=True)
    return plan if runtime is None else plan.compile(runtime=runtime)


def _flops(plan: Any, rows: int, side: int) -> int:
    """Of one run, without the texts' keys and values."""
    table = plan.flops_by_step(latents=rows, texts=rows, rows=rows, height=side, width=side, tokens=TOKENS)
    total: int = sum(table.values()) - table["text"]
    return total


def _rate(name: str, rows: int, device: str) -> float | None:
    return RATES.get(name) if on_h200(device) and rows >= MANY else None


def _judged(network: Network, sides: Sequence[Side], plain: Run, rows: int) -> Work:
    """Predictions of the first rows, judged by diffusers' own error in the type that is measured."""
    checked = min(rows, CHECKED)
    judge = Judge([network.truth[:checked]], [plain()[:checked]])
    return Work(
        sides=sides,
        difference=lambda result, right: judge([result[:checked]], right),
        tolerance=TOLERANCE,
        accuracy=MEASURE.replace("plain torch", "diffusers"),
        oracle=lambda: judge.truth,
        oracle_name=f"diffusers in float32, {checked} row{'' if checked == 1 else 's'}",
        item="row",
        items=rows,
        dtype=str(network.dtype).removeprefix("torch."),
    )


def _cuda_cases() -> list[Case]:
    short = {"sd15": (1, 16), "sd21-base": (16,)}
    # The short ones first, those that a target names before the others.
    cases = [Case("sd15/16/against-default", "sd15", partial(_compiled, "sd15", 16, SHORT_MODE), 7, ("cuda",))]
    for name in ARCHITECTURES:
        for rows in ROWS:
            long = rows not in short.get(name, ())
            cases.append(Case(f"{name}/{rows}", name, partial(_eager, name, rows), 7, ("cuda",), long))
            mode = FEW_MODE if rows <= FEW else MANY_MODE
            long = (name, rows) != ("sd15", 1)
            case = Case(f"{name}/{rows}/against-{mode}", name, partial(_compiled, name, rows, mode), 7, ("cuda",), long)
            cases.append(case)
    return sorted(cases, key=lambda case: case.long)


suite = Suite(
    name="unet",
    groups=[
        Group("mini", "One forward pass of the mini model on a CPU", plot="latency"),
        *(
            Group(name, f"One forward pass of {title}, bfloat16, random weights", plot="latency")
            for name, title in (("sd15", "SD 1.5"), ("sd21-base", "SD 2.1-base"), ("sdxl", "SDXL"))
        ),
    ],
    cases=[
        *(Case(f"mini/{rows}", "mini", partial(_mini, rows), 9, ("cpu",)) for rows in MINI_ROWS),
        *_cuda_cases(),
    ],
)
