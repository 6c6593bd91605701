"""Options of ``dsd-fast generate``."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsd_fast.cli.feature_options import ControlOptions
from dsd_fast.cli.groups import Options
from dsd_fast.cli.options import (
    AdaptedModelOptions,
    MemoryOptions,
    ModelOptions,
    WorkerOptions,
    parse_bytes,
    parse_image_size,
)
from dsd_fast.cli.terminal import CommandError

if TYPE_CHECKING:
    from dsd_fast.generation.accept import Accept
    from dsd_fast.models import Model
    from dsd_fast.models.controlnet import Control


def parse_seeds(text: str | None) -> int | range | tuple[int, ...] | None:
    """Reads a seed, seeds separated by commas, or a range without its end: 7, 1,2,3, 0:100; None stays None."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if found is not None:
        seeds = range(int(found[1]), int(found[2]))
        if not seeds:
            raise ValueError(f"--seeds: {text!r} is an empty range, expected for instance 0:100")
        return seeds
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--seeds: {text!r} is no seed, expected for instance 7, 1,2,3 or 0:100")
    return int(parts[0]) if len(parts) == 1 else tuple(int(part) for part in parts)


def parse_interval(text: str | None) -> tuple[float, float | None] | None:
    """Reads two noise levels: 0.3,5; or one, from which on: 0.3, (with a comma after it); None stays None."""
    if text is None:
        return None
    try:
        low, high = text.split(",")
        return float(low), float(high) if high.strip() else None
    except ValueError:
        raise ValueError(
            f"--guidance-interval: {text!r} is no interval of noise levels, expected for instance 0.3,5 or 0.3,"
        ) from None


class RowOptions(Options, panel="Rows"):
    """What images are made of, beside the prompts of the command line."""

    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A .txt with a prompt on each line; or a .csv, .jsonl or .parquet with a column prompt, and perhaps "
            "seed, negative_prompt, height, width, steps, guidance, image, label and others.",
        ),
    ] = None
    image_prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE|FOLDER", help="Images as prompts, as dsd-fast prompt convert writes them."),
    ] = None
    negative_image_prompt: Annotated[
        Path | None,
        typer.Option(metavar="FILE|FOLDER", help="One image as a prompt, in the place of the absent prompt."),
    ] = None
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Of the table, left out; repeat for more.")
    ] = None
    template: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help='A prompt with {} for the class, as "a photo of a {}"; repeat for more.'),
    ] = None
    class_name: Annotated[
        list[str] | None, typer.Option("--class", metavar="NAME", help="A class of the templates; repeat for more.")
    ] = None
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The classes, one on each line, instead of --class.")
    ] = None
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            "--seed",
            metavar="N|N,N,…|A:B",
            help="Each prompt with each of these, 0 to 2**64 - 1; 0, or what the file says, if none.",
        ),
        parse_seeds,
    ] = None
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Images are started from this one, see --strength.")
    ] = None
    condition: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What the ControlNets are shown: for each --control one, in their order."),
    ] = None


class SamplingOptions(Options, panel="Sampling"):
    """The settings of a :class:`dsd_fast.GenerateConfig` under their names; what a row says itself counts before."""

    steps: Annotated[int, typer.Option(help="Of the scheduler.")] = 50
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; up to 1 there is none.")] = 7.5
    guidance_rescale: Annotated[float, typer.Option(help="φ of Lin et al. 2024, 0 to 1.")] = 0.0
    negative_prompt: Annotated[str | None, typer.Option(help="In the place of the absent prompt.")] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="ddim, pndm, euler, euler-a, dpm++2m, dpm++2m-karras, dpm++2m-sde, dpm++2m-sde-karras, unipc or lcm; "
            "the model's own if none.",
        ),
    ] = None
    eta: Annotated[float, typer.Option(help="Of ddim, 0 to 1.")] = 0.0
    strength: Annotated[float, typer.Option(help="Of images that are started from, above 0 to 1.")] = 0.8
    image_size: Annotated[
        str | None,
        typer.Option(metavar="H[xW]", help="Pixels; the model's own if none."),
        parse_image_size,
    ] = None
    clip_skip: Annotated[
        int | None, typer.Option(help="Layers left out at the text encoder's end, as diffusers counts them.")
    ] = None
    noise: Annotated[
        str,
        typer.Option(
            metavar="dsd_fast|diffusers",
            help="By (seed, step); or what a stock diffusers pipeline draws for a seed.",
        ),
    ] = "dsd_fast"
    guidance_interval: Annotated[
        str | None,
        typer.Option(metavar="LOW,[HIGH]", help="Guidance only at noise levels σ between these; everywhere if none."),
        parse_interval,
    ] = None
    cache_interval: Annotated[
        int, typer.Option(metavar="N", help="The whole network at every N-th step, its shallow part between them.")
    ] = 1
    cache_branch_id: Annotated[int, typer.Option(help="How deep that shallow part is, 0 the least.")] = 0

    def config(self, memory: MemoryOptions) -> dict[str, Any]:
        """Tells the fields of the configuration that the options stand for.

        Raises:
            ValueError: text that is no value of its option, by name.
        """
        # Before torch is loaded for nothing.
        return {**self.values(), "memory_budget": parse_bytes(memory.memory_budget)}


