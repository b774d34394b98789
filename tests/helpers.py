"""What the tests of several modules share: quantized models, their outputs, and refusals in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from torch import Tensor

from bittern import calibrate, pack, simulate
from bittern.analysis.pair import Pair
from bittern.errors import BitternError
from bittern.recipe import Recipe
from families import SUPPORTED, Batch


def quantized(name: str, recipe: str | Recipe = "w8a8", packed: bool = True) -> tuple[hf.PreTrainedModel, Batch]:
    """A model of a family, simulated and calibrated on its own batch, then packed if so asked."""
    model, batch = SUPPORTED[name]()
    simulate(model, recipe, batch)
    calibrate(model, [batch])
    return pack(model) if packed else model, batch


def teacher_and_student(name: str, recipe: str | Recipe = "ternary-2-2-8", packed: bool = True) -> tuple[Pair, Batch]:
    """A model of a family beside its own quantized copy, and their batch."""
    student, batch = quantized(name, recipe, packed)
    return Pair(student, SUPPORTED[name]()[0]), batch


@torch.no_grad()
def outputs(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    """All tensors that a model gives."""
    return {name: value for name, value in model(**batch).items() if isinstance(value, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models gave the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def refused(kind: type[BitternError], *parts: str) -> Iterator[None]:
    """The block must raise exactly this error, in one line that holds all the parts."""
    with pytest.raises(kind) as error:
        yield
    message = str(error.value)
    assert error.type is kind
    assert len(message.splitlines()) == 1
    assert all(part in message for part in parts), message
