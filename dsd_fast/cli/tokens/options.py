"""Options of ``dsd-fast tokens``."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsd_fast.cli.groups import Options
from dsd_fast.cli.options import (
    MEMORY_PANEL,
    AdaptedModelOptions,
    MemoryOptions,
    ModelOptions,
    parse_bytes,
    parse_image_size,
)
from dsd_fast.cli.terminal import CommandError

if TYPE_CHECKING:
    from dsd_fast.class_tokens import TokenConfig


def parse_betas(text: str) -> tuple[float, ...]:
    """Reads the two numbers of AdamW: 0.9,0.999."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--betas: {text!r} is no pair of numbers, expected for instance 0.9,0.999") from None


def parse_limit(text: str, option: str) -> float | None:
    """Reads a number, or none, which is no limit."""
    if text.strip().lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is neither a number nor none") from None


def _limit(option: str) -> Callable[[str], float | None]:
    return partial(parse_limit, option=option)


class ClassOptions(Options, panel="Classes"):
    """What is learned, and what tells whether it is."""

    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The classes, one on each line, instead of CLASS.")
    ] = None
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="clip|FOLDER|HUB",
            help="What images are judged by: clip, the model's own on the classes' names; or an image classifier of "
            "transformers, a folder or hub id. Its outputs are found by the classes' names.",
        ),
    ] = None
    targets: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A .json: class → the classifier's output, a number from 0 or a label of another name."
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --loss noise: a folder of images for each class, by its name."),
    ] = None


class TextOptions(Options, panel="Texts and tokens"):
    """How a class is named; fields of a :class:`dsd_fast.TokenConfig`."""

    templates: Annotated[
        list[str] | None,
        typer.Option("--template", metavar="TEXT", help="A text with {} for the token; repeat. Three official ones."),
    ] = None
    class_name: Annotated[
        bool, typer.Option("--class-name/--no-class-name", help="Whether the class's name follows its token.")
    ] = True
    token: Annotated[str, typer.Option(metavar="TEXT", help="Of a class; {} is its name.")] = "<{}>"
    vectors: Annotated[int, typer.Option(help="Of each token.")] = 1
    initial: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORDS",
            help="A token begins as their mean, or one each; {} is the class's name. Repeat: as those in whose images "
            "the classifier sees the class most.",
            show_default="a",
        ),
    ] = None
    compared: Annotated[int, typer.Option(help="Images made with each of several initial words.")] = 8
    restart_after: Annotated[
        int | None,
        typer.Option(help="Updates without an image of the class, after which it begins anew, as the next best words."),
    ] = None
    pooled: Annotated[
        str,
        typer.Option(
            metavar="stock|end", help="Where SDXL's pooled state is taken: as transformers does, or at the end."
        ),
    ] = "stock"


class ImageOptions(Options, panel="Images"):
    """How an update's images are made; fields of a :class:`dsd_fast.TokenConfig`."""

    images: Annotated[int, typer.Option(help="Of a class in one update.")] = 5
    steps: Annotated[int, typer.Option(help="Of the scheduler.")] = 30
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; up to 1 there is none.")] = 7.0
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="As of dsd-fast generate; the model's own if none."),
    ] = None
    image_size: Annotated[
        str | None, typer.Option(metavar="H[xW]", help="Pixels; the model's own if none."), parse_image_size
    ] = None
    gradient_steps: Annotated[int, typer.Option(help="Last calls of the network that gradients go through.")] = 2
    noise: Annotated[
        str, typer.Option(metavar="fixed|fresh", help="Whether each update begins at the same noise, or at other.")
    ] = "fixed"


