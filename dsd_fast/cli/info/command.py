"""``dsd-fast info``: what a model is made of, and what asking it costs."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsd_fast.cli.groups import Options, command
from dsd_fast.cli.options import ModelOptions, Timesteps, parse_timesteps
from dsd_fast.cli.terminal import CommandError, counted, printable, table


class InfoSource(ModelOptions):
    """The model, which is what is asked about."""

    model: Annotated[str, typer.Argument(help='"mini", a hub id, a diffusers folder, or a .safetensors file.')] = "mini"


class InfoRequest(Options):
    """A model, and perhaps a matching job."""

    layers: Annotated[bool, typer.Option("--layers", help="Print all layer ids with their shapes.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False
    images: Annotated[int | None, typer.Option(min=1, help="Images of a matching job to cost.")] = None
    captions: Annotated[int | None, typer.Option(min=1, help="Captions of that job.")] = None
    timesteps: Timesteps = "10"
    source: InfoSource


@command
def info(request: InfoRequest) -> None:
    """Show a model's components, its layers, and the cost of a plan.

    FLOPs count two per multiply-add of the UNet for one image at the model's own size; the VAE and the text encoder,
    which run once per image and once per caption, are not in them.
    """
    images, captions = request.images, request.captions
    if (images is None) != (captions is None):
        raise CommandError("give --images and --captions together, or neither")
    steps = parse_timesteps(request.timesteps)
    model = request.source.load()
    from dsd_fast.cli.info.costs import describe

    content = describe(model, None if images is None or captions is None else (images, captions, steps))
    if request.as_json:
        typer.echo(json.dumps(content, indent=2))
    else:
        _show(content, request.layers)


def _show(content: dict[str, Any], layers: bool) -> None:
    console = Console()
    revision = f" at {content['revision']}" if content["revision"] else ""
    height, width = content["image_size"]
    channels, rows, columns = content["latent_shape"]
    schedule = content["schedule"]
    lines = [
        f"{content['model']}{revision}, family {content['family']}",
        f"images {height} x {width} pixels, latents {channels} x {rows} x {columns}",
        f"prompts up to {content['tokens']} tokens",
        f"{schedule['class']}: {schedule['timesteps']} timesteps, prediction type {schedule['prediction_type']}",
    ]
    for line in lines:
        console.print(Text(printable(line)))
    console.print(_components(content))
    console.print(_blocks(content))
    official = ", ".join(name for name, score in content["scores"].items() if score["official"])
    without = "".join(f"; none in {part}, which has no cross-attention" for part in content["without_scores"])
    console.print(Text(f"official score ids: {official}{without}"))
    console.print(_costs(content))
    if "job" in content:
        console.print(_job(content["job"]))
    if layers:
        console.print(_layers(content))


def _components(content: dict[str, Any]) -> Table:
    whole = table("components", "name", "class", "dtype", "parameters", names=3)
    for name, part in content["components"].items():
        whole.add_row(name, part["class"], part["dtype"], f"{part['parameters']:,}")
    return whole


def _blocks(content: dict[str, Any]) -> Table:
    total, scores = len(content["layers"]), len(content["scores"])
    whole = table(
        f"{total} layer ids, {scores} score ids (--layers prints all)",
        "block",
        "layer ids",
        "size",
        "score ids",
        "heads",
    )
    for name, block in content["blocks"].items():
        sizes = ", ".join(f"{h} x {w}" for h, w in block["sizes"])
        heads = ", ".join(str(count) for count in block["heads"])
        whole.add_row(name, str(block["layer_ids"]), sizes, str(block["score_ids"] or ""), heads)
    return whole


def _costs(content: dict[str, Any]) -> Table:
    cost = content["cost"]
    whole = table("cost of one row (image, timestep, text)", "plan stops after", "GFLOP", "share")
    for stop in cost["stops"]:
        whole.add_row(stop["after"], _giga(stop["row"]), f"{stop['share']:.1%}")
    whole.add_section()
    whole.add_row("once per noised latent, of it", _giga(cost["text_free"]), f"{cost['text_free'] / cost['row']:.1%}")
    whole.add_row("keys and values, once per text", _giga(cost["text"]), f"{cost['text'] / cost['row']:.1%}")
    return whole


def _job(job: dict[str, Any]) -> Table:
    whole = table(
        f"matching {counted(job['images'], 'image')} with {counted(job['captions'], 'caption')} "
        f"at {counted(len(job['timesteps']), 'timestep')}",
        "score",
        "rows",
        "TFLOP",
    )
    for way in job["ways"]:
        whole.add_row(way["score"], f"{way['rows']:,}", f"{way['flops'] / 1e12:,.3f}")
    return whole


def _layers(content: dict[str, Any]) -> Table:
    whole = table("layers", "id", "shape for one image", names=2)
    whole.box = None
    for name, shape in content["layers"].items():
        whole.add_row(name, " x ".join(str(n) for n in shape))
    whole.add_section()
    for name, score in content["scores"].items():
        whole.add_row(name, f"score, {score['heads']} heads" + (", official" if score["official"] else ""))
    return whole


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.4f}" if flops < 1e9 else f"{flops / 1e9:,.1f}"
