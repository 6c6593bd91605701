"""Groups of options: the signature that typer reads, the values that come back, and what shared groups stand for."""

from dataclasses import FrozenInstanceError, fields
from inspect import Parameter, signature
from typing import Annotated, get_args

import pytest
import typer
from typer.testing import CliRunner

from dsd_fast import FitConfig, MatchConfig
from dsd_fast.cli.features.options import FeatureOptions
from dsd_fast.cli.fit.options import FitOptions, FitScoreOptions
from dsd_fast.cli.groups import Options, command
from dsd_fast.cli.options import MemoryOptions, ScoreOptions
from dsd_fast.cli.terminal import CommandError
from dsd_fast.features import FeatureConfig

Shared = Annotated[int, typer.Option(rich_help_panel="Elsewhere")]


def parse(text):
    if text == "none":
        raise ValueError("--size: 'none' is no size")
    return int(text)


class Size(Options, panel="Size"):
    size: Annotated[str, typer.Option(help="Of it."), parse] = "1"
    shared: Shared = 2
    depth: Annotated[int, typer.Option()] = 3


class Deep(Size):
    size: Annotated[str, typer.Option("--how-large"), parse] = "7"


class Request(Options):
    name: Annotated[str, typer.Argument()]
    deep: Deep
    flag: Annotated[bool, typer.Option("--flag")] = False


seen = []


@command
def run(request: Request) -> None:
    """Runs."""
    if request.flag:
        raise CommandError("no flag")
    seen.append(request)
    seen.append(request.deep.values())


def invoke(*arguments):
    app = typer.Typer()
    app.command()(run)
    seen.clear()
    return CliRunner().invoke(app, arguments)


def test_the_signature_is_flat_and_in_order():
    parameters = signature(run).parameters
    assert list(parameters) == list(run.__annotations__) == ["name", "size", "shared", "depth", "flag"]
    defaults = [parameter.default for parameter in parameters.values()]
    assert defaults == [Parameter.empty, "7", 2, 3, False]
    panels = [get_args(parameter.annotation)[1].rich_help_panel for parameter in parameters.values()]
    assert panels == [None, "Size", "Elsewhere", "Size", None]
    # What two groups share is not changed by either.
    assert get_args(Shared)[1].rich_help_panel == "Elsewhere"
    assert (run.__name__, run.__doc__) == ("run", "Runs.")


def test_values_come_back_as_groups():
    assert invoke("x", "--how-large", "4", "--depth", "5").exit_code == 0
    request, values = seen
    assert (request.name, request.flag, vars(request.deep)) == ("x", False, {"size": "4", "shared": 2, "depth": 5})
    assert values == {"size": 4, "shared": 2, "depth": 5}
    with pytest.raises(FrozenInstanceError):
        request.deep.depth = 1
    assert invoke("x", "--size", "4").exit_code == 2
    assert invoke().exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--flag"], "no flag"), (["--how-large", "none"], "--size: 'none' is no size")]
)
def test_what_the_user_can_cause_is_one_sentence(arguments, message):
    done = invoke("x", *arguments)
    assert (done.exit_code, done.stderr) == (2, f"Error: {message}\n")


def test_the_groups_have_every_setting_and_its_default():
    """A setting that a configuration gains is missing here until its group has it."""

    def names(kind, *without):
        return {field.name for field in fields(kind)} - set(without)

    memory = MemoryOptions()
    assert names(ScoreOptions) == names(FitScoreOptions) == names(MatchConfig, "memory_budget")
    assert ScoreOptions().config(memory) == FitScoreOptions().config(memory) == MatchConfig()
    assert ScoreOptions().config(MemoryOptions(memory_budget="2kB")) == MatchConfig(memory_budget=2000)
    own = {"own_noise", "fit_seed", "method", "official_recipe"}
    assert names(FitOptions, *own) == names(FitConfig, "shared_noise", "seed")
    assert FitOptions().config() == FitConfig()
    settings = FeatureOptions().settings(memory)
    assert set(settings) == names(FeatureConfig)
    assert FeatureConfig(**settings | {"timesteps": (50,)}) == FeatureConfig()
