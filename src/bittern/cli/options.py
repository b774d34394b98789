"""Commands made of jobs: the options are the job's parameters, and fields of the dataclasses it takes.

Types and defaults stand where the job is; a command adds flags and help, in a table by parameter name.
`training.epochs` is a field of the parameter `training`; a name with a space in it is one option for two parameters.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer
import yaml

from bittern import show
from bittern.data import load_data
from bittern.errors import InputError
from bittern.qat.distill import RECIPES, parse_distill
from bittern.qat.training import is_main_process, leave_processes


class Option(NamedTuple):
    """Help and flags of an option, by default its name; the least value that it may have. argument: name of what is
    given without a flag."""

    help: str
    flags: tuple[str, ...] = ()
    least: int | None = None
    argument: str = ""


Options = dict[str, Option]
DATA_HELP = (
    "Folder or file of texts or images, for detectors a folder in COCO format, a dataset name, or the built-in digits "
    "or sentences."
)
MODEL = Option("Folder of a model with config.json and .safetensors, or a hub name.", argument="MODEL")
DATA = Option(DATA_HELP)
RECIPE = Option("A ready-made recipe, or a YAML file.", ("--recipe", "-r"))
OUT = Option("Folder for the packed model.", ("--out", "-o"))
BATCH_SIZE = Option("Samples per batch.", least=1)
MAX_LENGTH = Option("Most tokens of a text; of a language model's block.", least=2)
COLUMNS: Options = {
    "columns": Option("Input columns of the data, separated by commas."),
    "label_column": Option("Label column of the data."),
}
FORCE: Options = {"force": Option("Overwrite the output if it exists.")}


def split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def read_numbers(text: str, name: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        return tuple(map(int, split(text)))
    except ValueError:
        raise InputError(f"{name} is {text!r}; expected whole numbers separated by commas") from None


def read_mapping(text: str, name: str) -> dict[int, int]:
    """Pairs of whole numbers, such as 0:1,1:3."""
    pairs = [part.split(":") for part in split(text)]
    if not all(len(pair) == 2 and all(number.strip().isdigit() for number in pair) for pair in pairs):
        raise InputError(f"{name} is {text!r}; expected student:teacher pairs of blocks, such as 0:1,1:3")
    return {int(mine): int(theirs) for mine, theirs in pairs}


def read_settings(options: list[str], name: str) -> dict[str, Any]:
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


READERS: dict[Any, Callable[[Any, str], Any]] = {  # of types that are not written as one number or word
    tuple[int, ...]: read_numbers,
    Mapping[int, int]: read_mapping,
    Mapping[str, float]: lambda text, name: parse_distill(text).terms,
    Mapping[str, Any]: read_settings,
    Sequence[str]: lambda text, name: split(text),
}


class Parameter(NamedTuple):
    """A parameter of a job or field of a dataclass: its type without None, and its default."""

    type: Any
    optional: bool
    default: Any


def look_up(job: Callable[..., Any], path: str) -> Parameter:
    """The parameter of a job, or what it passes on to `load_data`, or the field of a dataclass that it takes."""
    name, _, field = path.partition(".")
    own = inspect.signature(job).parameters.get(name)
    if own is None or own.kind is inspect.Parameter.VAR_KEYWORD:
        job = load_data
    hint, default = get_type_hints(job)[name], inspect.signature(job).parameters[name].default
    if dataclasses.is_dataclass(job):
        factory = next(f.default_factory for f in dataclasses.fields(job) if f.name == name)
        default = default if factory is dataclasses.MISSING else factory()
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    found = Parameter(kinds[0], type(None) in kinds, default)
    return look_up(found.type, field) if field else found


def typer_parameter(job: Callable[..., Any], path: str, option: Option, switches: bool) -> inspect.Parameter:
    """Make the parameter that typer makes an option of.

    switches: it decides if the dataclass it belongs to is made, so it has no default.
    """
    kind, optional, default = look_up(job, path)
    if dataclasses.is_dataclass(kind):  # an option of its own switches it on
        kind, optional, default = bool, False, False
    elif kind in READERS:
        text = next((n for n, terms in RECIPES.items() if terms == default), "") or ",".join(map(str, default or ()))
        kind, optional, default = list[str] if kind == Mapping[str, Any] else str, True, text or None
    elif get_origin(kind) is Literal:  # the job tells which there are
        kind = str
    elif path == "out":
        kind = Path
    if switches:
        optional, default = True, None
    flags = option.flags or ("--" + path.rpartition(".")[2].replace("_", "-"),)
    if kind is bool and default:
        flags = (f"{flags[0]}/--no-{flags[0][2:]}",)
    info: Any = typer.Option(*flags, help=option.help, min=option.least)
    if option.argument:
        info = typer.Argument(metavar=option.argument, help=option.help)
    annotation: Any = Annotated[kind | None if optional else kind, info]
    name = path.replace(".", "_")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def typer_parameters(job: Callable[..., Any], options: Options) -> list[inspect.Parameter]:
    seen: set[str] = set()
    found = []
    for paths, option in options.items():
        path, *_ = paths.split()
        group, _, field = path.partition(".")
        found.append(
            typer_parameter(job, path, option, bool(field) and group not in seen and look_up(job, group).optional)
        )
        seen.add(group)
    return found


def job_arguments(job: Callable[..., Any], options: Options, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a job from the values of its options; what was not given is left to the job."""
    found: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for paths, value in zip(options, given.values(), strict=True):
        for path in paths.split():
            name, _, field = path.partition(".")
            kind = look_up(job, path).type
            read = READERS.get(kind) if value is not None else None
            (groups.setdefault(name, {}) if field else found)[field or name] = (
                read(value, field or name) if read else value
            )
    for name, fields in groups.items():
        kind, optional, _ = look_up(job, name)
        if optional and not found.pop(name, next(iter(fields.values()))):
            continue
        found[name] = kind(**{field: value for field, value in fields.items() if value is not None})
    return {name: value for name, value in found.items() if value is not None}


Show = Callable[[dict[str, Any], dict[str, Any]], None]


def command(job: Callable[..., Any], options: Options) -> Callable[[Show], Callable[..., None]]:
    """Make a command of a job: parse, call, and print what it returned as JSON or by the function that is decorated,
    which gives the command its name and help, and gets the job's arguments too."""

    def decorate(print_result: Show) -> Callable[..., None]:
        def run(*, as_json: bool, **given: Any) -> None:
            arguments = job_arguments(job, options, given)
            quiet = as_json or not is_main_process()
            result = job(**arguments, **show.watchers(job, arguments, quiet))
            if is_main_process():
                print(json.dumps(result)) if as_json else print_result(result, arguments)
            leave_processes()

        json_option = typer.Option("--json", help="Print one JSON object instead of tables.")
        as_json = inspect.Parameter(
            "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, json_option]
        )
        run.__signature__ = inspect.Signature([*typer_parameters(job, options), as_json])  # type: ignore[attr-defined]
        run.__name__, run.__doc__, run.__annotations__ = print_result.__name__, print_result.__doc__, {}
        return run

    return decorate
