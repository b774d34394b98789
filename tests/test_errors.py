"""Errors of others become one line of ours; what is no error, and what we said already, passes as it is."""

import pytest

from bittern.errors import InputError, ModelError, one_line


class Panic(BaseException):
    """What tokenizers raises when its code in Rust panics: no Exception."""


@pytest.mark.parametrize("kind", [ValueError, KeyError, Panic])
def test_errors_of_others(kind: type[BaseException]) -> None:
    """Whatever others raise is told in one line, with what failed and what to do, and keeps its cause."""
    explained = one_line(InputError, "no tokenizer", "; give another")
    with pytest.raises(InputError, match=r"^no tokenizer: '?index'?; give another$") as caught, explained:
        raise kind("index")
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize("error", [ModelError("known"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_what_passes(error: BaseException) -> None:
    """Our own errors, an interruption, an exit and a lack of memory pass."""
    with pytest.raises(type(error)) as caught, one_line(InputError, "no tokenizer"):
        raise error
    assert caught.value is error
