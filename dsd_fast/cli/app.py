"""The commands. Importing them loads neither torch nor diffusers: each command does so when it runs."""

from typing import Annotated

import typer

from dsd_fast import __version__
from dsd_fast.cli.bench import bench, bench_docs
from dsd_fast.cli.demo.command import demo
from dsd_fast.cli.evaluate.command import evaluate
from dsd_fast.cli.features.command import features
from dsd_fast.cli.fit.command import fit
from dsd_fast.cli.gate.command import gate
from dsd_fast.cli.generate.command import generate
from dsd_fast.cli.info.command import info
from dsd_fast.cli.match.command import match
from dsd_fast.cli.prompt.command import prompt
from dsd_fast.cli.tokens.command import tokens
from dsd_fast.cli.zsl.command import zsl

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dsd-fast {__version__}")
        raise typer.Exit


@app.callback()
def dsd_fast(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Diffusion models as discriminative learners: which text describes an image?"""


for command in (match, evaluate, fit, features, gate, generate, zsl, info, demo, bench, bench_docs):
    app.command()(command)
app.add_typer(tokens, name="tokens")
app.add_typer(prompt, name="prompt")