class AcceptanceOptions(Options, panel="Acceptance"):
    """Which images are kept."""

    accept: Annotated[
        str | None,
        typer.Option(
            metavar="clip|zero-shot|NAME",
            help="Keep an image that the model's CLIP finds like its prompt; or of whose class CLIP is sure among "
            "--class; or an image classifier, a folder or hub id.",
        ),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="Least cosine (clip, which needs one), or probability of the class; none: the class comes first.",
        ),
    ] = None
    per_class: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Make N of each class; their seeds follow from --seed.")
    ] = None
    max_tries: Annotated[int, typer.Option(min=1, help="Of an image, until one is accepted.")] = 10
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="COSINE",
            help="By CLIP: reject a try that is so near to an earlier one, and mark images of a class that are.",
        ),
    ] = None

    def needs_classes(self) -> bool:
        """Tells whether images are made, or judged, by class."""
        return self.per_class is not None or self.accept not in (None, "clip")

    def check(self) -> None:
        """Refuses options that do not go together.

        Raises:
            CommandError: by option.
        """
        if self.accept is None and self.threshold is not None:
            raise CommandError("--threshold: given without --accept")
        if self.accept == "clip" and self.threshold is None:
            raise CommandError("--accept clip needs --threshold, the least cosine")
        if self.accept is None and "--max-tries" in self.changed():
            raise CommandError("--max-tries: given without --accept")

    def load(self, model: "Model", classes: Sequence[str], source: ModelOptions) -> "Accept | None":
        """Loads what judges images, on the model's device.

        Raises:
            ModelError, ValueError: no classifier, or one without the classes.
        """
        if self.accept is None:
            return None
        from dsd_fast.generation.accept import AcceptClip
        from dsd_fast.generation.guides import AcceptClassifier, AcceptZeroShot

        if self.accept == "clip":
            return AcceptClip(model, self.threshold or 0.0)
        if self.accept == "zero-shot":
            return AcceptZeroShot(model, classes, self.threshold or 0.0)
        return AcceptClassifier(
            self.accept,
            classes,
            self.threshold or 0.0,
            device=model.device,
            local_files_only=source.local_files_only,
        )


class FileOptions(Options, panel="Files"):
    """How the images are written, and what is shown of them."""

    layout: Annotated[str, typer.Option(metavar="webdataset|parquet|folder", help="Of the files.")] = "webdataset"
    format: Annotated[str, typer.Option(metavar="png|jpg|webp", help="Of the images.")] = "png"
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="Of jpg and webp.")] = None
    no_mark: Annotated[
        bool,
        typer.Option("--no-mark", help="Leave out what says in each image that a model made it, which, and its seed."),
    ] = False
    shard_rows: Annotated[int, typer.Option(min=1, help="Images that become whole files together.")] = 256
    batch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Images computed together; what fills the budget if none."),
    ] = None
    report: Annotated[bool, typer.Option("--report", help="Write report.html, a page to look at.")] = False
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try rows again that were errors.")] = False


class ShownControlOptions(ControlOptions):
    """ControlNets, and how they are shown their pictures."""

    control: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help='A ControlNet: "mini", a folder or a hub id; repeat for more.'),
    ] = None
    canny: Annotated[
        bool,
        typer.Option("--canny/--no-canny", help="Show them the Canny edges of --condition, or the picture itself."),
    ] = True

    def load(self, model: "Model", source: ModelOptions) -> "tuple[Control, ...]":
        """Loads the ControlNets as :class:`ControlOptions` does."""
        controls = super().load(model, source)
        return controls if self.canny else tuple(replace(control, condition=None) for control in controls)


class LearnedModelOptions(AdaptedModelOptions):
    """A model, perhaps a LoRA, and perhaps learned tokens."""

    tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE|FOLDER", help="Learned tokens (textual inversion), .safetensors, that prompts use."),
    ] = None

    def check(self) -> None:
        """Checks as :class:`AdaptedModelOptions` does, and that the tokens are there."""
        super().check()
        if self.tokens is not None and not self.tokens.exists():
            raise CommandError(f"--tokens: {self.tokens} does not exist")

    def load(self) -> "Model":
        """Loads the model and its adapter, and views it with the tokens."""
        model = super().load()
        return model if self.tokens is None else model.with_tokens(self.tokens)


class GenerateRequest(Options):
    """What is made, and how."""

    texts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]…", help="Prompts.", show_default=False)] = None
    out: Annotated[Path, typer.Option(help="Folder of the results, this job's alone.", show_default=False)]
    row: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Make one image of the folder again, from its row alone, and compare it with the file."
        ),
    ] = None
    rows: RowOptions
    sampling: SamplingOptions
    controls: ShownControlOptions
    acceptance: AcceptanceOptions
    files: FileOptions
    workers: WorkerOptions
    source: LearnedModelOptions
    memory: MemoryOptions
