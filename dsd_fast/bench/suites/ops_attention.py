"""The attention operators beside what does their job today.

Letters: B rows, M texts, H heads, D head width, L image positions, T text tokens. All sides read the same channels-last
tensors (B, L, H·D). The baselines get keys and values that were gathered to a row each, (B, T, H·D), before the clock
starts; ours reads those of M = B/2 texts by index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.bench.case import Context, Side, Target, UnavailableError, Work
from dsd_fast.bench.measure import timer_for
from dsd_fast.bench.suites.judging import MEASURE, TOLERANCE, Judge, gradients
from dsd_fast.kernels.common import backend
from dsd_fast.kernels.common.attention import join_heads, split_heads
from dsd_fast.kernels.cross_attention_score import cross_attention_score
from dsd_fast.kernels.token_maps import token_maps

MAP_TOKENS = 4

MATERIALISED = "softmax, logsumexp and matmul"
ORACLE = "the reference in float64"

# Runs of each SDPA backend, to find the fastest.
_TRIALS = 7

Run = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: B, L, H, D, T and the type's name."""

    rows: int
    length: int
    heads: int
    width: int
    tokens: int = 77
    dtype: str = "float32"

    @property
    def texts(self) -> int:
        """M: two rows share a text."""
        return max(1, self.rows // 2)

    @property
    def sizes(self) -> dict[str, int]:
        """By name, as records have them."""
        return {
            "rows": self.rows,
            "positions": self.length,
            "heads": self.heads,
            "width": self.width,
            "tokens": self.tokens,
            "texts": self.texts,
        }

    def bytes(self, queries: int, keys: int, texts: int) -> int:
        """Of ``queries`` tensors like q and ``keys`` tensors like k with ``texts`` texts."""
        elements = queries * self.rows * self.length + keys * texts * self.tokens
        dtype: torch.dtype = getattr(torch, self.dtype)
        return elements * self.heads * self.width * dtype.itemsize


class Inputs:
    """Tensors of a shape, of unit variance; ``keys`` and ``values`` are k and v gathered to a row each."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        generator, dtype = torch.Generator().manual_seed(0), getattr(torch, shape.dtype)
        sizes = [(shape.rows, shape.length), *[(shape.texts, shape.tokens)] * 2]
        self.q, self.k, self.v = (
            torch.randn(*size, shape.heads * shape.width, generator=generator).to(device, dtype) for size in sizes
        )
        index = torch.randperm(shape.rows, generator=generator) % shape.texts
        tokens = torch.randint(shape.tokens, (shape.rows, MAP_TOKENS), generator=generator)
        self.index, self.tokens = index.to(device), tokens.to(device)
        self.keys, self.values = self.k[self.index], self.v[self.index]

    def ours(self, dtype: torch.dtype | None = None, with_output: bool = True) -> tuple[Tensor | None, Tensor]:
        """The operator's output and mean score, in a type of one's own or the inputs'."""
        q, k, v = (x if dtype is None else x.to(dtype) for x in (self.q, self.k, self.v))
        values = v if with_output else None
        return cross_attention_score(q, k, values, heads=self.shape.heads, text_index=self.index, mean=True)

    def sdpa(self) -> tuple[Tensor, None]:
        """torch's fused attention, which has no score."""
        q, k, v = (split_heads(x, self.shape.heads) for x in (self.q, self.keys, self.values))
        return join_heads(F.scaled_dot_product_attention(q, k, v)), None

    def materialised(self) -> tuple[Tensor, Tensor]:
        """Output and mean score from whole (B, H, L, T) logits."""
        return materialised(self.q, self.keys, self.values, self.shape.heads)

    def maps(self, dtype: torch.dtype | None = None) -> tuple[Tensor]:
        """The operator's token maps."""
        q, k = (x if dtype is None else x.to(dtype) for x in (self.q, self.k))
        return (token_maps(q, k, self.tokens, self.index, None, None, self.shape.heads, self.shape.width**-0.5),)

    def materialised_maps(self) -> tuple[Tensor]:
        """Token maps from whole (B, H, L, T) probabilities."""
        p: Tensor = _logits(self.q, self.keys, self.shape.heads).softmax(-1).float().mean(1)
        return (p.gather(-1, self.tokens[:, None, :].expand(-1, p.shape[1], -1)).mT,)


def materialised(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Output and mean score of q (B, L, H·D), k and v (B, T, H·D), as one writes them in plain torch."""
    logits = _logits(q, k, heads)
    return join_heads(logits.softmax(-1) @ split_heads(v, heads)), logits.float().logsumexp(-1).mean(-1)


def _logits(q: Tensor, k: Tensor, heads: int) -> Tensor:
    queries = split_heads(q, heads)
    logits: Tensor = (queries * queries.shape[-1] ** -0.5) @ split_heads(k, heads).mT
    return logits


def inputs(shape: Shape, context: Context) -> Inputs:
    """Those of a shape, made once a run."""
    return context.shared(f"attention inputs of {shape}", lambda: Inputs(shape, context.device))


def named(operator: str, run: Run) -> str:
    """An operator and the implementation that it takes for a call."""
    run()
    return f"{operator}, {backend.last(operator)}"


def forward(shape: Shape, context: Context, targets: Sequence[Target] = (), least: float | None = None) -> Work:
    """Output and mean score beside SDPA without a score and the materialised form.

    Args:
        shape: of the call.
        context: of the run.
        targets: against SDPA.
        least: times faster than the materialised form.
    """
    made = inputs(shape, context)
    run = torch.no_grad()(made.ours)
    name, sdpa = _best_sdpa(made) if torch.device(context.device).type == "cuda" else ("SDPA, no score", made.sdpa)
    against = {name: targets, MATERIALISED: () if least is None else (Target("ratio", least),)}
    scores = 4 * shape.rows * shape.heads
    sides = [
        Side(name, torch.no_grad()(sdpa), shape.rows, shape.sizes, shape.bytes(2, 2, shape.rows), against={}),
        Side(MATERIALISED, torch.no_grad()(made.materialised), shape.rows, shape.sizes, against={}),
        Side(
            named("cross_attention_score", run),
            run,
            shape.rows,
            shape.sizes,
            shape.bytes(2, 2, shape.texts) + scores,
            against=against,
        ),
    ]
    return work(shape, sides, made.ours(torch.float64), made.materialised())


def score_alone(shape: Shape, context: Context) -> Work:
    """The mean score alone, as the last layer that a plan taps computes it."""
    made = inputs(shape, context)

    def ours() -> tuple[Tensor]:
        return (made.ours(with_output=False)[1],)

    def plain() -> tuple[Tensor]:
        return (_logits(made.q, made.keys, shape.heads).float().logsumexp(-1).mean(-1),)

    run, moved = torch.no_grad()(ours), shape.bytes(1, 1, shape.texts) + 4 * shape.rows * shape.heads
    sides = [
        Side("matmul and logsumexp", torch.no_grad()(plain), shape.rows, shape.sizes),
        Side(named("cross_attention_score", run), run, shape.rows, shape.sizes, moved),
    ]
    return work(shape, sides, (made.ours(torch.float64, with_output=False)[1],), plain())


def maps(shape: Shape, context: Context) -> Work:
    """Probabilities of a few tokens, averaged over heads."""
    made = inputs(shape, context)
    run = torch.no_grad()(made.maps)
    moved = shape.bytes(1, 1, shape.texts) + 4 * shape.rows * MAP_TOKENS * shape.length
    sizes = {**shape.sizes, "map_tokens": MAP_TOKENS}
    sides = [
        Side("softmax, mean and gather", torch.no_grad()(made.materialised_maps), shape.rows, sizes),
        Side(named("token_maps", run), run, shape.rows, sizes, moved),
    ]
    return work(shape, sides, made.maps(torch.float64), made.materialised_maps())


def backward(shape: Shape, context: Context) -> Work:
    """Gradients of q, k and v from those of the output and of the mean score; the forward pass is not timed."""
    made = inputs(shape, context)
    gradient = Gradient(made)
    plain, ours = gradient.by_row(gradient.materialised), gradient.by_text(gradient.ours)
    sides = [
        Side(f"{MATERIALISED}, autograd", plain, shape.rows, shape.sizes),
        Side(named("cross_attention_score", ours), ours, shape.rows, shape.sizes, gradient.bytes),
    ]
    return gradient.work(sides)


class Gradient:
    """Gradients of one call's inputs from fixed ones of its output and mean score.

    The baselines have a key and a value a row, and their gradients too: the sum over the rows that share a text, which
    ours makes as well, is made for them when results are compared, not while they are timed.
    """

    def __init__(self, made: Inputs) -> None:
        generator = torch.Generator().manual_seed(1)
        self.made, self.shape = made, made.shape
        self.dout = torch.randn(made.q.shape, generator=generator).to(made.q)
        self.dscore = torch.randn(made.shape.rows, made.shape.heads, generator=generator).to(made.q.device)
        saved = 4 * self.shape.rows * self.shape.heads * self.shape.length
        self.bytes = self.shape.bytes(3, 4, self.shape.texts) + saved

    def by_text(self, call: Callable[..., Sequence[Tensor]], dtype: torch.dtype | None = None) -> Run:
        """The backward pass of ``call``(q, k, v) → output, score with the keys and values of M texts."""
        return self._of(call, (self.made.q, self.made.k, self.made.v), dtype)

    def by_row(self, call: Callable[..., Sequence[Tensor]]) -> Run:
        """The same with keys and values of B rows."""
        return self._of(call, (self.made.q, self.made.keys, self.made.values), None)

    def _of(self, call: Callable[..., Sequence[Tensor]], given: Sequence[Tensor], dtype: torch.dtype | None) -> Run:
        return gradients(call, [x.to(dtype or x.dtype) for x in given], (self.dout, self.dscore))

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The operator."""
        out, score = cross_attention_score(q, k, v, heads=self.shape.heads, text_index=self.made.index, mean=True)
        assert out is not None
        return out, score

    def materialised(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Plain torch."""
        return materialised(q, k, v, self.shape.heads)

    def work(self, sides: Sequence[Side]) -> Work:
        """The job of all the sides."""
        truth = self.by_text(self.ours, torch.float64)()
        return work(self.shape, sides, truth, self.by_row(self.materialised)(), self._summed)

    def _summed(self, result: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients with those of keys and values summed over the rows of each text, where they are not yet."""
        dq, *others = result
        if len(others[0]) == self.shape.texts:
            return result
        sums = [torch.zeros(self.shape.texts, *x.shape[1:], dtype=torch.float64, device=x.device) for x in others]
        return dq, *(sums[i].index_add_(0, self.made.index, x.double()) for i, x in enumerate(others))


def work(
    shape: Shape,
    sides: Sequence[Side],
    truth: Sequence[Tensor | None],
    plain: Sequence[Tensor],
    comparable: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple,
) -> Work:
    """The job of all the sides, judged against the truth by plain torch's own error, each result made comparable."""
    right = [value.detach() for value in truth if value is not None]
    dtypes = [value.dtype for value in plain]
    judge = Judge(right, [value.detach() for value in comparable(plain)], dtypes)
    return Work(
        sides=sides,
        difference=lambda result, truth: judge(comparable(result), truth),
        tolerance=TOLERANCE,
        accuracy=MEASURE,
        oracle=lambda: judge.truth,
        oracle_name=ORACLE,
        item="row",
        items=shape.rows,
        dtype=shape.dtype,
        launches=False,
    )


def _best_sdpa(made: Inputs) -> tuple[str, Run]:
    """The fastest of torch's fused backends on a GPU, named."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    timer, found = timer_for(made.device, False), {}
    candidates = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
    }
    for name, kernel in candidates.items():

        def run(kernel: SDPBackend = kernel) -> tuple[Tensor, None]:
            with sdpa_kernel(kernel):
                return made.sdpa()

        try:
            run()
        except RuntimeError:
            # torch's way to say that the backend does not take these inputs.
            continue
        found[name] = (min(timer(run) for _ in range(_TRIALS)), run)
    if not found:
        raise UnavailableError("torch has no fused attention for these inputs")
    best = min(found, key=lambda name: found[name][0])
    return f"SDPA, no score ({best}, the fastest of {', '.join(found)})", found[best][1]
