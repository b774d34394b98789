"""A command is a function without a body: its parameters are the options, its docstring the help.

Types and defaults of a parameter are those of the job that the command runs, which a test checks; a dataclass stands
for the options that its fields are. Nothing here needs torch: a job is imported when it runs.
"""

import dataclasses
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from keyword import iskeyword
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer
import yaml

from bittern import show
from bittern.errors import InputError
from bittern.options import RECIPES, Option, parse_distill
from bittern.progress import is_main_process, leave_processes


def split(text: str, name: str = "") -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_numbers(text: str, name: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        return tuple(map(int, split(text)))
    except ValueError:
        raise InputError(f"{name} is {text!r}; expected whole numbers separated by commas") from None


def parse_mapping(text: str, name: str) -> dict[int, int]:
    """Pairs of whole numbers, such as 0:1,1:3."""
    pairs = [part.split(":") for part in split(text)]
    if not all(len(pair) == 2 and all(number.strip().isdigit() for number in pair) for pair in pairs):
        raise InputError(f"{name} is {text!r}; expected student:teacher pairs of blocks, such as 0:1,1:3")
    return {int(mine): int(theirs) for mine, theirs in pairs}


def parse_labels(text: str, name: str) -> dict[str, str] | str:
    """The word order, or pairs such as good=positive,bad=0."""
    pairs = [part.partition("=") for part in split(text)]
    if text != "order" and not all(own and target for own, _, target in pairs):
        expected = "order, or DATA=MODEL pairs of labels, such as good=positive,bad=0"
        raise InputError(f"{name} is {text!r}; expected {expected}")
    return text if text == "order" else {own.strip(): target.strip() for own, _, target in pairs}


def parse_settings(options: list[str], name: str) -> dict[str, Any]:
    """NAME=VALUE options, values read as YAML."""
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"--set {option} has no value; expected NAME=VALUE")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {option}: the value cannot be read") from None
    return found


PARSERS: dict[Any, Callable[[Any, str], Any]] = {  # of types that are not written as one number or word
    tuple[int, ...]: parse_numbers,
    Mapping[int, int]: parse_mapping,
    Mapping[str, float]: lambda text, name: parse_distill(text).terms,
    Mapping[str, str]: parse_labels,
    Mapping[str, Any]: parse_settings,
    Sequence[str]: split,
}


class Entry(NamedTuple):
    """An option, and where its value goes: to a parameter of the job, or to a field of a dataclass that it takes.

    group: the parameter that takes the dataclass; "" for a parameter of the job itself. name: "" if the option only
    says that there is a group. default: None if the job decides, or nothing is given.
    """

    group: str
    name: str
    kind: Any
    default: Any
    option: Option

    @property
    def flags(self) -> tuple[str, ...]:
        return self.option.flags or ("--" + (self.name or self.group).replace("_", "-"),)

    @property
    def key(self) -> str:
        """The name by which typer knows it."""
        name = self.flags[0].strip("-").replace("-", "_").lower()
        return f"{name}_" if iskeyword(name) else name


def entries(function: Callable[..., Any]) -> Iterator[Entry]:
    """Yield the options of a command."""
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, option = unwrap(hints[name])
        if dataclasses.is_dataclass(kind):
            group = "" if parameter.kind is inspect.Parameter.VAR_KEYWORD else name
            fields = list(fields_of(kind, group))  # type: ignore[arg-type]
            if option is not None:
                yield Entry(name, "", bool, False, option)
            elif parameter.default is None:  # the first field says if there is a group
                fields[0] = fields[0]._replace(default=None)
            yield from fields
        elif option is not None:
            yield Entry("", name, kind, parameter.default, option)


def fields_of(kind: type, group: str) -> Iterator[Entry]:
    """Yield the options that are fields of a dataclass."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if option := field.metadata.get("option"):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield Entry(group, field.name, unwrap(hints[field.name])[0], default, option)


def unwrap(hint: Any) -> tuple[Any, Option | None]:
    """Return the type of a hint without None and without what it is annotated with, and its Option."""
    option = None
    while get_origin(hint) in (Annotated, Union, UnionType):
        option = next(iter(getattr(hint, "__metadata__", ())), option)
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    return hint, option


def typer_parameter(entry: Entry) -> inspect.Parameter:
    """Make the parameter that typer makes an option of."""
    _, _, kind, default, (help, _, least) = entry
    if kind in PARSERS:
        text = next((n for n, terms in RECIPES.items() if terms == default), "") or ",".join(map(str, default or ()))
        kind, default = list[str] if kind == Mapping[str, Any] else str, text or None
    elif get_origin(kind) is Literal:  # the job tells which there are
        kind = str
    flags: tuple[str, ...] = entry.flags
    if not flags[0].startswith("-"):
        info: Any = typer.Argument(metavar=flags[0], help=help)
    else:
        flags = (f"{flags[0]}/--no-{flags[0][2:]}",) if kind is bool and default else flags
        info = typer.Option(*flags, help=help, min=least)
    annotation: Any = Annotated[kind | None if default is None else kind, info]
    return inspect.Parameter(entry.key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def job_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a command's job from the values of its options; what was not given is left to the job."""
    known, values = list(entries(function)), defaultdict[str, dict[str, Any]](dict)
    for entry in known:
        if (value := given[entry.key]) is not None:
            read = PARSERS.get(entry.kind)
            values[entry.group][entry.name] = read(value, entry.name) if read else value
    arguments = values.pop("")
    hints = get_type_hints(function)
    for group, fields in values.items():
        first = next(entry for entry in known if entry.group == group)
        if fields.pop("") if first.name == "" else first.default is not None or first.name in fields:
            arguments[group] = unwrap(hints[group])[0](**fields)
            continue
        others = {entry.key for entry in known if entry.group != group} | {first.key}
        for entry in known:
            if entry.group == group and entry.key not in others and given[entry.key] != typer_parameter(entry).default:
                raise InputError(f"{entry.flags[0]} says nothing without {first.flags[0]}; give both or neither")
    return arguments


Show = Callable[[dict[str, Any]], None]


def command(job: str, show_result: Show) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command that runs a job, named `module:function` of Bittern, and shows or prints its result."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            arguments, as_json = job_arguments(function, given), given["json"]
            module, _, name = job.partition(":")
            work = getattr(import_module(f"bittern.{module}"), name)
            result = work(**arguments, **show.watchers(work, arguments, as_json or not is_main_process()))
            if as_json:  # which has no NaN
                result = json.loads(json.dumps(result), parse_constant=lambda _: None)
            if is_main_process():
                print(json.dumps(result)) if as_json else show_result(result)
            leave_processes()

        known = [*entries(function), Entry("", "json", bool, False, Option("Print one JSON object instead of tables."))]
        unique = {entry.key: entry for entry in reversed(known)}
        parameters = [typer_parameter(entry) for entry in reversed(unique.values())]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__name__, run.__doc__, run.__annotations__ = function.__name__, function.__doc__, {}
        run.job, run.options = job, function  # type: ignore[attr-defined]
        return run

    return decorate
