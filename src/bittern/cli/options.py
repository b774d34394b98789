"""What the commands share: options, and reading the texts that some of them are given as."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bittern.errors import InputError
from bittern.show import TrainingBar

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a model with config.json and .safetensors, or a hub name.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output if it exists.")]
Columns = Annotated[str, typer.Option(help="Input columns of the data, separated by commas.")]
LabelColumn = Annotated[str | None, typer.Option(help="Label column of the data.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per batch.")]
DATA_HELP = (
    "Folder or file of texts or images, for detectors a folder in COCO format, a dataset name, or the built-in digits "
    "or sentences."
)


def parse_mixed(target: float | None, bits: str, sensitivity: str) -> Any:
    from bittern.ptq import Mixed

    if target is None:
        return None
    if not all(b.isdigit() for b in split(bits)) or sensitivity not in ("relative", "paper"):
        raise InputError(
            f"mixed precision needs whole numbers as --bits and relative or paper as --sensitivity, got {bits!r} and "
            f"{sensitivity!r}"
        )
    return Mixed(target, tuple(map(int, split(bits))), sensitivity)  # type: ignore[arg-type]


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, split(text)))
    except ValueError:
        raise InputError(f"{option} is {text!r}; expected whole numbers separated by commas") from None


def parse_mapping(text: str) -> dict[int, int] | None:
    pairs = [part.split(":") for part in split(text)]
    if not all(len(pair) == 2 and all(number.strip().isdigit() for number in pair) for pair in pairs):
        raise InputError(f"mapping is {text!r}; expected student:teacher pairs of blocks, such as 0:1,1:3")
    return {int(mine): int(theirs) for mine, theirs in pairs} or None


def parse_settings(options: list[str]) -> dict[str, Any]:
    """NAME=VALUE options, values read as YAML."""
    import yaml

    found = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"--set {option} has no value; expected NAME=VALUE")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {option}: the value cannot be read") from None
    return found


def training_bar(quiet: bool, intervention: Any = None) -> dict[str, Any]:
    return {} if quiet else {"on_step": TrainingBar(intervention.phase if intervention else None)}


def split(columns: str) -> tuple[str, ...]:
    return tuple(c.strip() for c in columns.split(",") if c.strip())
