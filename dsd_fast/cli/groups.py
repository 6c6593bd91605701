"""Groups of options: frozen dataclasses of Annotated fields, which become the signature that typer reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from inspect import Parameter, Signature
from typing import Annotated, Any, ClassVar, Self, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

from dsd_fast.cli.terminal import one_sentence


@dataclass_transform(eq_default=False, frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, eq=False)
class Options:
    """Options of a command; fields that are groups themselves stand for the options of those.

    A subclass becomes a frozen dataclass. Its fields are annotated for typer, perhaps with what reads their text,
    ``Annotated[str, typer.Option(…), parse] = "1"``. A subclass of a group may say a field anew, which keeps its place.

    Attributes:
        panel: of the help in which options stand that name none themselves: ``class ScoreOptions(Options, panel=…)``.
        kinds: the fields' annotations.
    """

    panel: ClassVar[str | None] = None
    kinds: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, panel: str | None = None) -> None:
        cls.panel = panel or cls.panel
        # Without comparison and representation, which take half the time of making a class when the command starts.
        dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)
        hints = get_type_hints(cls, include_extras=True)
        cls.kinds = {field.name: hints[field.name] for field in fields(cls)}

    @classmethod
    def parameters(cls) -> Iterator[Parameter]:
        """Tells typer's parameters, option by option."""
        for field in fields(cls):
            kind = cls.kinds[field.name]
            if _is_group(kind):
                yield from kind.parameters()
            else:
                default = Parameter.empty if field.default is MISSING else field.default
                annotation = _in_panel(kind, cls.panel)
                yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Makes the group from the values of all options of a command, by name."""
        return cls(**{name: kind.of(values) if _is_group(kind) else values[name] for name, kind in cls.kinds.items()})

    def values(self) -> dict[str, Any]:
        """Tells the options by name, texts as their parsers read them.

        Raises:
            ValueError: text that is no value of its option, by name.
        """
        values = {}
        for name, kind in self.kinds.items():
            values[name] = getattr(self, name)
            for parse in get_args(kind)[2:]:
                values[name] = parse(values[name])
        return values

    def changed(self) -> list[str]:
        """Names the options that do not have their defaults, as they are written: --name."""
        names = []
        for field in fields(self):
            option = get_args(self.kinds[field.name])[1]
            if getattr(self, field.name) != field.default:
                names.append((option.param_decls or [f"--{field.name.replace('_', '-')}"])[0])
        return names


Group = TypeVar("Group", bound=Options)


def command(function: Callable[[Group], None]) -> Callable[..., None]:
    """Makes a function of one group a command: its signature has the group's options, one by one.

    Whatever the user can cause ends it with one sentence (:func:`dsd_fast.cli.terminal.one_sentence`).
    """
    (kind,) = (hint for name, hint in get_type_hints(function).items() if name != "return")
    parameters = list(kind.parameters())

    @wraps(function)
    def run(**values: Any) -> None:
        with one_sentence():
            function(kind.of(values))

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Options)


def _in_panel(kind: Any, panel: str | None) -> Any:
    if get_origin(kind) is not Annotated:
        return kind
    plain, option = get_args(kind)[:2]
    if isinstance(option, OptionInfo) and option.rich_help_panel is None:
        option = copy(option)
        option.rich_help_panel = panel
    return Annotated[plain, option]
