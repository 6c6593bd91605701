"""Settings of a :class:`~dsd_fast.class_tokens.ClassTokenLearner`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsd_fast.diffusion import SAMPLERS
from dsd_fast.engine.settings import (
    Fields,
    above,
    are_names,
    check_fields,
    integer,
    is_bool,
    is_scheduler,
    is_size,
    is_text,
    number,
    one_of,
    or_none,
)
from dsd_fast.engine.templates import check_templates

TEMPLATES = ("A photo of {}", "a high resolution realistic image of {}", "A close-up photo of a {}")
"""The official code's first three, which it takes in turn."""

LOSSES = ("cross-entropy", "noise")
STOPPING = ("official", "gamma", "never")
KEEP = ("best", "after-best", "last")


@dataclass(frozen=True)
class TokenConfig:
    """How class tokens are learned; the defaults but ``norm_clamp`` are the official code's.

    Schwartz et al. 2023, "Discriminative Class Tokens for Text-to-Image Diffusion Models", with the code
    idansc/discriminative_class_tokens; Fu et al. 2024, "DIG-ZSL".

    Attributes:
        templates: texts with one "{}" or "{class}" each, where the token stands; an update's images take them in turn,
            in an order that the class and the update draw, or so many of them as there are images.
        class_name: whether the class's name follows the token in a text, "<cardinal> cardinal".
        token: what a token is called; "{}" is the class's name, of which blanks and "_" become "-". One class alone can
            do without.
        vectors: of each token.
        initial: words whose vectors' mean a token begins as, or, where they are as many as its vectors, one each; "{}"
            in it is the class's name. Of several such each class begins as those in whose images the guide sees it
            most, the mean probability of ``compared`` images of one noise for all: from where a class is never seen the
            gradient may lead to another. With the noise loss as those by which it loses least.
        compared: images made with each of several initial words.
        restart_after: updates of which the guide has taken no image for the class, after which it begins anew, as the
            next best of its initial words; None: never.
        loss: "cross-entropy" of the guide's outputs / temperature, which is DIG-ZSL's loss where they are cosines; or
            "noise", the plain noise loss on given images, as textual inversion has it (Gal et al. 2022).
        temperature: that the guide's outputs are divided by.
        images: of a class in one update, whose mean loss is learned from.
        steps, guidance, scheduler, image_size: of the images, see :class:`~dsd_fast.generation.GenerateConfig`.
        gradient_steps: how many of the network's last calls the gradient goes through.
        noise: "fixed": each update begins at the same ``images`` latents, the same for all classes; "fresh": at new
            ones. Either depends on the seed alone, and fresh noise on the class and its update too.
        learning_rate, betas, eps, weight_decay: of AdamW, for the learned vectors alone.
        clip_norm: largest norm of a token's gradient; None does not clip.
        norm_clamp: largest norm of a vector after an update, as a multiple of the vocabulary's mean norm; None, as
            officially, does not clamp.
        stopping: "official": after an update in which more than ``accuracy`` of the images were right, or after more
            than ``patience`` updates without a lower loss; "gamma": once the class's mean probability is at least
            ``gamma``; "never": after ``updates``, which holds for all. None: "official", or "never" for the noise loss,
            which is another one at each update's timesteps.
        accuracy, patience, gamma, updates: see there.
        keep: "best": the vectors whose loss was the lowest; "after-best": what the optimiser made of those, which the
            official code keeps; "last". None: "best", or "last" for the noise loss.
        pooled: where SDXL's second encoder takes its pooled state of a text with learned tokens: "stock", as
            transformers does, which is at a learned token where the encoder's config has the old end token; "end", at
            the end token.
        together: classes learned side by side; None: as many as fill the memory budget.
        checkpointing: whether activations of the network are computed again for the gradient: less memory, more time.
        save_every: seconds between checkpoints in the output folder.
        seed: of noise and orders.
        adapter: names of the adapters active in the networks, () for none; None leaves the model as it stands.
        memory_budget: bytes, see :meth:`dsd_fast.unet.plan.Plan.stream`.

    Raises:
        ValueError: a value outside its range, by name.
    """

    templates: tuple[str, ...] = TEMPLATES
    class_name: bool = True
    token: str = "<{}>"
    vectors: int = 1
    initial: str | tuple[str, ...] = "a"
    compared: int = 8
    restart_after: int | None = None
    loss: str = "cross-entropy"
    temperature: float = 1.0
    images: int = 5
    steps: int = 30
    guidance: float = 7.0
    scheduler: str | Any | None = None
    image_size: tuple[int, int] | None = None
    gradient_steps: int = 2
    noise: str = "fixed"
    learning_rate: float = 1.25e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = None
    norm_clamp: float | None = 1.5
    stopping: str | None = None
    accuracy: float = 0.7
    patience: int = 15
    gamma: float = 0.9
    updates: int = 50
    keep: str | None = None
    pooled: str = "stock"
    together: int | None = None
    checkpointing: bool = False
    save_every: float = 60.0
    seed: int = 35
    adapter: str | tuple[str, ...] | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.templates, str):
            object.__setattr__(self, "templates", (self.templates,))
        check_fields(self, FIELDS)
        noise = self.loss == "noise"
        if noise and self.stopping not in (None, "never"):
            raise ValueError(f"stopping: got {self.stopping!r} for the noise loss, expected 'never'")
        if noise and self.restart_after is not None:
            raise ValueError(f"restart_after: got {self.restart_after} for the noise loss, expected None")
        if self.restart_after is not None and (isinstance(self.initial, str) or len(self.initial) < 2):
            raise ValueError(f"restart_after: got {self.restart_after}, expected None with one initial alone")
        for name, value in (("stopping", "never" if noise else "official"), ("keep", "last" if noise else "best")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


def are_templates(x: object) -> bool:
    """Allow texts with a place for a class each."""
    try:
        return isinstance(x, tuple) and bool(check_templates(x))
    except ValueError:
        return False


def _are_initial(x: object) -> bool:
    words = (x,) if isinstance(x, str) else x
    return isinstance(words, tuple) and bool(words) and all(is_text(each) and bool(each.strip()) for each in words)


def _are_betas(x: object) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and all(number(0, 1)(each) and each < 1 for each in x)


FIELDS: Fields = {
    "templates": (are_templates, 'texts with one "{}" or "{class}" each'),
    "class_name": (is_bool, "True or False"),
    "token": (lambda x: is_text(x) and x.count("{}") <= 1, 'a text with at most one "{}"'),
    "vectors": (integer(1), "an integer of at least 1"),
    "initial": (_are_initial, "words, or a tuple of them"),
    "compared": (integer(1), "an integer of at least 1"),
    "restart_after": (or_none(integer(1)), "an integer of at least 1, or None"),
    "loss": (one_of(*LOSSES), f"one of {', '.join(LOSSES)}"),
    "temperature": (above(0), "a number above 0"),
    "images": (integer(1), "an integer of at least 1"),
    "steps": (integer(1), "an integer of at least 1"),
    "guidance": (number(0, 1e6), "a finite number of at least 0"),
    "scheduler": (or_none(is_scheduler), f"one of {', '.join(SAMPLERS)}, a diffusers scheduler, or None"),
    "image_size": (or_none(is_size), "(height, width) in pixels, or None"),
    "gradient_steps": (integer(1), "an integer of at least 1"),
    "noise": (one_of("fixed", "fresh"), "'fixed' or 'fresh'"),
    "learning_rate": (above(0), "a number above 0"),
    "betas": (_are_betas, "two numbers from 0 to below 1"),
    "eps": (above(0), "a number above 0"),
    "weight_decay": (number(0), "a number of at least 0"),
    "clip_norm": (or_none(above(0)), "a number above 0, or None"),
    "norm_clamp": (or_none(above(0)), "a number above 0, or None"),
    "stopping": (one_of(None, *STOPPING), f"one of {', '.join(STOPPING)}, or None"),
    "accuracy": (number(0, 1), "a number from 0 to 1"),
    "patience": (integer(0), "an integer of at least 0"),
    "gamma": (number(0, 1), "a number from 0 to 1"),
    "updates": (integer(1), "an integer of at least 1"),
    "keep": (one_of(None, *KEEP), f"one of {', '.join(KEEP)}, or None"),
    "pooled": (one_of("stock", "end"), "'stock' or 'end'"),
    "together": (or_none(integer(1)), "an integer of at least 1, or None"),
    "checkpointing": (is_bool, "True or False"),
    "save_every": (number(0), "a number of at least 0"),
    "seed": (integer(0, 2**64 - 1), "an integer from 0 to 2**64 - 1"),
    "adapter": (or_none(are_names), "a name, a tuple of names, or None"),
    "memory_budget": (or_none(integer(1)), "a number of bytes, or None"),
}
