"""Everything that Bittern refuses. Each message is one line: what was given, what was expected, what to do."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any


class BitternError(Exception):
    """Base of all known errors; the command line prints it without a traceback and exits with 1."""


class InputError(BitternError):
    """A path, a data set, labels or an option that cannot be used."""


class RecipeError(BitternError):
    """A recipe or format that is misspelt, impossible or matches nothing."""


class ModelError(BitternError):
    """A model that cannot be quantized as asked: not a Transformer, NaN weights, unknown layers."""


class CheckpointError(BitternError):
    """A packed checkpoint that is damaged, foreign or newer than this version."""


def need(module: str, extra: str = "tools") -> Any:
    """Import a module of a library that loading and running a packed model does without. Raises InputError, with the
    extra that brings it, if it is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        raise InputError(f"this needs {library}, which is not installed: pip install 'bittern[{extra}]'") from error


def listed(names: Sequence[object], most: int = 10) -> str:
    """Return the first names, and how many more there are.

    >>> listed(["query", "key", "value", "map"], 2)
    'query, key and 2 more'
    """
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def no_such(what: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for a name that is none of the known ones, with the one that was meant, if that is clear."""
    near = get_close_matches(name, known := list(known), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return InputError(f"no {what} {name!r}; {hint}there are {', '.join(known)}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or of its cause if it has one; its type if it says nothing."""
    error = error.__cause__ or error
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def one_line(kind: type[BitternError], what: str, advice: str = "") -> Iterator[None]:
    """Make one error of ours of whatever the code of others raises inside the block: what failed, why, what to do.
    Their errors have no common base; ours pass as they are, and so does a lack of memory."""
    try:
        yield
    except (BitternError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # what Rust's libraries panic with is no Exception
        if out_of_memory(error):
            raise
        raise kind(f"{what}: {first_line(error)}{advice}") from error


def out_of_memory(error: BaseException) -> str:
    """Return a line to say if there was no memory left, on a GPU or for the process; "" for any other error."""
    known = ("out of memory", "can't allocate memory", "not enough memory", "bad allocation")  # torch has no one type
    text = str(error).lower()
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and any(k in text for k in known)):
        return ""
    return f"out of memory ({first_line(error)}); give a smaller --batch-size, fewer --samples or a smaller model"
