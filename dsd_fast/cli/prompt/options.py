"""Options of ``dsd-fast prompt``."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsd_fast.cli.feature_options import Images
from dsd_fast.cli.fit.options import parse_range
from dsd_fast.cli.groups import Options
from dsd_fast.cli.match.captions import read_captions
from dsd_fast.cli.options import MEMORY_PANEL, AdaptedModelOptions, WorkerOptions
from dsd_fast.cli.terminal import CommandError

if TYPE_CHECKING:
    from dsd_fast.cli.images import ImageFiles
    from dsd_fast.generation import GenerateConfig
    from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter, TuneConfig


def parse_captions(text: str | None) -> str | tuple[str, ...] | None:
    """Reads the name of a set, or the lines of a .txt file; None stays None."""
    return text if text is None or not text.endswith(".txt") else tuple(read_captions(Path(text)))


def parse_attention(text: str) -> str | None:
    """Reads what is learned of the network; none is None."""
    return None if text == "none" else text


class TunedModelOptions(AdaptedModelOptions):
    """A model, the CLIP that sees the images, and perhaps what both were tuned to."""

    clip: Annotated[
        str | None,
        typer.Option(
            help="The CLIP that sees the images: a folder or hub id, as openai/clip-vit-large-patch14; the model's own "
            "if none."
        ),
    ] = None
    tuned: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of dsd-fast prompt finetune or customize, to convert with, or to go on tuning."
        ),
    ] = None

    def check(self) -> None:
        """Checks as :class:`AdaptedModelOptions` does, and that CLIP's folder and the tuned one are there."""
        super().check()
        from dsd_fast.models.hub import local_folder

        if self.clip is not None:
            local_folder(self.clip, "clip")
        if self.tuned is not None:
            from dsd_fast.image_prompt.files import read_about

            read_about(self.tuned)

    def arguments(self) -> dict[str, Any]:
        """Tells the arguments of :func:`dsd_fast.load`, CLIP among them."""
        return {**super().arguments(), "clip": self.clip}

    def load_converter(self, config: "ImagePromptConfig") -> "ImagePromptConverter":
        """Loads the model, and makes its converter, or that of the tuned folder.

        Raises:
            ModelError, ValueError: no such model or CLIP, or settings that do not fit them.
        """
        from dsd_fast.image_prompt import ImagePromptConverter

        model = self.load()
        if self.tuned is None:
            return ImagePromptConverter(model, config=config)
        return ImagePromptConverter.load(self.tuned, model)


class ConverterOptions(Options, panel="Conversion"):
    """How an image becomes a vector: the settings of a :class:`dsd_fast.ImagePromptConfig` under their names."""

    inverse: Annotated[
        str,
        typer.Option(
            metavar="truncated|ridge|prior",
            help="Of CLIP's text projection: without small singular values, as officially; with a ridge; or as states "
            "of captions are spread.",
        ),
    ] = "truncated"
    cut: Annotated[
        float | None,
        typer.Option(
            help="A singular value; officially 0.3, which truncated takes for CLIP-L; else as captions say, if none."
        ),
    ] = None
    norm: Annotated[
        float | None,
        typer.Option(help="Of the vectors; 27.5 for CLIP-L as officially, else the captions' mean, if none."),
    ] = None
    captions: Annotated[
        str | None,
        typer.Option(
            metavar="things|scenes|FILE.txt",
            help="Texts that say what --cut and --norm leave open: a set by name, or one on each line; the model's own "
            "if none.",
        ),
        parse_captions,
    ] = None
    batch: Annotated[int, typer.Option(rich_help_panel=MEMORY_PANEL, help="Images that go through CLIP together.")] = 16

    def config(self, source: TunedModelOptions) -> "ImagePromptConfig":
        """Makes the settings that the options stand for.

        Raises:
            CommandError: some, and a tuned folder, which has its own.
            ValueError: a value that is not allowed, by name.
        """
        if source.tuned is not None and (given := self.changed()):
            raise CommandError(f"{given[0]}: given with --tuned, whose folder says how images are converted")
        # Before torch is loaded for nothing.
        settings = self.values()
        from dsd_fast.image_prompt import ImagePromptConfig

        return ImagePromptConfig(**settings)


class TextOptions(Options, panel="Texts"):
    """The texts that images stand in."""

    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="One for all images, whose words stand before the image.")
    ] = ""
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A prompt for each image: .jsonl, .csv or .parquet with the columns image and prompt."
        ),
    ] = None

    def texts(self, files: "ImageFiles") -> str | list[str]:
        """Gives one prompt, or one for each image."""
        if self.prompts is None:
            return self.prompt
        from dsd_fast.cli.images import read_prompts

        return files.prompts(read_prompts(self.prompts))


class EditTextOptions(TextOptions):
    """The texts that images are edited by."""

    alpha: Annotated[
        float, typer.Option(help="How much of the text's own states is added from its end on; 0: its words alone.")
    ] = 0.6


