"""Settings of :meth:`Matcher.fit <dsd_fast.matching.Matcher.fit>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsd_fast.engine.settings import Fields, above, check_fields, integer, is_bool, is_span, number, one_of, or_none
from dsd_fast.training.order import scheduled

METHODS = ("lora", "prompt", "heads")
LEARNING_RATES = {"lora": 3e-3, "prompt": 0.1, "heads": 0.1}
"""By method. A head's weight is learned relative to the mean of all: its rate does not depend on their scale."""


@dataclass(frozen=True)
class FitConfig:
    """How a matcher is adapted to examples.

    The official recipe (dsd_train.py of eric-ai-lab/DSD) is ``FitConfig.official(steps)``, for a matcher whose score is
    the official one, ``MatchConfig(official=True)``.

    Attributes:
        steps: of the optimiser, AdamW.
        batch_size: groups a step.
        micro_batch: groups in one pass through the network; fewer need less memory and, without dropout, give the
            same gradient. None takes all of a step's.
        loss: "cross-entropy" over a group's candidates, softmax of score / temperature; or "margin",
            max(0, margin + max over wrong candidates − score of the right one) (official).
        temperature, margin: of the two losses, in units of the score.
        shared_noise: whether the candidates of a group share timestep and noise, so that only the candidate makes the
            difference, and for one image the texts' rows alone are computed; otherwise each has its own (official).
        timestep_range: timesteps are drawn uniformly from this one up to, not including, that one; None: from all.
        learning_rate: one for all methods, or by method; a method that is not named takes its default,
            :data:`LEARNING_RATES`.
        schedule: "linear" is constant for the first half of the steps and then falls to 0; "constant" stays (official).
        warmup: steps over which the rate rises to its value.
        weight_decay: AdamW's, of LoRA matrices.
        clip_norm: largest norm of the gradient of all parameters together.
        rank: of the LoRA, whose scale is 1.
        attention: which attention layers have a LoRA on their q, k, v and out: "cross", or "all" (official).
        lora_dropout: share of a LoRA's inputs that a step leaves out.
        prompt_tokens: number of learned vectors.
        validate_every: steps between records, and so between validations on the held-out examples.
        patience: validations without a better one after which training stops; None never does.
        checkpointing: whether activations are computed again for the gradient instead of kept: less memory, a third
            more time.
        autocast: "bfloat16" or "float16" computes the network in that type, weights of the LoRA, scores and loss in
            float32; None in its own.
        save_every: seconds between checkpoints in the output folder.
        seed: of the first weights, of the order of the examples, of timesteps, noise and dropout.

    Raises:
        ValueError: a value that is not allowed, by name.
    """

    steps: int = 300
    batch_size: int = 8
    micro_batch: int | None = None
    loss: str = "cross-entropy"
    temperature: float = 0.3
    margin: float = 0.1
    shared_noise: bool = True
    timestep_range: tuple[int, int] | None = None
    learning_rate: float | Mapping[str, float] | None = None
    schedule: str = "linear"
    warmup: int = 10
    weight_decay: float = 1.0
    clip_norm: float = 1.0
    rank: int = 4
    attention: str = "cross"
    lora_dropout: float = 0.0
    prompt_tokens: int = 8
    validate_every: int = 50
    patience: int | None = None
    checkpointing: bool = False
    autocast: str | None = None
    save_every: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, _FIELDS)

    @classmethod
    def official(cls, steps: int) -> FitConfig:
        """The official recipe: margin loss on one group a step, every candidate with its own timestep and noise, rank 4
        on all attention layers, rate 1e-4, weight decay 1e-2.

        The loss is the official one only of the official score, that of a matcher with ``MatchConfig(official=True)``.
        """
        return cls(
            steps=steps,
            batch_size=1,
            loss="margin",
            shared_noise=False,
            learning_rate=1e-4,
            schedule="constant",
            warmup=0,
            weight_decay=1e-2,
            attention="all",
        )

    def rate(self, method: str, step: int) -> float:
        """The learning rate of a method's parameters at a step, counted from 0."""
        given = self.learning_rate
        rate = given.get(method, LEARNING_RATES[method]) if isinstance(given, Mapping) else given
        rate = LEARNING_RATES[method] if rate is None else rate
        return scheduled(rate, step, self.steps, self.warmup, falls=self.schedule == "linear")


def parse_methods(method: str | Sequence[str]) -> tuple[str, ...]:
    """The methods named, in their usual order.

    Raises:
        ValueError: none, an unknown one, or one twice.
    """
    given = (method,) if isinstance(method, str) else tuple(method)
    if not given or len(set(given)) < len(given) or not set(given) <= set(METHODS):
        raise ValueError(f"method: got {given!r}, expected one or more of {', '.join(METHODS)}, each once")
    return tuple(name for name in METHODS if name in given)


def _are_rates(x: object) -> bool:
    return all(name in METHODS and above(0)(x[name]) for name in x) if isinstance(x, Mapping) else above(0)(x)


_WHOLE = (integer(1), "an integer of at least 1")
_WHOLE_OR_NONE = (or_none(integer(1)), "an integer of at least 1, or None")
_ABOVE = (above(0), "a number above 0")
_LEAST = (number(0), "a number of at least 0")
_FIELDS: Fields = {
    **dict.fromkeys(("steps", "batch_size", "rank", "prompt_tokens", "validate_every"), _WHOLE),
    **dict.fromkeys(("micro_batch", "patience"), _WHOLE_OR_NONE),
    **dict.fromkeys(("temperature", "clip_norm"), _ABOVE),
    **dict.fromkeys(("margin", "weight_decay", "save_every"), _LEAST),
    **dict.fromkeys(("shared_noise", "checkpointing"), (is_bool, "True or False")),
    "warmup": (integer(0), "an integer of at least 0"),
    "lora_dropout": (lambda x: number(0, 1)(x) and x < 1, "a share from 0 to below 1"),
    "seed": (integer(0, 2**32 - 1), "an integer from 0 to 2**32 - 1"),
    "loss": (one_of("cross-entropy", "margin"), "'cross-entropy' or 'margin'"),
    "schedule": (one_of("linear", "constant"), "'linear' or 'constant'"),
    "attention": (one_of("cross", "all"), "'cross' or 'all'"),
    "autocast": (one_of(None, "bfloat16", "float16"), "None, 'bfloat16' or 'float16'"),
    "learning_rate": (or_none(_are_rates), f"None, a number above 0, or one by method, of {', '.join(METHODS)}"),
    "timestep_range": (or_none(is_span), "(first, one past the last), or None"),
}
