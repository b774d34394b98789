"""Labels of data as numbers of the model's classes: matched by name where both sides have names."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from bittern.errors import InputError, listed
from bittern.options import Labels


def plain(name: object) -> str:
    """Return a name without what people write in several ways: case, and blanks, underscores and hyphens."""
    return re.sub(r"[\s_-]+", " ", str(name)).strip().casefold()


def class_names(model: PreTrainedModel) -> dict[int, str]:
    """Return the names of the model's classes by their numbers."""
    names = {int(i): str(name) for i, name in (model.config.id2label or {}).items()}
    if _generic(names) and model.config.label2id:
        return {int(i): str(name) for name, i in model.config.label2id.items()}
    return names


def _generic(names: Mapping[int, str]) -> bool:
    return all(plain(name) == f"label {i}" for i, name in names.items())


def match_classes(
    source: str, names: Mapping[int, str], used: Sequence[str], model: PreTrainedModel, labels: Labels | None
) -> dict[str, int]:
    """Return the number of the model's class for each name that the data uses.

    names: of the data's classes by their numbers; empty if they have none. labels: says which is which, or that the
    `order` of both is the same. Else they are matched by name, or are numbers themselves; if the model has no names of
    its own, the data's numbers are taken. Raises InputError, with both lists, for what is no class of the model.
    """
    known = class_names(model)
    exact = {name: i for i, name in known.items()}
    loose = {plain(name): i for i, name in reversed(known.items())}
    numbers = {str(i): i for i in known}
    if any(name.isdigit() and int(name) != i for i, name in [*known.items(), *names.items()]):
        numbers = {}  # "1" to "5" as names of 0 to 4: a number may mean either
    own = {name: i for i, name in (names or {i: str(i) for i in known}).items()}
    given = {plain(name): target for name, target in labels.items()} if isinstance(labels, Mapping) else {}
    by_order = labels == "order"
    if names and not labels and _generic(known):
        by_order = not {plain(name) for name in used} <= loose.keys()
    found: dict[str, int] = {}
    for name in used:
        target = given.get(plain(name), name)
        number = exact.get(target, loose.get(plain(target), numbers.get(target)))
        if by_order:
            number = own.get(name)
        if number not in known:
            theirs, mine = listed([*names.values()] or sorted(used)), listed([*known.values()])
            raise InputError(
                f"{source} has the classes {theirs}; the model has {mine}, none of which is {target!r}; say which is "
                "which with --labels DATA=MODEL,… or --labels order"
            )
        found[name] = number
    return found


def label_numbers(
    source: str, column: str, feature: Any, values: Sequence[Any], model: PreTrainedModel, labels: Labels | None
) -> list[int]:
    """Return values of a column as numbers of the model's classes. feature: of `datasets`, which may name them."""
    names = dict(enumerate(getattr(feature, "names", None) or []))
    keys = [names.get(v) or _key(v) if isinstance(v, int) else _key(v) for v in values]
    if None in keys:
        i = keys.index(None)
        expected = f"a class of the model by number or name: {listed([*class_names(model).values()])}"
        raise InputError(f"{source}: row {i} of {column} is {values[i]!r}; expected {expected}")
    index = match_classes(source, names, list(dict.fromkeys(map(str, keys))), model, labels)
    if not labels and any(index.get(name, i) != i for i, name in names.items()):
        warnings.warn(f"{source} numbers its classes otherwise than the model; they are matched by name", stacklevel=2)
    return [index[str(key)] for key in keys]


def _key(value: Any) -> str | None:
    """Return a label as text, whole numbers without a fraction; None if it is no label."""
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return re.sub(r"^(-?\d+)\.0+$", r"\1", value.strip())
    return None