class LearningOptions(Options, panel="Learning"):
    """How a token is learned, and when it is done; fields of a :class:`dsd_fast.TokenConfig`."""

    loss: Annotated[
        str,
        typer.Option(
            metavar="cross-entropy|noise", help="Of the classifier; or the noise loss on --data (textual inversion)."
        ),
    ] = "cross-entropy"
    temperature: Annotated[float, typer.Option(help="The classifier's outputs are divided by it.")] = 1.0
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1.25e-3
    betas: Annotated[str, typer.Option(metavar="B,B", help="Of AdamW."), parse_betas] = "0.9,0.999"
    eps: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-8
    weight_decay: Annotated[float, typer.Option(help="Of AdamW, for the learned vectors alone.")] = 0.01
    clip_norm: Annotated[
        str, typer.Option(metavar="X|none", help="Largest norm of a token's gradient."), _limit("--clip-norm")
    ] = "none"
    norm_clamp: Annotated[
        str,
        typer.Option(
            metavar="X|none", help="Largest norm of a vector after an update, in the vocabulary's mean norms."
        ),
        _limit("--norm-clamp"),
    ] = "1.5"
    stopping: Annotated[
        str | None,
        typer.Option(
            metavar="official|gamma|never",
            help="At --accuracy or after --patience; at --gamma; or after --updates, which holds for all. Official if "
            "none, never for the noise loss.",
        ),
    ] = None
    accuracy: Annotated[float, typer.Option(help="Share of right images above which a class is done.")] = 0.7
    patience: Annotated[int, typer.Option(help="Updates without a lower loss.")] = 15
    gamma: Annotated[float, typer.Option(help="Mean probability of the class at which it is done.")] = 0.9
    updates: Annotated[int, typer.Option(help="At most.")] = 50
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="best|after-best|last",
            help="The vectors with the lowest loss, what the optimiser made of these, or the last. Best if none, last "
            "for the noise loss.",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of noise and orders.")] = 35


class TogetherOptions(Options, panel=MEMORY_PANEL):
    """How many classes are learned at once; fields of a :class:`dsd_fast.TokenConfig`."""

    together: Annotated[
        int | None, typer.Option(metavar="N", help="Classes side by side; as many as fit the memory if none.")
    ] = None
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, more time.")] = False
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0


class ShownModelOptions(ModelOptions):
    """The model whose words are near, if any."""

    model: Annotated[
        str,
        typer.Option(
            help='The model they were learned on, "mini" or as of other commands, for --words.', show_default=False
        ),
    ] = ""


# Options that are repeated, of which none means the settings' own.
_LISTS = ("templates", "initial")


class LearnRequest(Options):
    """Classes, what judges their images, and how tokens are learned."""

    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CLASS]…", help="Names of the classes.", show_default=False)
    ] = None
    out: Annotated[Path, typer.Option(help="Folder of the tokens and their checkpoints.", show_default=False)]
    pictures: Annotated[
        int, typer.Option(min=0, metavar="N", help="Pictures of each class without and with its token; 0: none.")
    ] = 4
    report: Annotated[bool, typer.Option("--report", help="Write report.html, a page to look at.")] = False
    what: ClassOptions
    texts: TextOptions
    sampling: ImageOptions
    learning: LearningOptions
    together: TogetherOptions
    memory: MemoryOptions
    source: AdaptedModelOptions

    def config(self) -> "TokenConfig":
        """Makes the settings that the options stand for.

        Raises:
            ValueError: text that is no value of its option, or a value that is not allowed, by name.
        """
        # Before torch is loaded for nothing.
        settings: dict[str, Any] = {"memory_budget": parse_bytes(self.memory.memory_budget)}
        for group in (self.texts, self.sampling, self.learning, self.together):
            settings = {**group.values(), **settings}
        settings = {name: value for name, value in settings.items() if name not in _LISTS or value is not None}
        from dsd_fast.class_tokens import TokenConfig

        return TokenConfig(**settings)

    def check(self) -> None:
        """Refuses options that do not go together.

        Raises:
            CommandError: by option.
        """
        what = self.what
        if self.names and what.classes is not None:
            raise CommandError("--classes: given with CLASS, expected one of them")
        if self.learning.loss == "noise":
            for name in ("classifier", "targets"):
                if getattr(what, name) is not None:
                    raise CommandError(f"--{name}: given with --loss noise, which nothing judges")
            if what.data is None:
                raise CommandError("--loss noise needs --data, a folder of images for each class")
        elif what.data is not None:
            raise CommandError("--data: given without --loss noise")
        elif what.classifier is None:
            raise CommandError("give a --classifier: clip, or an image classifier's folder or hub id")
        if not self.names and what.classes is None and what.data is None:
            raise CommandError("got no classes, expected CLASS, or --classes FILE")


class ShowRequest(Options):
    """Tokens to look at."""

    tokens: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of learned tokens.", show_default=False)]
    words: Annotated[
        int, typer.Option(min=0, metavar="N", help="Nearest words of each vector, with --model; 0: none.")
    ] = 3
    source: ShownModelOptions


class ExportRequest(Options):
    """Tokens, and where their files go."""

    tokens: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of learned tokens.", show_default=False)]
    out: Annotated[Path, typer.Option(help="Folder of the files, as embeddings/ of a program.", show_default=False)]
    names: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="A class, or token, that is written; repeat. All if none."),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same names.")] = False
