"""Settings of a converter's tuning."""

from __future__ import annotations

from dataclasses import dataclass

from dsd_fast.engine.settings import Fields, above, check_fields, integer, is_bool, is_span, number, one_of, or_none
from dsd_fast.training.order import scheduled


@dataclass(frozen=True)
class TuneConfig:
    """How a converter and its model are tuned to images.

    No source that can be had says what SD-IPC was tuned with but for the deep prompts: 50 tokens a layer, dropout 0.1.
    Steps, batch, rates, ranks and all else are this package's own. The defaults are those of ``finetune``, for about a
    hundred images; those of ``customize``, for one or a few, are ``TuneConfig.few()``.

    Attributes:
        steps: of the optimiser, AdamW.
        batch_size: images a step, each with its own timestep and noise.
        attention: what is learned in the UNet: "lora", low-rank matrices on the keys and values of its cross-attention,
            which stock diffusers loads; "full", those matrices themselves; None, nothing.
        rank: of the LoRA, whose scale is 1.
        prompt_tokens: deep prompts at each layer of CLIP's image encoder; 0 learns none.
        prompt_dropout: share of their numbers that a step leaves out.
        learning_rate: of what is learned in the UNet.
        prompt_learning_rate: of the deep prompts.
        schedule: "linear" is constant for the first half of the steps and then falls to 0; "constant" stays.
        warmup: steps over which the rates rise to their values.
        weight_decay: AdamW's, of all but biases and norms.
        clip_norm: largest norm of the gradient of all parameters together.
        timestep_range: timesteps are drawn uniformly from this one up to, not including, that one; None: from all.
        validate_every: steps between records, and so between validations on the held-out images.
        patience: validations without a better one after which it stops; None never does.
        checkpointing: whether the UNet's activations are computed again for the gradient instead of kept: less memory,
            a third more time.
        save_every: seconds between checkpoints in the output folder.
        seed: of the first weights, of the order of the images, of timesteps, noise and dropout.

    Raises:
        ValueError: a value that is not allowed, by name.
    """

    steps: int = 300
    batch_size: int = 8
    attention: str | None = "lora"
    rank: int = 16
    prompt_tokens: int = 50
    prompt_dropout: float = 0.1
    learning_rate: float = 3e-3
    prompt_learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup: int = 10
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    timestep_range: tuple[int, int] | None = None
    validate_every: int = 50
    patience: int | None = None
    checkpointing: bool = False
    save_every: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, _FIELDS)
        if self.attention is None and not self.prompt_tokens:
            raise ValueError("prompt_tokens: got 0 with attention=None, expected something to learn")

    @classmethod
    def few(cls, steps: int = 30) -> TuneConfig:
        """Make the settings of ``customize``, for one or a few images."""
        return cls(steps=steps, schedule="constant", warmup=0)

    def rate(self, group: str, step: int) -> float:
        """The learning rate of "attention" or of "prompts" at a step, counted from 0."""
        rate = self.learning_rate if group.startswith("attention") else self.prompt_learning_rate
        return scheduled(rate, step, self.steps, self.warmup, falls=self.schedule == "linear")


_WHOLE = (integer(1), "an integer of at least 1")
_LEAST_WHOLE = (integer(0), "an integer of at least 0")
_ABOVE = (above(0), "a number above 0")
_LEAST = (number(0), "a number of at least 0")
_FIELDS: Fields = {
    **dict.fromkeys(("steps", "batch_size", "rank", "validate_every"), _WHOLE),
    **dict.fromkeys(("prompt_tokens", "warmup"), _LEAST_WHOLE),
    **dict.fromkeys(("learning_rate", "prompt_learning_rate", "clip_norm"), _ABOVE),
    **dict.fromkeys(("weight_decay", "save_every"), _LEAST),
    "attention": (one_of("lora", "full", None), "'lora', 'full' or None"),
    "prompt_dropout": (lambda x: number(0, 1)(x) and x < 1, "a share from 0 to below 1"),
    "schedule": (one_of("linear", "constant"), "'linear' or 'constant'"),
    "timestep_range": (or_none(is_span), "(first, one past the last), or None"),
    "patience": (or_none(integer(1)), "an integer of at least 1, or None"),
    "checkpointing": (is_bool, "True or False"),
    "seed": (integer(0, 2**32 - 1), "an integer from 0 to 2**32 - 1"),
}