class TuneOptions(Options, panel="Tuning"):
    """How CLIP and the network are tuned: the settings of a :class:`dsd_fast.TuneConfig` under their names."""

    steps: Annotated[int, typer.Option(help="Of the optimiser.")] = 300
    batch_size: Annotated[int, typer.Option(help="Images a step, each with a timestep and noise of its own.")] = 8
    attention: Annotated[
        str,
        typer.Option(
            metavar="lora|full|none",
            help="What is learned in the network: a LoRA on keys and values of its cross-attention, which stock "
            "diffusers loads; those matrices themselves; or nothing.",
        ),
        parse_attention,
    ] = "lora"
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 16
    prompt_tokens: Annotated[
        int, typer.Option(help="Learned tokens at each layer of CLIP's image encoder; 0: none.")
    ] = 50
    prompt_dropout: Annotated[float, typer.Option(help="Share of their numbers that a step leaves out.")] = 0.1
    learning_rate: Annotated[float, typer.Option(help="Of what is learned in the network.")] = 3e-3
    prompt_learning_rate: Annotated[float, typer.Option(help="Of the learned tokens.")] = 1e-3
    schedule: Annotated[
        str,
        typer.Option(metavar="linear|constant", help="Of the rates; linear falls to 0 over the second half."),
    ] = "linear"
    warmup: Annotated[int, typer.Option(help="Steps until the full rates.")] = 10
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01
    clip_norm: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0
    timestep_range: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Train on timesteps from A up to, not including, B; on all if none."),
        parse_range,
    ] = None
    validation: Annotated[
        list[Path] | None,
        typer.Option(metavar="IMAGE|DIR", help="Held-out images, by whose loss the best step is kept; repeat."),
    ] = None
    validate_every: Annotated[int, typer.Option(help="Steps between records, and looks at --validation.")] = 50
    patience: Annotated[int | None, typer.Option(help="Looks without a better one before it stops.")] = None
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", rich_help_panel=MEMORY_PANEL, help="Less memory, a third more time."),
    ] = False
    save_every: Annotated[float, typer.Option(rich_help_panel=MEMORY_PANEL, help="Seconds between checkpoints.")] = 60.0

    def tuning(self) -> "TuneConfig":
        """Makes the settings that the options stand for.

        Raises:
            ValueError: text that is no value of its option, or a value that is not allowed, by name.
        """
        # Before torch is loaded for nothing.
        settings = self.values()
        del settings["validation"]
        from dsd_fast.image_prompt import TuneConfig

        return TuneConfig(**settings)


class FewOptions(TuneOptions):
    """How it is tuned to a few images."""

    steps: Annotated[int, typer.Option(help="Of the optimiser.")] = 30
    prompt_tokens: Annotated[
        int, typer.Option(help="Learned tokens at each layer of CLIP's image encoder; 0: none.")
    ] = 0
    schedule: Annotated[
        str,
        typer.Option(metavar="linear|constant", help="Of the rates; linear falls to 0 over the second half."),
    ] = "constant"
    warmup: Annotated[int, typer.Option(help="Steps until the full rates.")] = 0


class PictureOptions(Options, panel="Pictures"):
    """What is shown of the first images: each beside its variations."""

    pictures: Annotated[
        int, typer.Option(min=0, metavar="N", help="Show the first N images beside variations of them; 0: none.")
    ] = 0
    variations: Annotated[int, typer.Option(min=1, metavar="K", help="Of each, with the seeds 0, 1, ….")] = 4
    sampling_steps: Annotated[int, typer.Option(help="Of the scheduler, for these.")] = 50
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; up to 1 there is none.")] = 7.5
    scheduler: Annotated[
        str | None, typer.Option(metavar="NAME", help="As of dsd-fast generate; the model's own if none.")
    ] = None
    report: Annotated[bool, typer.Option("--report", help="Write report.html, a page to look at.")] = False

    def sampling(self) -> "GenerateConfig":
        """Makes the settings of the variations.

        Raises:
            CommandError: some, and no pictures.
            ValueError: a value that is not allowed, by name.
        """
        if not self.pictures:
            given = [name for name in self.changed() if name not in ("--pictures", "--report")]
            if given:
                raise CommandError(f"{given[0]}: given without --pictures")
        from dsd_fast.generation import GenerateConfig

        return GenerateConfig(steps=self.sampling_steps, guidance=self.guidance, scheduler=self.scheduler)


class TunedPictureOptions(PictureOptions):
    """Pictures before and after tuning."""

    pictures: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Show the first N images beside variations of them, before and after."),
    ] = 4


class FileOptions(Options, panel="Files"):
    """How the prompts are written."""

    shard_rows: Annotated[int, typer.Option(min=1, help="Prompts that become a whole file together.")] = 256
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try images again that could not be used.")] = (
        False
    )


class ConvertRequest(Options):
    """Images, and how they become prompts."""

    images: Images
    out: Annotated[Path, typer.Option(help="Folder of the prompts, this job's alone.", show_default=False)]
    texts: TextOptions
    converter: ConverterOptions
    pictures: PictureOptions
    files: FileOptions
    workers: WorkerOptions
    source: TunedModelOptions

    @property
    def alpha(self) -> float:
        """Tells how much of the texts' own states is added from their ends on."""
        return self.texts.alpha if isinstance(self.texts, EditTextOptions) else 0.0

    def check(self) -> None:
        """Refuses options that do not go together.

        Raises:
            CommandError: by option.
        """
        if self.texts.prompt and self.texts.prompts is not None:
            raise CommandError("give either --prompt TEXT or --prompts FILE")
        if not math.isfinite(self.alpha):
            raise CommandError(f"--alpha: got {self.alpha}, expected a finite number")
        self.workers.check(self.source.device)


class EditRequest(ConvertRequest):
    """Images, and the texts that they are edited by."""

    texts: EditTextOptions


class FinetuneRequest(Options):
    """Images of a domain, and how a model is tuned to them."""

    images: Images
    out: Annotated[Path, typer.Option(help="Folder of what is learned and its checkpoints.", show_default=False)]
    tuning: TuneOptions
    converter: ConverterOptions
    pictures: TunedPictureOptions
    source: TunedModelOptions


class CustomizeRequest(FinetuneRequest):
    """One image or a few, and how a model is tuned to them."""

    tuning: FewOptions
