"""Options of models, scores and memory that several commands share, and how their values are read."""

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from dsd_fast.cli.groups import Options
from dsd_fast.cli.terminal import CommandError, printable

if TYPE_CHECKING:
    from dsd_fast.features import FeatureExtractor
    from dsd_fast.matching import MatchConfig, Matcher
    from dsd_fast.models import Model

    Method = TypeVar("Method", Matcher, FeatureExtractor)

MODEL_PANEL = "Model"
SCORE_PANEL = "Score"
MEMORY_PANEL = "Memory and time"
WORKER_PANEL = "Workers"

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str | None) -> int | None:
    """Reads a size: 512MB (powers of 1000), 2GiB (powers of 1024), or a number of bytes; None stays None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"--memory-budget: {text!r} is no size, expected for instance 512MB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2]])


def parse_timesteps(text: str) -> int | list[int]:
    """Reads a count, or timesteps separated by commas; one timestep with a comma after it is a list."""
    try:
        if "," not in text:
            return int(text)
        given = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--timesteps: {text!r} is neither a count nor timesteps separated by commas") from None
    return check_timesteps(text, given)


def check_timesteps(text: str, timesteps: list[int]) -> list[int]:
    """Refuses those that no schedule has."""
    if not timesteps or min(timesteps) < 0:
        raise ValueError(f"--timesteps: got {text!r}, expected at least one, and none below 0")
    return timesteps


def parse_pool(text: str) -> str | float:
    """Reads mean, max, or a temperature."""
    if text in ("mean", "max"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--pool: {text!r} is neither mean, max nor a temperature") from None


def parse_image_size(text: str | None) -> tuple[int, int] | None:
    """Reads one side of a square, or height and width: 512, 512x768; None stays None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise ValueError(f"--image-size: {text!r} is no size, expected for instance 512 or 512x768 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def parse_layers(given: Sequence[str] | None) -> str | tuple[str, ...]:
    """Reads the `layers` of a :class:`dsd_fast.MatchConfig`: score ids, "all", or "official" where none is given."""
    if not given:
        return "official"
    if "all" not in given:
        return tuple(given)
    if len(given) > 1:
        raise ValueError(f"--layer: all is every cross-attention, expected it alone, got {', '.join(given)}")
    return "all"


# Those that a command may have without the rest of their group.
Device = Annotated[str, typer.Option(rich_help_panel=MODEL_PANEL, help="cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(rich_help_panel=MODEL_PANEL, help="Of the networks: float32, float16, bfloat16 or float64.")
]
Timesteps = Annotated[
    str,
    typer.Option(
        rich_help_panel=SCORE_PANEL,
        metavar="N|T,T,…",
        help="How many, on the official grid; or which, separated by commas.",
    ),
    parse_timesteps,
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MEMORY_PANEL,
        help="For activations and text keys, e.g. 512MB or 2GiB; the device's if none.",
    ),
]


class ModelOptions(Options, panel=MODEL_PANEL):
    """A model, and how it is loaded."""

    model: Annotated[str, typer.Option(help='"mini", a hub id, a diffusers folder, or a .safetensors file.')] = "mini"
    model_config: Annotated[
        str | None, typer.Option(help="Hub id or folder with the configuration of a model of one file.")
    ] = None
    device: Device = "cpu"
    dtype: Dtype = "float32"
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None
    variant: Annotated[str | None, typer.Option(help="Variant of the weight files, e.g. fp16.")] = None
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", "--offline", help="Take hub ids from the cache alone.")
    ] = False

    def check(self) -> None:
        """Refuses what cannot be loaded, whatever the model is; it is called before one is.

        Raises:
            CommandError, ModelError: by option, or by what it names.
        """
        from dsd_fast.models.load import resolve_device, resolve_dtype

        resolve_dtype(self.dtype)
        resolve_device(self.device)

    def arguments(self) -> dict[str, Any]:
        """Tells the arguments of :func:`dsd_fast.load` beside the model."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "revision": self.revision,
            "variant": self.variant,
            "config": self.model_config,
            "local_files_only": self.local_files_only,
        }

    def load(self) -> "Model":
        """Calls :func:`dsd_fast.load`, announced on stderr, for a command that computes with :func:`exact_products`.

        A type that the processor has no units for is told there, too.

        Raises:
            CommandError: a file that cannot be read.
            ModelError, ValueError: no such model, or a setting that is not allowed.
        """
        from dsd_fast.models import load
        from dsd_fast.models.processor import slow_on

        quiet_transformers()
        exact_products()
        console = Console(stderr=True, style="dim", markup=False, highlight=False, soft_wrap=True)
        # Not a live display: the hub's own progress bars may follow.
        console.print(f"loading {printable(self.model)}")
        try:
            model = load(self.model, **self.arguments())
        except OSError as error:
            raise CommandError(f"model {self.model!r} cannot be read: {error}") from error
        slow = slow_on(model.dtype, model.device)
        if slow is not None:
            console.print(f"{slow} (--dtype float32)")
        return model


class AdaptedModelOptions(ModelOptions):
    """A model, and perhaps a LoRA, which is active in it under the name "adapter"."""

    adapter: Annotated[
        str | None, typer.Option(help='A LoRA: "mini", a .safetensors file, folder (PEFT\'s too) or hub id.')
    ] = None
    adapter_file: Annotated[str | None, typer.Option(help="Which file, where --adapter has several.")] = None

    def check(self) -> None:
        """Checks the model's options as :class:`ModelOptions` does, and finds the adapter's file."""
        super().check()
        if self.adapter is None and self.adapter_file is not None:
            raise CommandError("--adapter-file: given without --adapter")
        if self.adapter is not None:
            from dsd_fast.models.lora import find_lora

            find_lora(self.adapter, self.adapter_file, local_files_only=self.local_files_only)

    def load(self) -> "Model":
        """Loads the model as :class:`ModelOptions` does, and its adapter."""
        model = super().load()
        if self.adapter is not None:
            model.load_lora(self.adapter, "adapter", self.adapter_file)
        return model


class ScoreOptions(Options, panel=SCORE_PANEL):
    """The settings of a :class:`dsd_fast.MatchConfig` under their names, but for the memory budget."""

    timesteps: Timesteps = "10"
    draws: Annotated[int, typer.Option(help="Noise draws per timestep.")] = 1
    seed: Annotated[int, typer.Option(help="Of the score's noise.")] = 0
    attention_weight: Annotated[float, typer.Option(help="Of the cross-attention term.")] = 0.5
    noise_weight: Annotated[float, typer.Option(help="Of the noise-prediction term.")] = 1.0
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            metavar="ID|all",
            help="A score id to read, repeat for more; or all, every cross-attention. The official ones if not given.",
        ),
        parse_layers,
    ] = None
    tokens: Annotated[str, typer.Option(metavar="all|real", help="Text tokens that are scored.")] = "all"
    pool: Annotated[
        str, typer.Option(metavar="mean|max|τ", help="Pooling over positions; τ is a temperature."), parse_pool
    ] = "mean"
    official: Annotated[bool, typer.Option("--official", help="The official code's score to the last digit.")] = False
    image_size: Annotated[
        str | None,
        typer.Option(metavar="H[xW]", help="Pixels to resize to; the model's own if none."),
        parse_image_size,
    ] = None

    def config(self, memory: "MemoryOptions") -> "MatchConfig":
        """Makes the configuration that the options stand for.

        Raises:
            ValueError: text that is no value of its option, or a value that is not allowed, by name.
        """
        # Before torch is loaded for nothing.
        settings = self.values() | {"memory_budget": parse_bytes(memory.memory_budget)}
        from dsd_fast.matching import MatchConfig

        return MatchConfig(**settings)


class MemoryOptions(Options, panel=MEMORY_PANEL):
    """How the network runs."""

    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="inductor|cudagraph",
            help="Compile the network, which takes minutes at first; for many images or steps.",
        ),
    ] = None
    memory_budget: MemoryBudget = None

    def check(self, device: str) -> None:
        """Refuses a runtime that a network on ``device`` cannot have, before there is one.

        Raises:
            ValueError: it is unknown, or of other devices.
        """
        if self.runtime is not None:
            import torch

            from dsd_fast.unet.runtime import check_runtime

            check_runtime(self.runtime, torch.device(device))

    def compiled(self, method: "Method") -> "Method":
        """Compiles a matcher or extractor if a runtime is asked for."""
        return method if self.runtime is None else method.compile(self.runtime)


class WorkerOptions(Options, panel=WORKER_PANEL):
    """Who makes which rows of a job: one of several processes that the user starts, or all of them, by Ray."""

    worker: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Which of --workers this process is, from 0; auto: as torchrun or SLURM numbers it. 0 if none.",
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes that share the job; you start each, or --engine ray does. 1 if none.", metavar="N"
        ),
    ] = None
    engine: Annotated[
        str | None, typer.Option(metavar="ray", help="Start the workers by Ray, here or on a cluster.")
    ] = None
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster: auto, or host:port; a Ray on this machine, for this run, if none."),
    ] = None
    partitions: Annotated[
        int | None,
        typer.Option(min=1, metavar="P", help="Parts of the job that Ray's workers take in turn; four each if none."),
    ] = None
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, metavar="G", help="GPUs of each of Ray's workers; 0 if none.")
    ] = None

    def check(self, device: str) -> None:
        """Refuses options that do not go together, or not with the device of the networks.

        Raises:
            CommandError: by option.
        """
        if self.engine is None:
            for name in ("address", "partitions", "gpus_per_worker"):
                if getattr(self, name) is not None:
                    raise CommandError(f"--{name.replace('_', '-')}: given without --engine ray")
            self.share()
        elif self.engine != "ray":
            raise CommandError(f"--engine: got {self.engine!r}, expected ray")
        elif self.worker is not None:
            raise CommandError("--worker: given with --engine ray, which numbers the workers itself")
        elif bool(self.gpus_per_worker) != device.startswith("cuda"):
            given = f"--gpus-per-worker: got {self.gpus_per_worker or 0:g} with --device {device}"
            raise CommandError(f"{given}, expected GPUs for cuda, and none for cpu")

    def share(self) -> tuple[int, int]:
        """Tells which worker of how many this process is: (worker, workers).

        Raises:
            CommandError: `worker` is no number below `workers`; or it is "auto" and the environment does not tell, or
                tells another number than `workers`.
        """
        if self.worker == "auto":
            return _share_of_environment(self.workers)
        workers = self.workers or 1
        if self.worker is not None and not re.fullmatch("[0-9]+", self.worker):
            raise CommandError(f"--worker: got {self.worker!r}, expected a number from 0, or auto")
        if (worker := int(self.worker or 0)) >= workers:
            raise CommandError(f"--worker: got {worker}, expected below --workers, {workers}")
        return worker, workers


def _share_of_environment(expected: int | None) -> tuple[int, int]:
    """What torchrun, or else SLURM's srun, has written into the environment of each process that it started."""
    pairs = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
    names = next((pair for pair in pairs if all(name in os.environ for name in pair)), None)
    if names is None:
        texts = " nor ".join(f"{rank} and {size}" for rank, size in pairs)
        raise CommandError(f"--worker auto: neither {texts} are in the environment, expected torchrun or srun")
    if names[0] != "RANK" and "SLURM_ARRAY_TASK_ID" in os.environ:
        # Each task of an array counts its own processes, from 0; and an array submitted again in part counts fewer.
        raise CommandError(
            "--worker auto: this is a task of a SLURM array, expected --worker $SLURM_ARRAY_TASK_ID and --workers"
        )
    rank, size = (os.environ[name] for name in names)
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise CommandError(f"--worker auto: {names[0]} is {rank!r} and {names[1]} {size!r}, expected a number below")
    if expected not in (None, int(size)):
        raise CommandError(f"--workers: got {expected}, expected {size}, as {names[1]} says, or none")
    return int(rank), int(size)


def quiet_transformers() -> None:
    """Silences transformers, which warns about each image processor that a pipeline imports and nothing here uses."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def exact_products() -> None:
    """Gives what a command calls float32 IEEE products on a GPU too, where cuDNN's convolutions would take TF32."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
